//! The program under test and the guest image, each made once for all tests.

use std::{
    env,
    error::Error,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::LazyLock,
};

use cofferdam_images::{Image, Options};
use serde_json::Value;

/// What each test is told that needs what could not be made.
type Made<T> = LazyLock<Result<T, String>>;

static PROGRAM: Made<PathBuf> = LazyLock::new(|| match env::var_os("COFFERDAM_BIN") {
    Some(path) => Ok(path.into()),
    None => compile(),
});

static IMAGE: Made<(PathBuf, Image)> = LazyLock::new(|| {
    let options = Options::default();
    let image = cofferdam_images::ensure(&options).map_err(|error| {
        let mut told = format!("there is no guest image: {error}");
        let mut cause = error.source();
        while let Some(error) = cause {
            told = format!("{told}: {error}");
            cause = error.source();
        }
        format!("{told}\n{MEND}")
    })?;
    Ok((options.out, image))
});

/// What to do on a machine that can't run the tests.
pub(crate) const MEND: &str = "If something is missing on this machine, run: images/setup.sh";

/// The `cofferdam` program: `$COFFERDAM_BIN`, or compiled now, in the profile of the tests.
pub fn program() -> &'static Path {
    PROGRAM.as_deref().unwrap_or_else(|error| panic!("{error}"))
}

/// The guest image's directory and its files, made if need be.
pub fn image() -> (&'static Path, &'static Image) {
    let (directory, image) = IMAGE.as_ref().unwrap_or_else(|error| panic!("{error}"));
    (directory, image)
}

fn compile() -> Result<PathBuf, String> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args([
        "build",
        "--package",
        "cofferdam",
        "--bin",
        "cofferdam",
        "--message-format",
        "json-render-diagnostics",
    ]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let made = command.current_dir(workspace).stderr(Stdio::inherit()).output().expect("cargo can be started");
    if !made.status.success() {
        return Err(format!("cofferdam does not compile, see above.\n{MEND}"));
    }
    let executable = String::from_utf8_lossy(&made.stdout).lines().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        let is_ours = message["target"]["name"] == "cofferdam" && message["target"]["kind"][0] == "bin";
        is_ours.then(|| message["executable"].as_str().map(PathBuf::from))?
    });
    executable.ok_or_else(|| "cargo does not say where the program is that it has made".to_owned())
}

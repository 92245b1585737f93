//! The program under test and the guest image, each made once for all tests.

use std::{
    env,
    error::Error,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::LazyLock,
};

use cofferdam_images::{Image, KernelChoice, Options};
use serde_json::Value;

/// The failure of every test that needs the program or the image, if it could not be made.
type Made<T> = LazyLock<Result<T, String>>;

static PROGRAM: Made<PathBuf> = LazyLock::new(|| match env::var_os("COFFERDAM_BIN") {
    Some(path) => Ok(path.into()),
    None => compile("cofferdam"),
});

static NETWORK_LAB: Made<PathBuf> = LazyLock::new(|| compile("network-lab"));

static IMAGE: Made<(PathBuf, Image)> = LazyLock::new(|| named_or_made("COFFERDAM_TEST_IMAGE", &Options::default()));

/// What names [`debian_image`] if it is there already.
pub const DEBIAN_IMAGE_SETTING: &str = "COFFERDAM_TEST_DEBIAN_IMAGE";

static DEBIAN_IMAGE: Made<(PathBuf, Image)> = LazyLock::new(|| {
    let out = cofferdam_images::cache_dir().join("test-image-debian");
    named_or_made(DEBIAN_IMAGE_SETTING, &Options { out, kernel: KernelChoice::Debian, ..Options::default() })
});

fn named_or_made(setting: &str, options: &Options) -> Result<(PathBuf, Image), String> {
    if let Some(directory) = env::var_os(setting).map(PathBuf::from) {
        let image = Image::open(&directory).map_err(|error| no_image(&error))?;
        return Ok((directory, image));
    }
    let image = cofferdam_images::ensure(options).map_err(|error| no_image(&error))?;
    // Another checkout may replace this image by its own. The version in use stays.
    let version = image.kernel.parent().expect("it is a file").to_owned();
    Ok((version, image))
}

fn no_image(error: &dyn Error) -> String {
    let mut told = format!("there is no guest image: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        told = format!("{told}: {error}");
        cause = error.source();
    }
    format!("{told}\n{MEND}")
}

/// Advice for a machine that can't run the tests.
pub(crate) const MEND: &str = "If something is missing on this machine, run: images/setup.sh test";

/// The `cofferdam` program: `$COFFERDAM_BIN`, or compiled now, in the profile of the tests.
pub fn program() -> &'static Path {
    PROGRAM.as_deref().unwrap_or_else(|error| panic!("{error}"))
}

/// The program that gives a host an internet, for programs that are no tests: compiled now, in their profile.
pub(crate) fn network_lab() -> &'static Path {
    NETWORK_LAB.as_deref().unwrap_or_else(|error| panic!("{error}"))
}

/// Copies a program that is to be executed. In another process: a descriptor that is open for writing here may be in a child that
/// another thread has just forked, and then the kernel refuses to execute the file.
#[track_caller]
pub fn copy_program(from: &Path, to: &Path) {
    let status = Command::new("cp").arg(from).arg(to).status();
    assert!(status.is_ok_and(|status| status.success()), "can't copy {} to {}", from.display(), to.display());
}

/// The guest image's directory and its files: `$COFFERDAM_TEST_IMAGE`, or else the user's own, made if necessary.
pub fn image() -> (&'static Path, &'static Image) {
    let (directory, image) = IMAGE.as_ref().unwrap_or_else(|error| panic!("{error}"));
    (directory, image)
}

/// An image with Debian's kernel, whatever the others have: `$COFFERDAM_TEST_DEBIAN_IMAGE`, or else made if necessary.
pub fn debian_image() -> (&'static Path, &'static Image) {
    let (directory, image) = DEBIAN_IMAGE.as_ref().unwrap_or_else(|error| panic!("{error}"));
    (directory, image)
}

/// The executable of the whole-system tests, compiled now in the profile of this program.
///
/// # Errors
///
/// It doesn't compile.
pub fn test_executable() -> Result<PathBuf, String> {
    let made = cargo(&["test", "--no-run", "--package", "cofferdam-tests", "--test", "system"], "test")?;
    made.into_iter().next().map(|(_, path)| path).ok_or_else(|| UNNAMED.to_owned())
}

const UNNAMED: &str = "cargo does not say where the program is that it has made";

fn compile(name: &str) -> Result<PathBuf, String> {
    // Selects the same packages as the call that compiled the dependencies, all tests or this package's programs. Otherwise
    // the dependencies would get other features and be compiled again.
    let beside = if cfg!(debug_assertions) {
        ["--workspace", "--test=system"]
    } else {
        ["--package=cofferdam", "--package=cofferdam-tests"]
    };
    let made = cargo(&["build", "--bin", name, beside[0], beside[1]], "bin")?;
    let program = made.into_iter().find(|(made, _)| made == name).map(|(_, path)| path);
    program.ok_or_else(|| UNNAMED.to_owned())
}

/// Compiles with cargo, and returns the executables of this kind of target.
fn cargo(arguments: &[&str], kind: &str) -> Result<Vec<(String, PathBuf)>, String> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(arguments).args(["--message-format", "json-render-diagnostics"]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    // Cargo sets these variables for this package's programs. ring's build script looks at them, and would run again.
    for (key, _) in env::vars_os() {
        if ["CARGO_MANIFEST_", "CARGO_PKG_"].iter().any(|prefix| key.as_encoded_bytes().starts_with(prefix.as_bytes()))
        {
            command.env_remove(key);
        }
    }
    // It is set only for the tests, to print their times. Half the dependencies would be compiled again because of it.
    command.env_remove("RUSTC_BOOTSTRAP");
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let made = command.current_dir(workspace).stderr(Stdio::inherit()).output().expect("cargo can be started");
    if !made.status.success() {
        return Err(format!("cofferdam or its tests do not compile, see above.\n{MEND}"));
    }
    let executable = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        let path = message["executable"].as_str()?.into();
        (message["target"]["kind"][0] == kind).then(|| Some((message["target"]["name"].as_str()?.to_owned(), path)))?
    };
    Ok(String::from_utf8_lossy(&made.stdout).lines().filter_map(executable).collect())
}

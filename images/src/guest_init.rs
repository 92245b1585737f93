//! guest-init, compiled for the image: static, small, and the same bytes wherever the workspace lies.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{self, CommandError};

/// The host's own triple: no further target needs to be installed, and `crt-static` makes the program static.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Has cargo compile the program if its sources changed, and says where it is.
pub(crate) fn compile() -> Result<PathBuf, CommandError> {
    let workspace = workspace();
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), |dir| workspace.join(dir));
    // Apart from the host's artifacts, so that the two never wait for each other's lock.
    let target = target.join("guest");
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    flags.push(format!("--remap-path-prefix={}=/cofferdam", workspace.display()));
    if let Some(cargo_home) = cargo_home() {
        flags.push(format!("--remap-path-prefix={}=/cargo", cargo_home.display()));
    }
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace).env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    cargo.args(["build", "--quiet", "--package", "guest-init", "--profile", "guest", "--target", TARGET]);
    command::output(cargo.arg("--target-dir").arg(&target))?;
    Ok(target.join(TARGET).join("guest/guest-init"))
}

/// The workspace that this program was compiled from.
pub(crate) fn workspace() -> &'static Path {
    let images = Path::new(env!("CARGO_MANIFEST_DIR"));
    images.parent().unwrap_or(images)
}

fn cargo_home() -> Option<PathBuf> {
    let home = || env::home_dir().map(|home| home.join(".cargo"));
    env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home)
}

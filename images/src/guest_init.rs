//! Compiles guest-init for the image: static and small. The result does not depend on the paths of the workspace and of
//! cargo's home.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{self, CommandError};

/// The host's own target, so that no other one needs to be installed. `crt-static` makes the program static.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Has cargo compile the program if its sources have changed. Returns its path.
pub(crate) fn compile() -> Result<PathBuf, CommandError> {
    let workspace = workspace();
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), |dir| workspace.join(dir));
    // A directory of its own, so that this never waits for another cargo that compiles programs of the host.
    compile_in(workspace, cargo_home().as_deref(), &target.join("guest"))
}

fn compile_in(workspace: &Path, cargo_home: Option<&Path>, target: &Path) -> Result<PathBuf, CommandError> {
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    flags.push(format!("--remap-path-prefix={}=/cofferdam", workspace.display()));
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    if let Some(cargo_home) = cargo_home {
        flags.push(format!("--remap-path-prefix={}=/cargo", cargo_home.display()));
        cargo.env("CARGO_HOME", cargo_home);
    }
    cargo.current_dir(workspace).env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    // Some crates compile to other code when it is set.
    cargo.env_remove("RUSTC_BOOTSTRAP");
    cargo.args(["build", "--quiet", "--package", "guest-init", "--profile", "guest", "--target", TARGET]);
    command::output(cargo.arg("--target-dir").arg(target))?;
    Ok(target.join(TARGET).join("guest/guest-init"))
}

/// The workspace that this program was compiled from.
fn workspace() -> &'static Path {
    let images = Path::new(env!("CARGO_MANIFEST_DIR"));
    images.parent().unwrap_or(images)
}

fn cargo_home() -> Option<PathBuf> {
    let home = || env::home_dir().map(|home| home.join(".cargo"));
    env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// Copies the workspace without cargo's target directory, which has a `CACHEDIR.TAG`, and without hidden files.
    fn copy_sources(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let (name, path) = entry.map(|entry| (entry.file_name(), entry.path())).unwrap();
            if name.as_encoded_bytes().starts_with(b".") || path.join("CACHEDIR.TAG").exists() {
                continue;
            }
            if path.is_dir() {
                copy_sources(&path, &to.join(name));
            } else {
                fs::copy(&path, to.join(name)).unwrap();
            }
        }
    }

    #[test]
    fn the_program_does_not_depend_on_paths() {
        let directory = tempfile::tempdir().unwrap();
        let place = |name| directory.path().join(name);
        let (copy, home) = (place("another-place/of-another-length"), place("cargo-home"));
        copy_sources(workspace(), &copy);
        symlink(cargo_home().unwrap(), &home).unwrap();
        let here = compile().unwrap();
        let there = compile_in(&copy, Some(&home), &place("artifacts")).unwrap();
        assert!(
            fs::read(&here).unwrap() == fs::read(&there).unwrap(),
            "{here:?} differs from the program compiled in {copy:?}"
        );
    }
}

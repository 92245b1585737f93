//! guest-init, compiled for the image: static, small, and the same bytes wherever the workspace and cargo's home lie.

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
pub(crate) fn workspace() -> &'static Path {
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

    /// What cargo reads; its target directory, wherever it is, carries a mark, and names with a dot are not ours.
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
    fn all_places_give_the_same_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let place = |name| directory.path().join(name);
        let (copy, home) = (place("another-place/of-another-length"), place("cargo-home"));
        copy_sources(workspace(), &copy);
        symlink(cargo_home().unwrap(), &home).unwrap();
        let here = compile().unwrap();
        let there = compile_in(&copy, Some(&home), &place("artifacts")).unwrap();
        assert!(fs::read(&here).unwrap() == fs::read(&there).unwrap(), "{here:?} differs from what {copy:?} gives");
    }
}

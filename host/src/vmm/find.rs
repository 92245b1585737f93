//! Where the programs are that this one doesn't bring along, and which version they have.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// How much of what a program says about its version is read, in bytes.
const MAX_VERSION_BYTES: u64 = 4096;

/// A program that is looked for.
#[derive(Debug)]
pub(super) struct Tool {
    /// Its file name.
    pub(super) name: &'static str,
    /// The environment variable that names its file and goes before everything else.
    pub(super) setting: &'static str,
    /// Whether it is also looked for where cargo and our own set-up install programs.
    pub(super) installed_by_cargo: bool,
}

pub(super) const CLOUD_HYPERVISOR: Tool =
    Tool { name: "cloud-hypervisor", setting: "COFFERDAM_CLOUD_HYPERVISOR", installed_by_cargo: false };
pub(super) const QEMU: Tool = Tool { name: "qemu-system-x86_64", setting: "COFFERDAM_QEMU", installed_by_cargo: false };
pub(super) const VHOST_DEVICE_VSOCK: Tool =
    Tool { name: "vhost-device-vsock", setting: "COFFERDAM_VHOST_DEVICE_VSOCK", installed_by_cargo: true };

/// How environment variables are read.
pub(super) type Variables<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// The file of `tool`, or one sentence on where it isn't.
pub(super) fn locate(tool: &Tool, variables: Variables<'_>) -> Result<PathBuf, String> {
    let set = |name: &str| variables(name).filter(|value| !value.is_empty());
    if let Some(path) = set(tool.setting).map(PathBuf::from) {
        return match std::path::absolute(&path) {
            Ok(absolute) if is_program(&absolute) => Ok(absolute),
            _ => Err(format!("{} names {}, which is not an executable file", tool.setting, path.display())),
        };
    }
    let mut directories: Vec<PathBuf> =
        set("PATH").map_or_else(Vec::new, |path| std::env::split_paths(&path).collect());
    if tool.installed_by_cargo {
        let home = set("HOME").map(PathBuf::from);
        let below = |variable: &str, default: &str| {
            set(variable).map(PathBuf::from).or_else(|| home.as_ref().map(|home| home.join(default)))
        };
        directories.extend(below("CARGO_HOME", ".cargo").map(|cargo| cargo.join("bin")));
        directories.extend(below("XDG_CACHE_HOME", ".cache").map(|cache| cache.join("cofferdam/tools/bin")));
    }
    // A relative entry would make the answer depend on the current directory, which a child doesn't share.
    let candidates = directories.iter().filter(|directory| directory.is_absolute());
    candidates
        .map(|directory| directory.join(tool.name))
        .find(|path| is_program(path))
        .ok_or_else(|| format!("{} is neither in PATH nor named by {}", tool.name, tool.setting))
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// Asks a program for its version with `--version`: the first number in the first line of its answer.
pub(super) fn version(program: &Path) -> Result<String, String> {
    let failed = |why: &dyn std::fmt::Display| format!("{} --version does not work: {why}", program.display());
    let mut command = Command::new(program);
    command.arg("--version").env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| failed(&error))?;
    let mut said = vec![];
    let read = match child.stdout.take() {
        Some(output) => output.take(MAX_VERSION_BYTES).read_to_end(&mut said),
        None => Ok(0),
    };
    let status = child.wait().map_err(|error| failed(&error))?;
    read.map_err(|error| failed(&error))?;
    parse(&String::from_utf8_lossy(&said)).ok_or_else(|| failed(&format!("{status}, and no version in its answer")))
}

fn parse(said: &str) -> Option<String> {
    let words = said.lines().next()?.split_ascii_whitespace();
    let mut numbers = words.map(|word| word.strip_prefix('v').unwrap_or(word));
    let number = numbers.find(|word| word.starts_with(|first: char| first.is_ascii_digit()))?;
    Some(number.chars().take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+')).collect())
}

/// The first number of a version.
pub(super) fn major(version: &str) -> u32 {
    version.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    use crate::vmm::tests::program as write_program;

    fn program(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        write_program(path, "echo tool v5.6-rc1");
    }

    #[test]
    fn the_setting_goes_first_then_path_then_cargo() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let look = |pairs: &[(&str, PathBuf)]| {
            let variables =
                |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone().into());
            locate(&VHOST_DEVICE_VSOCK, &variables)
        };
        let pairs = [("PATH", at("bin")), ("HOME", at("home"))];
        assert_eq!(
            look(&pairs).unwrap_err(),
            "vhost-device-vsock is neither in PATH nor named by COFFERDAM_VHOST_DEVICE_VSOCK"
        );
        program(&at("home/.cache/cofferdam/tools/bin/vhost-device-vsock"));
        assert_eq!(look(&pairs).unwrap(), at("home/.cache/cofferdam/tools/bin/vhost-device-vsock"));
        program(&at("home/.cargo/bin/vhost-device-vsock"));
        assert_eq!(look(&pairs).unwrap(), at("home/.cargo/bin/vhost-device-vsock"));
        fs::create_dir(at("bin")).unwrap();
        fs::write(at("bin/vhost-device-vsock"), "not executable").unwrap();
        assert_eq!(look(&pairs).unwrap(), at("home/.cargo/bin/vhost-device-vsock"));
        program(&at("bin/vhost-device-vsock"));
        assert_eq!(look(&pairs).unwrap(), at("bin/vhost-device-vsock"));
        program(&at("other"));
        assert_eq!(look(&[pairs[0].clone(), (VHOST_DEVICE_VSOCK.setting, at("other"))]).unwrap(), at("other"));
        let error = look(&[pairs[0].clone(), (VHOST_DEVICE_VSOCK.setting, "/nowhere/x".into())]).unwrap_err();
        assert_eq!(error, "COFFERDAM_VHOST_DEVICE_VSOCK names /nowhere/x, which is not an executable file");
    }

    #[test]
    fn versions_are_found_where_programs_print_them() {
        assert_eq!(parse("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright").as_deref(), Some("7.2.22"));
        assert_eq!(parse("cloud-hypervisor v53.0\n").as_deref(), Some("53.0"));
        assert_eq!(parse("cloud-hypervisor v53.0-12-gabc\n").as_deref(), Some("53.0-12-gabc"));
        assert_eq!(parse("vhost-device-vsock 0.3.0").as_deref(), Some("0.3.0"));
        assert_eq!(parse("no number here\n1"), None);
        assert_eq!((major("53.0-12"), major("7.2.22"), major("x")), (53, 7, 0));
        let directory = tempfile::tempdir().unwrap();
        program(&directory.path().join("tool"));
        assert_eq!(version(&directory.path().join("tool")).unwrap(), "5.6-rc1");
        let silent = write_program(&directory.path().join("silent"), "exit 1");
        let error = version(&silent).unwrap_err();
        assert!(
            error.ends_with("silent --version does not work: exit status: 1, and no version in its answer"),
            "{error}"
        );
    }
}

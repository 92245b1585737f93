//! Finds the VMMs' programs: their files, their versions, and the faults of unusable ones.

use std::ffi::OsString;
use std::fmt;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::{AccessFlags, Pid, access};

use crate::machine::jail::escape;

/// A reason why a VMM can't run on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The reason, as part of a sentence.
    pub what: String,
    /// The command or the step that fixes it.
    pub remedy: String,
}

/// A program on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its file.
    pub program: PathBuf,
    /// Its version.
    pub version: String,
}

/// Most bytes of a program's answer that are read.
const MAX_ANSWER_BYTES: u64 = 4096;

/// Most characters of an unusable answer that are quoted.
const MAX_QUOTED_CHARS: usize = 200;

/// How long a program may take to print its version. Usually it takes some ten milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A program to find.
#[derive(Debug)]
pub(super) struct Tool {
    /// Its file name.
    pub(super) name: &'static str,
    /// The environment variable that names its file. It comes before PATH.
    pub(super) setting: &'static str,
    /// Whether to search the directories of cargo, of `images/setup.sh` and of the package, too.
    pub(super) outside_path: bool,
    /// The text before the version in its answer to `--version`.
    pub(super) calls_itself: &'static str,
    /// The oldest version that works.
    pub(super) oldest: Version,
    /// Why no older one works, as part of a sentence.
    pub(super) reason: &'static str,
    /// How to install it.
    pub(super) install: &'static str,
}

pub(super) const CLOUD_HYPERVISOR: Tool = Tool {
    name: "cloud-hypervisor",
    setting: "COFFERDAM_CLOUD_HYPERVISOR",
    outside_path: false,
    calls_itself: "cloud-hypervisor ",
    oldest: Version(39, 0),
    reason: "the first that boots a distribution's kernel (bzImage)",
    install: "install v53 or later, put it into PATH or name its file in COFFERDAM_CLOUD_HYPERVISOR",
};

pub(super) const QEMU: Tool = Tool {
    name: "qemu-system-x86_64",
    setting: "COFFERDAM_QEMU",
    outside_path: false,
    calls_itself: "QEMU emulator version ",
    oldest: Version(6, 0),
    reason: "the first whose microvm has all the devices",
    install: "sudo apt-get install qemu-system-x86",
};

pub(super) const VHOST_DEVICE_VSOCK: Tool = Tool {
    name: "vhost-device-vsock",
    setting: "COFFERDAM_VHOST_DEVICE_VSOCK",
    outside_path: true,
    calls_itself: "vhost-device-vsock ",
    oldest: Version(0, 0),
    reason: "",
    install: "cargo install --locked --version 0.3.0 vhost-device-vsock",
};

/// The first two numbers of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub(super) u32, pub(super) u32);

impl Version {
    /// Reads a version such as `53.0-12-gabc`. A part that is not a number counts as 0.
    pub(super) fn of(text: &str) -> Self {
        let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(|digits| digits.parse().unwrap_or(0));
        Self(numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// Looks up an environment variable.
pub(super) type Variables<'a> = &'a (dyn Fn(&str) -> Option<OsString> + Sync);

/// Finds `tool`. A program that is too old is returned with the reason.
pub(super) fn look(tool: &Tool, variables: Variables<'_>) -> (Option<Found>, Option<Missing>) {
    match locate(tool, variables).and_then(|program| ask(tool, program)) {
        Err(missing) => (None, Some(missing)),
        Ok(found) => {
            let old = Version::of(&found.version) < tool.oldest;
            let missing = old.then(|| Missing {
                what: format!(
                    "{} is version {}; the oldest that works is {}, {}",
                    found.program.display(),
                    found.version,
                    tool.oldest,
                    tool.reason
                ),
                remedy: tool.install.to_owned(),
            });
            (Some(found), missing)
        }
    }
}

/// The file of `tool`.
fn locate(tool: &Tool, variables: Variables<'_>) -> Result<PathBuf, Missing> {
    let set = |name: &str| variables(name).filter(|value| !value.is_empty());
    if let Some(path) = set(tool.setting).map(PathBuf::from) {
        let missing = |what: &str, remedy| Missing {
            what: format!("{} names {}, which {what}", tool.setting, path.display()),
            remedy,
        };
        return match std::path::absolute(&path) {
            Ok(absolute) if is_program(&absolute) => Ok(absolute),
            Ok(absolute) if absolute.is_file() => Err(missing("is not executable", permit(&absolute))),
            _ => Err(missing("is not a file", format!("set it to the file of {}, or unset it", tool.name))),
        };
    }
    let mut directories: Vec<PathBuf> =
        set("PATH").map_or_else(Vec::new, |path| std::env::split_paths(&path).collect());
    if tool.outside_path {
        let home = set("HOME").map(PathBuf::from);
        let below = |variable: &str, default: &str| {
            set(variable).map(PathBuf::from).or_else(|| home.as_ref().map(|home| home.join(default)))
        };
        directories.extend(below("CARGO_HOME", ".cargo").map(|cargo| cargo.join("bin")));
        directories.extend(below("XDG_CACHE_HOME", ".cache").map(|cache| cache.join("cofferdam/tools/bin")));
        directories.extend(cofferdam_images::packaged_dir());
    }
    // A relative entry depends on the current directory, and a child has another one.
    let absolute = directories.iter().filter(|directory| directory.is_absolute());
    let files: Vec<PathBuf> =
        absolute.map(|directory| directory.join(tool.name)).filter(|path| path.is_file()).collect();
    match (files.iter().find(|path| is_program(path)), files.first()) {
        (Some(program), _) => Ok(program.clone()),
        (None, Some(file)) => {
            let what = format!("{} is in PATH, but not executable", file.display());
            Err(Missing { what, remedy: permit(file) })
        }
        (None, None) => {
            let what = format!("{} is neither in PATH nor named by {}", tool.name, tool.setting);
            Err(Missing { what, remedy: tool.install.to_owned() })
        }
    }
}

fn is_program(path: &Path) -> bool {
    path.is_file() && access(path, AccessFlags::X_OK).is_ok()
}

fn permit(file: &Path) -> String {
    format!("chmod a+x {}", file.display())
}

/// Checks a program's name and version by running it with `--version`.
fn ask(tool: &Tool, program: PathBuf) -> Result<Found, Missing> {
    let answer = answer(&program, ANSWER_TIMEOUT);
    let problem = match &answer {
        Ok((status, said)) => match parse(tool.calls_itself, said) {
            Some(version) => return Ok(Found { program, version }),
            None => format!("is not {}: --version ended with {status} and {}", tool.name, quote(said)),
        },
        Err(problem) => problem.clone(),
    };
    let what = format!("{} {problem}", program.display());
    Err(Missing { what, remedy: format!("name another file in {}, or {}", tool.setting, tool.install) })
}

/// Runs `program --version`. Returns its exit status and the beginning of its output.
fn answer(program: &Path, limit: Duration) -> Result<(ExitStatus, String), String> {
    let failed = |error: &dyn fmt::Display| format!("does not start: {error}");
    let (output, writer) = std::io::pipe().map_err(|error| failed(&error))?;
    let mut command = Command::new(program);
    command.arg("--version").env_clear().process_group(0).stdin(Stdio::null());
    command.stderr(writer.try_clone().map_err(|error| failed(&error))?).stdout(writer);
    let mut child = command.spawn().map_err(|error| failed(&error))?;
    // It holds copies of the pipe's write end. The reader sees the end of file only when they are closed.
    drop(command);
    let group = Pid::from_raw(child.id().cast_signed());
    let (sender, answers) = mpsc::channel();
    thread::spawn(move || {
        let mut said = vec![];
        // The part before an error is still useful.
        let _ = output.take(MAX_ANSWER_BYTES).read_to_end(&mut said);
        let _ = sender.send(child.wait().map(|status| (status, escape(&said))));
    });
    let (late, answer) = match answers.recv_timeout(limit) {
        Ok(answer) => (false, Ok(answer)),
        Err(_) => {
            // The thread has not answered, so the process is not reaped, and its id is still its own.
            let _ = killpg(group, Signal::SIGKILL);
            (true, answers.recv_timeout(limit))
        }
    };
    match answer {
        Ok(Err(error)) => Err(failed(&error)),
        Ok(Ok((status, said))) if !late => Ok((status, said)),
        answer => {
            let said = answer.ok().and_then(Result::ok).map(|(_, said)| said).unwrap_or_default();
            let limit = limit.as_secs_f64();
            Err(format!("did not answer --version within {limit} s and was killed, with {}", quote(&said)))
        }
    }
}

fn quote(said: &str) -> String {
    match said.lines().next().unwrap_or_default() {
        "" => "no output".to_owned(),
        line => format!("the output \"{}\"", line.chars().take(MAX_QUOTED_CHARS).collect::<String>()),
    }
}

fn parse(calls_itself: &str, said: &str) -> Option<String> {
    let number = said.lines().find_map(|line| line.strip_prefix(calls_itself))?.trim_start_matches('v');
    let version: String =
        number.chars().take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+')).collect();
    version.starts_with(|first: char| first.is_ascii_digit()).then_some(version)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    use crate::machine::vmm::tests::program as write_program;

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
            look(&pairs).unwrap_err().what,
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
        let missing = look(&[pairs[0].clone(), (VHOST_DEVICE_VSOCK.setting, "/nowhere/x".into())]).unwrap_err();
        assert_eq!(missing.what, "COFFERDAM_VHOST_DEVICE_VSOCK names /nowhere/x, which is not a file");
        assert_eq!(missing.remedy, "set it to the file of vhost-device-vsock, or unset it");
    }

    #[test]
    fn a_file_that_is_not_executable_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("cloud-hypervisor");
        fs::write(&file, "").unwrap();
        let look = |variable: &'static str, value: &Path| {
            let value = value.to_owned();
            locate(&CLOUD_HYPERVISOR, &move |name: &str| (name == variable).then(|| value.clone().into())).unwrap_err()
        };
        let shown = file.display();
        let missing = look("PATH", directory.path());
        assert_eq!(missing.what, format!("{shown} is in PATH, but not executable"));
        assert_eq!(missing.remedy, format!("chmod a+x {shown}"));
        let missing = look(CLOUD_HYPERVISOR.setting, &file);
        assert_eq!(missing.what, format!("COFFERDAM_CLOUD_HYPERVISOR names {shown}, which is not executable"));
        assert_eq!(missing.remedy, format!("chmod a+x {shown}"));
    }

    #[test]
    fn versions_are_found_where_programs_print_them() {
        let qemu = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright";
        assert_eq!(parse(QEMU.calls_itself, qemu).as_deref(), Some("7.2.22"));
        let parse = |said| parse(CLOUD_HYPERVISOR.calls_itself, said);
        assert_eq!(parse("a warning\ncloud-hypervisor v53.0\n").as_deref(), Some("53.0"));
        assert_eq!(parse("cloud-hypervisor v53.0-12-gabc\n").as_deref(), Some("53.0-12-gabc"));
        for other in ["", "cloud-hypervisor", "cloud-hypervisor vX", "QEMU emulator version 7.2", "ch 53.0"] {
            assert_eq!(parse(other), None, "{other}");
        }
        assert_eq!(Version::of("53.0-12"), Version(53, 0));
        assert_eq!(Version::of("7.2.22"), Version(7, 2));
        assert_eq!(Version::of("x"), Version(0, 0));
        assert!(Version::of("50.0") < Version(50, 1) && Version::of("51.0") > Version(50, 1));
    }

    /// Version, problem and remedy when this script is in cloud-hypervisor's place.
    fn judged(script: &str) -> (Option<String>, String, String) {
        let directory = tempfile::tempdir().unwrap();
        let file = write_program(&directory.path().join("cloud-hypervisor"), script);
        let variables = |name: &str| (name == CLOUD_HYPERVISOR.setting).then(|| file.clone().into());
        let (found, missing) = look(&CLOUD_HYPERVISOR, &variables);
        let Missing { what, remedy } = missing.unwrap();
        let path = format!("{} ", file.display());
        (found.map(|found| found.version), what.strip_prefix(&path).unwrap().to_owned(), remedy)
    }

    #[test]
    fn a_wrong_old_or_broken_program_is_reported_with_its_output() {
        let (found, what, remedy) = judged("echo cloud-hypervisor v38.2");
        assert_eq!(found.as_deref(), Some("38.2"));
        assert_eq!(
            what,
            "is version 38.2; the oldest that works is 39.0, the first that boots a distribution's kernel (bzImage)"
        );
        assert!(remedy.starts_with("install v53 or later"), "{remedy}");

        for (script, problem) in [
            (
                "echo 'tool 5.6'",
                "is not cloud-hypervisor: --version ended with exit status: 0 and the output \"tool 5.6\"",
            ),
            (
                "echo 'libc.so.6: no such file' >&2; exit 127",
                "is not cloud-hypervisor: --version ended with exit status: 127 and the output \
                 \"libc.so.6: no such file\"",
            ),
            ("kill -ILL $$", "is not cloud-hypervisor: --version ended with signal: 4 (SIGILL) and no output"),
        ] {
            let (found, what, remedy) = judged(script);
            assert_eq!((found, what.as_str()), (None, problem));
            assert!(remedy.starts_with("name another file in COFFERDAM_CLOUD_HYPERVISOR, or install"), "{remedy}");
        }
    }

    #[test]
    fn a_file_that_is_no_program_is_reported_with_the_systems_error() {
        let directory = tempfile::tempdir().unwrap();
        let file = write_program(&directory.path().join("cloud-hypervisor"), "");
        fs::write(&file, "\x7fELF for another machine").unwrap();
        let missing = ask(&CLOUD_HYPERVISOR, file.clone()).unwrap_err();
        assert_eq!(missing.what, format!("{} does not start: Exec format error (os error 8)", file.display()));
    }

    #[test]
    fn a_program_that_never_answers_is_killed() {
        let directory = tempfile::tempdir().unwrap();
        let hangs = write_program(&directory.path().join("hangs"), "echo wait >&2; sleep 1000; echo never");
        let problem = answer(&hangs, Duration::from_secs(5)).unwrap_err();
        assert_eq!(problem, "did not answer --version within 5 s and was killed, with the output \"wait\"");
        let babbles = write_program(&directory.path().join("babbles"), "while echo babble; do :; done");
        let (status, said) = answer(&babbles, ANSWER_TIMEOUT).unwrap();
        assert!(!status.success() && said.starts_with("babble") && said.len() <= 4096, "{status} {}", said.len());
    }
}

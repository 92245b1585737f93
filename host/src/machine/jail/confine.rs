//! The rights that our own device processes give up once everything that they need is open.

use std::fs::File;
use std::io;

use caps::CapSet;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_no_new_privs;

/// The newest Landlock that is asked for; an older kernel enforces the part that it knows.
pub(super) const LANDLOCK: ABI = ABI::V6;

/// `LANDLOCK_CREATE_RULESET_VERSION`: returns the version instead of making a rule set.
const CREATE_RULESET_VERSION: libc::c_uint = 1;

/// The kernel's version of Landlock, 0 where it has none or was booted without it.
pub fn landlock_version() -> u32 {
    // SAFETY: asked for its version, the call takes no pointer and makes nothing.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, CREATE_RULESET_VERSION)
    };
    u32::try_from(version).unwrap_or(0)
}

/// A right that could not be given up.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// `PR_SET_NO_NEW_PRIVS`.
    #[error("can't set no_new_privs")]
    NoNewPrivs(#[source] io::Error),
    /// One of the sets of capabilities.
    #[error("can't drop the capabilities in the {set} set")]
    Capabilities {
        /// The set.
        set: &'static str,
        /// The kernel's answer.
        #[source]
        source: caps::errors::CapsError,
    },
    /// Landlock is there and refuses.
    #[error("can't restrict the process with Landlock")]
    Landlock(#[from] landlock::RulesetError),
}

/// From here on this thread, and every thread that it starts, can use what is open and nothing else: no path, no new
/// TCP connection, no signal to another process, no capability. Called while the process has just one thread.
///
/// Where the kernel lacks Landlock, or has an old one, it says so in the log and goes on with the rest.
///
/// # Errors
///
/// A right that every kernel lets a process give up could not be given up.
pub fn confine_without_files() -> Result<(), ConfineError> {
    confine_to_reading(&[])
}

/// As [`confine_without_files`], except that what is in these directories can still be opened, to read it.
///
/// # Errors
///
/// As there.
pub fn confine_to_reading(directories: &[File]) -> Result<(), ConfineError> {
    set_no_new_privs().map_err(|error| ConfineError::NoNewPrivs(error.into()))?;
    leave_namespaces();
    restrict_paths(directories)?;
    drop_capabilities()
}

/// An empty network and empty IPC, where the process may make namespaces. Behind walls it has them already.
fn leave_namespaces() {
    let flags = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    if let Err(error) = unshare(flags) {
        tracing::debug!("no namespaces of its own: {error}");
    }
}

fn restrict_paths(readable: &[File]) -> Result<(), ConfineError> {
    let rules = readable.iter().filter(|file| file.metadata().is_ok_and(|found| found.is_dir()));
    let rules = rules.map(|directory| {
        Ok::<_, landlock::RulesetError>(PathBeneath::new(directory, AccessFs::ReadFile | AccessFs::ReadDir))
    });
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?
        .add_rules(rules)?
        .restrict_self()?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => {}
        RulesetStatus::PartiallyEnforced => tracing::debug!("this kernel's Landlock enforces a part of what is asked"),
        RulesetStatus::NotEnforced => tracing::warn!("this kernel has no Landlock: paths stay in reach of the process"),
    }
    Ok(())
}

fn drop_capabilities() -> Result<(), ConfineError> {
    // The bounding set first, while there is the capability to change it; without that one it stays, and matters only
    // to an exec, which no_new_privs keeps from gaining anything.
    if caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP).unwrap_or(false) {
        clear(CapSet::Bounding, "bounding")?;
    }
    clear(CapSet::Ambient, "ambient")?;
    clear(CapSet::Inheritable, "inheritable")?;
    clear(CapSet::Effective, "effective")?;
    clear(CapSet::Permitted, "permitted")
}

fn clear(set: CapSet, name: &'static str) -> Result<(), ConfineError> {
    caps::clear(None, set).map_err(|source| ConfineError::Capabilities { set: name, source })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read as _;
    use std::net::TcpListener;

    use super::*;

    fn value<'a>(status: &'a str, field: &str) -> &'a str {
        status.lines().find_map(|line| line.strip_prefix(field)).unwrap().trim()
    }

    /// In a thread of its own, since what it gives up is the thread's.
    #[test]
    fn a_confined_thread_keeps_its_open_files_and_nothing_else() {
        std::thread::spawn(|| {
            let mut open = File::open("/proc/thread-self/status").unwrap();
            confine_without_files().unwrap();

            let mut status = String::new();
            open.read_to_string(&mut status).unwrap();
            assert_eq!(value(&status, "NoNewPrivs:"), "1");
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                assert_eq!(value(&status, set), "0000000000000000", "{set}");
            }
            for path in ["/", "/etc/passwd", "/proc/self/status", "/dev/null"] {
                assert!(File::open(path).is_err(), "{path}");
            }
            assert!(File::create(std::env::temp_dir().join("made-by-a-confined-thread")).is_err());
            assert!(TcpListener::bind("127.0.0.1:0").is_err());
            assert!(std::process::Command::new("/bin/true").status().is_err());
        })
        .join()
        .unwrap();
    }
}

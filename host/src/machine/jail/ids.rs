//! The user and group ids of helper processes.
//!
//! | the daemon | its helpers |
//! |---|---|
//! | root, or a user with `CAP_SETUID` and `CAP_SETGID` | a user id of each machine's own, which nobody else on the host has |
//! | a user with subordinate ids, and `newuidmap` | one of these ids for each machine |
//! | another user | that user, in namespaces |

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::ops::Range;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use caps::{CapSet, Capability};
use rustix::process::Gid;

use nix::unistd::{Uid, User, getegid, geteuid};

/// Ids for machines of a daemon that may take any. No distribution gives any of this range to a user or a container: see systemd's list of
/// special ids, "Users, Groups, UIDs and GIDs on systemd Systems".
const SPARE_IDS: Range<u32> = 1_879_048_192..1_879_048_192 + 65_536;

/// How many ids are tried for one that no machine has.
const TRIES: u32 = 1024;

/// The user and group of one machine's helpers, by their numbers outside of every namespace.
#[derive(Clone, Debug)]
pub(super) struct Ids {
    pub(super) uid: u32,
    pub(super) gid: u32,
    mapping: Mapping,
    /// Keeps others from taking the id, as long as somebody holds it.
    _reserved: Option<Arc<UnixDatagram>>,
}

/// How ids get into a user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mapping {
    /// Written by a process that may map any id.
    Any,
    /// By `newuidmap` and `newgidmap`.
    Subordinate,
    /// The daemon's own, which it may write itself.
    Own,
}

/// Where machines get their ids from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Any(Range<u32>),
    Subordinate {
        uids: Range<u32>,
        gids: Range<u32>,
    },
    /// The daemon's, for every machine.
    Own,
}

impl Source {
    /// The best that this process has, and why it isn't better.
    pub(super) fn find() -> (Self, Option<String>) {
        let can_set = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
        if can_set(Capability::CAP_SETUID) && can_set(Capability::CAP_SETGID) {
            return match among(&fs::read_to_string("/proc/self/uid_map").unwrap_or_default()) {
                Some(ids) => (Self::Any(ids), None),
                None => (Self::Own, Some("this user namespace has no user ids to spare".to_owned())),
            };
        }
        match subordinate() {
            Ok((uids, gids)) => (Self::Subordinate { uids, gids }, None),
            Err(why) => (Self::Own, Some(why)),
        }
    }

    /// The supplementary groups for helpers, where they can differ from the daemon's: that of `/dev/kvm`.
    pub(super) fn groups(&self) -> Option<Vec<Gid>> {
        matches!(self, Self::Any(_)).then(|| {
            let group = fs::metadata("/dev/kvm").ok().map(|kvm| kvm.gid()).filter(|group| *group != 0);
            group.map(Gid::from_raw).into_iter().collect()
        })
    }

    /// Ids that no other machine of this host has, as long as the answer is held.
    pub(super) fn reserve(&self) -> io::Result<Ids> {
        let (uids, gids, mapping) = match self {
            Self::Own => {
                let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
                return Ok(Ids { uid, gid, mapping: Mapping::Own, _reserved: None });
            }
            Self::Any(ids) => (ids, ids, Mapping::Any),
            Self::Subordinate { uids, gids } => (uids, gids, Mapping::Subordinate),
        };
        let count = uids.len().min(gids.len()) as u64;
        let start = RandomState::new().hash_one(std::process::id());
        for offset in (0..TRIES).map(|step| start.wrapping_add(step.into()).checked_rem(count).unwrap_or(0)) {
            let offset = u32::try_from(offset).map_err(io::Error::other)?;
            let uid = uids.start + offset;
            // The kernel forgets the name with the process, whatever ends it.
            let name = SocketAddr::from_abstract_name(format!("cofferdam-machine-{uid}"))?;
            match UnixDatagram::bind_addr(&name) {
                Ok(reserved) => {
                    let reserved = Some(Arc::new(reserved));
                    return Ok(Ids { uid, gid: gids.start + offset, mapping, _reserved: reserved });
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::new(io::ErrorKind::AddrInUse, format!("all user ids of {uids:?} that were tried are taken")))
    }
}

impl Ids {
    /// Maps these ids, and no others, into the user namespace of a process. Their numbers stay the same.
    pub(super) fn map(&self, pid: u32) -> io::Result<()> {
        let write = |file: &str, text: &str| {
            let path = format!("/proc/{pid}/{file}");
            fs::write(&path, text).map_err(|error| io::Error::new(error.kind(), format!("can't write {path}: {error}")))
        };
        let Self { uid, gid, mapping, .. } = self;
        match mapping {
            Mapping::Subordinate => {
                run("newuidmap", pid, *uid)?;
                run("newgidmap", pid, *gid)
            }
            Mapping::Any | Mapping::Own => {
                if *mapping == Mapping::Own {
                    // Who maps a group without being root must give up changing groups.
                    write("setgroups", "deny")?;
                }
                write("uid_map", &format!("{uid} {uid} 1"))?;
                write("gid_map", &format!("{gid} {gid} 1"))
            }
        }
    }
}

fn run(program: &str, pid: u32, id: u32) -> io::Result<()> {
    let arguments = [pid, id, id, 1].map(|number| number.to_string());
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = super::one_line(String::from_utf8_lossy(&output.stderr).trim());
    Err(io::Error::other(format!("{program} refused id {id}: {said}")))
}

/// Ids that this user namespace has: the range for machines, or else the end of the largest range.
fn among(uid_map: &str) -> Option<Range<u32>> {
    let ranges = uid_map.lines().filter_map(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u32>().ok());
        let (start, _, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
        Some(start..start.saturating_add(count))
    });
    let ranges: Vec<_> = ranges.collect();
    if ranges.iter().any(|range| range.start <= SPARE_IDS.start && SPARE_IDS.end <= range.end) {
        return Some(SPARE_IDS);
    }
    let largest = ranges.into_iter().max_by_key(ExactSizeIterator::len)?;
    // The first half has users.
    (largest.len() >= 4096).then(|| largest.end - u32::try_from(largest.len() / 2).unwrap_or(u32::MAX)..largest.end)
}

fn subordinate() -> Result<(Range<u32>, Range<u32>), String> {
    let uid = geteuid();
    let name = User::from_uid(uid).ok().flatten().map(|user| user.name).unwrap_or_default();
    for program in ["newuidmap", "newgidmap"] {
        let path = std::env::var_os("PATH").unwrap_or_default();
        if !std::env::split_paths(&path).any(|directory| directory.join(program).is_file()) {
            return Err(format!("{program} is not installed (Debian's package uidmap)"));
        }
    }
    let range = |file: &str| {
        let text = fs::read_to_string(Path::new(file)).unwrap_or_default();
        let range = range_of(&text, &name, uid);
        range.ok_or_else(|| format!("{file} has no ids for this user: usermod --add-subuids FIRST-LAST {name}"))
    };
    Ok((range("/etc/subuid")?, range("/etc/subgid")?))
}

/// The largest range of a user in subuid(5).
fn range_of(text: &str, name: &str, uid: Uid) -> Option<Range<u32>> {
    let ranges = text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let user = fields.next()?;
        if user.is_empty() || (user != name && user != uid.to_string()) {
            return None;
        }
        let (start, count) = (fields.next()?.parse::<u32>().ok()?, fields.next()?.parse::<u32>().ok()?);
        Some(start..start.checked_add(count)?)
    });
    ranges.filter(|range| !range.is_empty()).max_by_key(ExactSizeIterator::len)
}

#[cfg(test)]
mod tests {
    use std::{
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    #[test]
    fn ids_are_taken_that_the_namespace_has() {
        assert_eq!(among("         0          0 4294967295\n"), Some(SPARE_IDS));
        assert_eq!(among("0 100000 65536\n"), Some(32_768..65_536));
        assert_eq!(among("0 1000 1\n"), None);
        assert_eq!(among("0 1000 1\n1 100000 65536\n"), Some(32_769..65_537));
        assert_eq!(among(""), None);
    }

    #[test]
    fn the_largest_range_of_a_user_counts_whether_by_name_or_by_number() {
        let text = "a:100000:65536\nb:200000:10\n1000:300000:100\nbad\n:1:1\na:5:x\n";
        let of = |name| range_of(text, name, Uid::from_raw(1000));
        assert_eq!(of("a"), Some(100_000..165_536));
        assert_eq!(of("b"), Some(300_000..300_100));
        assert_eq!(of(""), Some(300_000..300_100));
        assert_eq!(range_of(text, "c", Uid::from_raw(7)), None);
    }

    #[test]
    fn no_two_machines_have_the_same_id() {
        let source = Source::Subordinate { uids: 2_000_000_000..2_000_000_002, gids: 3_000_000_000..3_000_000_100 };
        let (one, other) = (source.reserve().unwrap(), source.reserve().unwrap());
        assert_ne!(one.uid, other.uid);
        assert_eq!(one.uid - 2_000_000_000, one.gid - 3_000_000_000);
        assert_eq!(source.reserve().unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(one);
        // A process that another test has just forked has a copy of the reservation for a moment.
        let patience = Instant::now() + Duration::from_secs(60);
        while let Err(error) = source.reserve() {
            assert!(Instant::now() < patience, "{error}");
            thread::yield_now();
        }
    }
}

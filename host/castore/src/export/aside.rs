//! The temporary directory of an export.

use std::{
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, Flock, FlockArg, OFlag, openat},
    sys::stat::{Mode, fstat, fstatat, mkdirat},
    unistd::{UnlinkatFlags, geteuid, unlinkat},
};

use super::{ExportError, write_error};

const PREFIX: &str = ".cofferdam-export-";

/// A private directory beside the destination. Dropping it removes it with everything in it. It is locked as long as its
/// owner lives, if the file system has locks, so that a later export recognizes leftovers of dead processes.
pub(super) struct Aside {
    pub(super) dir: OwnedFd,
    path: PathBuf,
    _lock: Option<Flock<File>>,
}

impl Aside {
    pub(super) fn create(parent_dir: &OwnedFd, parent: &Path) -> Result<Self, ExportError> {
        // A leftover that can't be removed does no harm.
        let _ = sweep(parent_dir, parent);
        for attempt in 0_u32.. {
            let name = format!("{PREFIX}{}-{attempt}", std::process::id());
            let path = parent.join(&name);
            match mkdirat(parent_dir, name.as_str(), Mode::S_IRWXU) {
                Ok(()) => match Self::open(parent_dir, &name, &path) {
                    Ok(Some(aside)) => return Ok(aside),
                    // Another export took it for a leftover before it was locked.
                    Ok(None) => {}
                    Err(errno) => {
                        let _ = unlinkat(parent_dir, name.as_str(), UnlinkatFlags::RemoveDir);
                        return Err(write_error(&path, "open the directory", errno));
                    }
                },
                // Another export of this process, or the leftover of one that was killed.
                Err(Errno::EEXIST) => {}
                Err(errno) => return Err(write_error(&path, "create the directory", errno)),
            }
        }
        Err(write_error(parent, "create a directory", Errno::EEXIST))
    }

    fn open(parent_dir: &OwnedFd, name: &str, path: &Path) -> nix::Result<Option<Self>> {
        let dir = match open_dir(parent_dir, name) {
            Err(Errno::ENOENT) => return Ok(None),
            dir => dir?,
        };
        let lock = match Flock::lock(File::from(open_dir(&dir, ".")?), FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Some(lock),
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err(_) => None,
        };
        let is_there = fstatat(parent_dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)
            .is_ok_and(|there| fstat(&dir).is_ok_and(|stat| stat.st_ino == there.st_ino));
        Ok(is_there.then(|| Self { dir, path: path.to_owned(), _lock: lock }))
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // There is nobody to report a failure to.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes the leftovers of killed exports of this user in a directory.
fn sweep(parent_dir: &OwnedFd, parent: &Path) -> io::Result<()> {
    for entry in fs::read_dir(parent)? {
        let name = entry?.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with(PREFIX)) else { continue };
        let Ok(dir) = open_dir(parent_dir, name) else { continue };
        if fstat(&dir)?.st_uid != geteuid().as_raw() {
            continue;
        }
        if let Ok(_dead) = Flock::lock(File::from(dir), FlockArg::LockExclusiveNonblock) {
            fs::remove_dir_all(parent.join(name))?;
        }
    }
    Ok(())
}

fn open_dir(parent: &OwnedFd, name: &str) -> nix::Result<OwnedFd> {
    openat(parent, name, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
}

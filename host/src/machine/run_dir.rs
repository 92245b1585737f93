//! Run directories: one for each VM, private, gone with the VM, or swept at the next start.
//!
//! ```text
//!   PARENT/lock            held while a directory is made or swept, so that no sweep meets a half-made one
//!   PARENT/XXXXXXXX/lock   held by the host process for as long as it lives
//!   PARENT/XXXXXXXX/…      sockets, scratch
//! ```
//!
//! PARENT is for its owner alone, and so is everything in it. What is in one machine's directory is open to every user who
//! gets there: the machine's helpers, another user, see their directory and nothing else of PARENT.
//!
//! A kernel releases a killed process's locks, so a directory whose lock is free belongs to nobody.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::{
            fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    unistd::{Whence, lseek64},
};

const LOCK: &str = "lock";

/// A file, directory or socket of this host that a machine needs can't be used.
#[derive(Debug, thiserror::Error)]
#[error("can't {action} {}", .path.display())]
pub struct FileError {
    /// What was tried, as a verb: "open", "make a run directory in".
    pub action: &'static str,
    /// On which path.
    pub path: PathBuf,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

/// One VM's directory. Dropping it removes everything in it.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    _lock: Flock<File>,
}

impl RunDir {
    /// Makes a new, empty directory below `parent`, which must have been [swept](sweep) once.
    pub(crate) fn create(parent: &Path) -> Result<Self, FileError> {
        let _making = lock(&parent.join(LOCK))?;
        let path = tempfile::Builder::new()
            .prefix("")
            .rand_bytes(8)
            .permissions(Permissions::from_mode(0o777))
            .tempdir_in(parent)
            .map_err(failed("make a run directory in", parent))?
            .keep();
        // The umask has taken some.
        let opened = fs::set_permissions(&path, Permissions::from_mode(0o777));
        match opened.map_err(failed("open", &path)).and_then(|()| lock(&path.join(LOCK))) {
            Ok(lock) => Ok(Self { path, _lock: lock }),
            Err(error) => {
                let _ = fs::remove_dir_all(&path);
                Err(error)
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a directory in here.
    pub(crate) fn directory(&self, name: &str) -> Result<(), FileError> {
        let path = self.path.join(name);
        let made =
            DirBuilder::new().create(&path).and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o777)));
        made.map_err(failed("make", &path))
    }

    /// Binds a Unix socket in here. The path's length doesn't matter: the kernel sees one of a few bytes.
    pub(crate) fn bind(&self, name: &str) -> Result<UnixListener, FileError> {
        bind(&self.path, name).map_err(failed("bind a socket in", &self.path))
    }

    /// Makes `name`, and returns what copies a sparse `template` to it, holes left out, and lets it end at `size` bytes. That may
    /// run on while the run directory is removed.
    pub(crate) fn copy_sparse(
        &self,
        template: &Path,
        name: &str,
        size: u64,
    ) -> Result<impl FnOnce() -> Result<(), FileError> + Send + use<>, FileError> {
        let path = self.path.join(name);
        let from = File::open(template).map_err(failed("open", template))?;
        let to = OpenOptions::new().write(true).create_new(true).open(&path).map_err(failed("create", &path))?;
        Ok(move || {
            let opened = to.set_permissions(Permissions::from_mode(0o666));
            opened
                .and_then(|()| copy_data(&from, &to))
                .and_then(|()| to.set_len(size))
                .map_err(failed("copy the scratch template to", &path))
        })
    }
}

/// Binds a Unix socket in a run directory, see [`RunDir::bind`].
pub(crate) fn bind(run_dir: &Path, name: &str) -> io::Result<UnixListener> {
    let directory = File::open(run_dir)?;
    let path = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(path, Permissions::from_mode(0o777))?;
    Ok(listener)
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "can't remove a run directory; the next start will");
        }
    }
}

/// Makes `parent` if need be, for its owner alone, and removes every run directory in it that no process holds.
///
/// # Errors
///
/// `parent` can't be made or read, or a leftover can't be removed.
pub fn sweep(parent: &Path) -> Result<(), FileError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(parent)
        .map_err(failed("make the private directory", parent))?;
    // It may be from a time when others could enter it.
    fs::set_permissions(parent, Permissions::from_mode(0o700)).map_err(failed("make private", parent))?;
    let _sweeping = lock(&parent.join(LOCK))?;
    for entry in fs::read_dir(parent).map_err(failed("read", parent))? {
        let entry = entry.map_err(failed("read", parent))?;
        let path = entry.path();
        if !entry.file_type().map_err(failed("examine", &path))?.is_dir() {
            continue;
        }
        let file = match File::open(path.join(LOCK)) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(failed("open the lock in", &path)(source)),
        };
        let held = match file.map(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock)) {
            Some(Err((_, Errno::EWOULDBLOCK))) => true,
            Some(Err((_, errno))) => return Err(failed("lock", &path)(errno.into())),
            Some(Ok(_)) | None => false,
        };
        if !held {
            tracing::info!(path = %path.display(), "removing what a killed build left behind");
            match fs::remove_dir_all(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &path)(error)),
                _ => {}
            }
        }
    }
    Ok(())
}

fn lock(path: &Path) -> Result<Flock<File>, FileError> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed("open", path))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| failed("lock", path)(errno.into()))
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError + use<> {
    let path = path.to_owned();
    move |source| FileError { action, path, source }
}

/// Copies the data of `from` to the same places in `to`.
fn copy_data(from: &File, to: &File) -> io::Result<()> {
    let mut buffer = vec![0; 128 * 1024];
    let mut end = 0;
    loop {
        let start = match lseek64(from.as_fd(), end, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        end = lseek64(from.as_fd(), start, Whence::SeekHole)?;
        let mut at = u64::try_from(start).map_err(io::Error::other)?;
        let end = u64::try_from(end).map_err(io::Error::other)?;
        while at < end {
            let piece = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            let read = from.read_at(&mut buffer[..piece], at)?;
            if read == 0 {
                return Ok(());
            }
            to.write_all_at(&buffer[..read], at)?;
            at += read as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_run_directory_is_private_and_gone_afterwards() {
        let parent = tempfile::tempdir().unwrap();
        fs::set_permissions(parent.path(), Permissions::from_mode(0o755)).unwrap();
        sweep(parent.path()).unwrap();
        let run_dir = RunDir::create(parent.path()).unwrap();
        let path = run_dir.path().to_owned();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(parent.path()), mode(&path)), (0o700, 0o777));
        fs::write(path.join("scratch"), "x").unwrap();
        drop(run_dir);
        assert!(!path.exists());
    }

    #[test]
    fn a_sweep_takes_what_nobody_holds_and_leaves_the_rest() {
        let parent = tempfile::tempdir().unwrap();
        sweep(parent.path()).unwrap();
        let live = RunDir::create(parent.path()).unwrap();
        let dead_path = parent.path().join("dead");
        fs::create_dir(&dead_path).unwrap();
        fs::write(dead_path.join(LOCK), "").unwrap();
        fs::write(dead_path.join("scratch"), "x").unwrap();
        let half_made = parent.path().join("half");
        fs::create_dir(&half_made).unwrap();

        sweep(parent.path()).unwrap();
        assert!(live.path().exists());
        assert!(!dead_path.exists());
        assert!(!half_made.exists());
    }

    #[test]
    fn a_socket_can_be_bound_below_any_path() {
        let parent = tempfile::tempdir().unwrap();
        let deep = parent.path().join("d".repeat(120));
        sweep(&deep).unwrap();
        let run_dir = RunDir::create(&deep).unwrap();
        run_dir.bind("vs_1").unwrap();
        assert!(run_dir.path().join("vs_1").exists());
    }

    #[test]
    fn a_sparse_template_is_copied_with_its_holes() {
        let parent = tempfile::tempdir().unwrap();
        sweep(parent.path()).unwrap();
        let run_dir = RunDir::create(parent.path()).unwrap();
        let template = parent.path().join("template");
        let file = File::create(&template).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"middle", 33 << 20).unwrap();

        run_dir.copy_sparse(&template, "scratch", 128 << 20).unwrap()().unwrap();
        let copy = run_dir.path().join("scratch");
        let metadata = fs::metadata(&copy).unwrap();
        assert_eq!(metadata.len(), 128 << 20);
        assert!(metadata.blocks() * 512 < 1 << 20);
        let mut bytes = [0; 6];
        File::open(&copy).unwrap().read_exact_at(&mut bytes, 33 << 20).unwrap();
        assert_eq!(&bytes, b"middle");
    }
}

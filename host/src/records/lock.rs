use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Seek as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

use super::error::{RecordsError, Result, failed};

/// The file's name.
const LOCK: &str = "lock";

/// Most bytes of the file that are read.
const MAX_PID_BYTES: u64 = 16;

/// Exclusive use of a directory while this lives. The kernel releases the lock of a killed process.
#[derive(Debug)]
pub(super) struct Lock {
    _file: Flock<File>,
}

impl Lock {
    pub(super) fn take(dir: &Path) -> Result<Self> {
        let path = dir.join(LOCK);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(failed("open", &path))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut file) => {
                // The number is for people. A full disk must not keep the owner out.
                let _ =
                    file.set_len(0).and_then(|()| file.rewind()).and_then(|()| write!(file, "{}", std::process::id()));
                Ok(Self { _file: file })
            }
            Err((file, Errno::EWOULDBLOCK)) => {
                let mut text = String::new();
                // The owner may be writing its number at this moment.
                let pid = file.take(MAX_PID_BYTES).read_to_string(&mut text).ok().and_then(|_| text.parse().ok());
                Err(RecordsError::InUse { path: dir.to_owned(), pid })
            }
            Err((_, errno)) => Err(failed("lock", &path)(errno.into())),
        }
    }
}

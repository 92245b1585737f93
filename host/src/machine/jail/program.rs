//! What is to be started.

use std::ffi::OsString;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;

use super::view::View;

/// The number that the first descriptor handed down has in the child; the next ones follow.
pub(super) const FIRST_INHERITED: RawFd = 3;

/// A program to start through a [`Spawner`](super::Spawner): its name in messages, its path, its arguments and
/// descriptors. Everything else (environment, standard streams) is the same for all, see the module.
#[derive(Debug)]
pub struct Program {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) title: Option<OsString>,
    pub(super) args: Vec<OsString>,
    pub(super) working_dir: PathBuf,
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) view: Option<View>,
    pub(super) file_bytes: Option<u64>,
}

impl Program {
    /// `name` is for messages, `path` is not searched for in `PATH`, and `working_dir` is usually the run directory.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>, working_dir: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            title: None,
            args: Vec::new(),
            working_dir: working_dir.into(),
            descriptors: Vec::new(),
            view: None,
            file_bytes: None,
        }
    }

    /// What the host's list of processes calls it, instead of its path.
    #[must_use]
    pub fn title(mut self, title: impl Into<OsString>) -> Self {
        self.title = Some(title.into());
        self
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Hands a descriptor down; the first one arrives as number 3, the next as 4, and so on.
    #[must_use]
    pub fn descriptor(mut self, descriptor: impl Into<OwnedFd>) -> Self {
        self.descriptors.push(descriptor.into());
        self
    }

    /// Walls it in, as far as the spawner does that: it sees nothing else of the host's files.
    #[must_use]
    pub fn walled(mut self, view: View) -> Self {
        self.view = Some(view);
        self
    }

    /// No file that it writes gets longer, in bytes. Its shared memory counts as files.
    #[must_use]
    pub fn longest_file(mut self, bytes: u64) -> Self {
        self.file_bytes = Some(bytes);
        self
    }
}

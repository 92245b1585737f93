//! Distributes a tree to threads: listing a directory adds jobs for its files and its subdirectories.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use nix::{
    dir::{Dir, Type},
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, openat},
    sys::stat::{Mode, fstatat},
};
use parking_lot::{Condvar, Mutex};

use super::{
    ImportError, Kind, Lost, Options, SET_ID, UnsupportedKind,
    files::{Importer, as_path, read_symlink},
    read_error,
    tree::{Index, Tree},
};
use crate::{Directory, Node, PathComponent, Store};

/// Files in one job.
const BATCH: usize = 64;

enum Job {
    List { directory: Index, parent: Option<Arc<OwnedFd>>, name: PathBuf },
    Read { directory: Index, dir: Arc<OwnedFd>, files: Vec<PathComponent> },
}

struct State {
    jobs: Vec<Job>,
    tree: Tree,
    end: Option<Result<(), ImportError>>,
}

struct Work<'a> {
    store: &'a Store,
    root: &'a Path,
    options: &'a Options<'a>,
    lost: Mutex<Lost>,
    state: Mutex<State>,
    changed: Condvar,
}

/// Returns all directories of the tree at `root`, leaves first. The blobs are stored but not committed.
pub(super) fn run(
    store: &Store,
    root: &Path,
    threads: usize,
    options: &Options<'_>,
) -> Result<(Vec<Directory>, Lost), ImportError> {
    let first = Job::List { directory: 0, parent: None, name: root.to_owned() };
    let state = State { jobs: vec![first], tree: Tree::new(), end: None };
    let work = Work { store, root, options, lost: Mutex::default(), state: Mutex::new(state), changed: Condvar::new() };
    thread::scope(|scope| {
        for number in 1..threads {
            // If no thread can be started, this one does all jobs.
            let _ = thread::Builder::new().name(format!("import-{number}")).spawn_scoped(scope, || work.run_jobs());
        }
        work.run_jobs();
    });
    let (state, lost) = (work.state.into_inner(), work.lost.into_inner());
    match state.end {
        Some(Err(error)) => Err(error),
        Some(Ok(())) => Ok((state.tree.into_complete(), lost)),
        None => unreachable!("`run_jobs` returns only when the end is set"),
    }
}

/// Ends the other threads when one panics; the scope then propagates the panic.
struct EndOnPanic<'a>(&'a Work<'a>);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.end(Err(ImportError::Changed(self.0.root.to_owned())));
        }
    }
}

impl Work<'_> {
    fn run_jobs(&self) {
        let _guard = EndOnPanic(self);
        let mut importer = Importer::new(self.store, self.options.observe);
        while let Some(job) = self.next() {
            let outcome = match job {
                Job::List { directory, parent, name } => self.list(directory, parent.as_deref(), &name),
                Job::Read { directory, dir, files } => self.read(&mut importer, directory, &dir, &files),
            };
            match outcome {
                Ok(false) => {}
                Ok(true) => self.end(Ok(())),
                Err(error) => self.end(Err(error)),
            }
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.state.lock();
        loop {
            if state.end.is_some() {
                return None;
            }
            if let Some(job) = state.jobs.pop() {
                return Some(job);
            }
            self.changed.wait(&mut state);
        }
    }

    fn end(&self, outcome: Result<(), ImportError>) {
        self.state.lock().end.get_or_insert(outcome);
        self.changed.notify_all();
    }

    fn path(&self, directory: Index, name: &Path) -> PathBuf {
        self.state.lock().tree.path(self.root, directory).join(name)
    }

    /// `true` when the root is complete.
    fn list(&self, directory: Index, parent: Option<&OwnedFd>, name: &Path) -> Result<bool, ImportError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let here = |action, errno: Errno| read_error(&self.path(directory, Path::new("")), action, errno);
        let opened = match parent {
            Some(parent) => openat(parent, name, flags, Mode::empty()),
            None => openat(AT_FDCWD, name, flags, Mode::empty()),
        };
        let dir = Arc::new(opened.map_err(|errno| here("open the directory", errno))?);
        let listed = openat(&*dir, ".", flags, Mode::empty()).map_err(|errno| here("open the directory", errno))?;
        let mut listed = Dir::from_fd(listed).map_err(|errno| here("read the directory", errno))?;

        let mut links = Vec::new();
        let mut files = Vec::new();
        let mut directories = Vec::new();
        for entry in listed.iter() {
            let entry = entry.map_err(|errno| here("read the directory", errno))?;
            // Linux returns no names that castore refuses, except `.` and `..`.
            let Ok(name) = PathComponent::try_from(entry.file_name().to_bytes()) else { continue };
            let name_path = as_path(name.as_bytes());
            let kind = match entry.file_type() {
                Some(kind) => known_kind(kind),
                None => Kind::of(
                    &fstatat(&*dir, name_path, AtFlags::AT_SYMLINK_NOFOLLOW)
                        .map_err(|errno| read_error(&self.path(directory, name_path), "look at it", errno))?,
                ),
            };
            let is_directory = kind == Kind::Directory;
            if let Some(leave_out) = self.options.leave_out
                && leave_out(&self.path(directory, name_path), is_directory)
            {
                continue;
            }
            match kind {
                Kind::Directory => directories.push(name),
                Kind::File => files.push(name),
                Kind::Symlink => {
                    let node = read_symlink(&*dir, name_path, &self.path(directory, name_path))?;
                    links.push((name, node));
                }
                Kind::Unsupported(_) if self.options.without_devices => self.lost.lock().devices += 1,
                Kind::Unsupported(kind) => {
                    return Err(ImportError::Unsupported { path: self.path(directory, name_path), kind });
                }
            }
        }
        self.enqueue(directory, &dir, links, &files, directories)
    }

    fn enqueue(
        &self,
        directory: Index,
        dir: &Arc<OwnedFd>,
        links: Vec<(PathComponent, Node)>,
        files: &[PathComponent],
        directories: Vec<PathComponent>,
    ) -> Result<bool, ImportError> {
        let mut state = self.state.lock();
        let State { jobs, tree, .. } = &mut *state;
        for name in directories {
            let path = as_path(name.as_bytes()).to_owned();
            let index = tree.open(directory, name);
            jobs.push(Job::List { directory: index, parent: Some(dir.clone()), name: path });
        }
        // On top of the subdirectories, so that a directory is finished, and closed, before others are opened.
        for batch in files.chunks(BATCH) {
            jobs.push(Job::Read { directory, dir: dir.clone(), files: batch.to_vec() });
        }
        tree.add_missing_batches(directory, files.len().div_ceil(BATCH));
        self.changed.notify_all();
        self.add_nodes(&mut state, directory, links)
    }

    fn read(
        &self,
        importer: &mut Importer<'_>,
        directory: Index,
        dir: &OwnedFd,
        files: &[PathComponent],
    ) -> Result<bool, ImportError> {
        let above = self.path(directory, Path::new(""));
        let mut nodes = Vec::with_capacity(files.len());
        for name in files {
            let name_path = as_path(name.as_bytes());
            let (node, mode) = importer.import(dir, name_path, &above.join(name_path))?;
            if mode & SET_ID != 0 {
                self.lost.lock().set_id += 1;
            }
            nodes.push((name.clone(), node));
        }
        self.add_nodes(&mut self.state.lock(), directory, nodes)
    }

    fn add_nodes(
        &self,
        state: &mut State,
        directory: Index,
        nodes: Vec<(PathComponent, Node)>,
    ) -> Result<bool, ImportError> {
        state.tree.add_nodes(directory, nodes).map_err(|_| {
            // A name came twice: the directory changed while it was listed.
            ImportError::Changed(state.tree.path(self.root, directory))
        })
    }
}

fn known_kind(kind: Type) -> Kind {
    match kind {
        Type::Directory => Kind::Directory,
        Type::File => Kind::File,
        Type::Symlink => Kind::Symlink,
        Type::Fifo => Kind::Unsupported(UnsupportedKind::Fifo),
        Type::Socket => Kind::Unsupported(UnsupportedKind::Socket),
        Type::BlockDevice => Kind::Unsupported(UnsupportedKind::BlockDevice),
        Type::CharacterDevice => Kind::Unsupported(UnsupportedKind::CharacterDevice),
    }
}

//! What the build's root is made of, as a pure function of the specification and of the inputs' shape.
//!
//! The root is a stack of areas. An area is a mount at a path; its front is a directory of our own that it shows,
//! and its lower, where the inputs have a directory at that path, is what shines through from below:
//!
//! ```text
//!               no lower                   lower
//!   read-only   bind of a tmpfs directory  overlay [tmpfs directory : inputs], read-only
//!   writable    bind of a disk directory   overlay, upper = disk directory, lower = inputs
//! ```
//!
//! Everything that must exist at a path (mount points of further areas, scratch paths below a writable area, files)
//! is put into the front of the innermost area around that path. Symlinks of the inputs are followed, within the
//! root, before anything is placed, so that a scratch path `tmp` over inputs with `tmp -> var/tmp` is `var/tmp`.

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::OsString,
    io,
    path::{Component, Path, PathBuf},
};

use cofferdam_protocol::{HostPath, Specification, Step};

use crate::error::{SetupError, is_wrong_place};

/// Most symlinks on the way to one path, as in Linux.
const MAX_SYMLINKS: usize = 40;

/// What the inputs have at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    Symlink(PathBuf),
    /// A regular file.
    File,
    Missing,
}

/// Who owns what is placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// User and group 0.
    Machine,
    /// The build's user and group.
    Build,
}

/// A mount that shows a front, over a lower where there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Area {
    /// Where it is mounted, relative to the build's root, free of symlinks.
    pub(crate) at: PathBuf,
    /// What is mounted.
    pub(crate) content: Content,
}

/// What an area shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// A front of our own.
    Front {
        /// On the scratch disk, else on a tmpfs and read-only.
        writable: bool,
        /// Open to everyone, as `/tmp` is.
        shared: bool,
        /// The directory of the inputs, relative to their root, that shines through.
        lower: Option<PathBuf>,
    },
    /// The device nodes.
    Devices,
    /// The processes.
    Processes,
    /// A path of the host.
    Host {
        /// Its name in the share.
        number: usize,
        /// Else it is a file.
        is_directory: bool,
    },
}

/// A directory to make in the front of an area, with its parents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Directory {
    /// Index into [`Plan::areas`].
    pub(crate) area: usize,
    /// Relative to the area.
    pub(crate) path: PathBuf,
    pub(crate) owner: Owner,
    /// Open to everyone, as `/tmp` is.
    pub(crate) shared: bool,
}

/// A file to make in the front of an area, with its parents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placement<'a> {
    /// Index into [`Plan::areas`].
    pub(crate) area: usize,
    /// Relative to the area.
    pub(crate) path: PathBuf,
    pub(crate) owner: Owner,
    pub(crate) source: Source<'a>,
}

/// Where a placed file comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source<'a> {
    /// One of the request's `additional_files`, as the request names it.
    Request { name: &'a str, contents: &'a [u8] },
    /// What every build finds unless its inputs or its request bring their own.
    Machine(&'static str),
    /// The shell.
    Shell,
}

/// How to assemble the build's root.
#[derive(Debug, Default)]
pub(crate) struct Plan<'a> {
    /// In the order in which they are mounted; the first is the root.
    pub(crate) areas: Vec<Area>,
    /// In the order in which they are made.
    pub(crate) directories: Vec<Directory>,
    /// In the order in which they are made; the first of two at one place counts.
    pub(crate) files: Vec<Placement<'a>>,
}

/// Files of the machine's own.
const MACHINE_FILES: [(&str, &str); 3] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/build:/noshell\n\
         nixbld:x:1000:100:build user:/build:/noshell\n\
         nobody:x:65534:65534:nobody:/:/noshell\n",
    ),
    ("etc/group", "root:x:0:\nnixbld:x:100:\nnogroup:x:65534:\n"),
    ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
];

/// What is wanted at one path.
#[derive(Debug, Default)]
struct Wish {
    inputs: bool,
    writable: bool,
    shared: bool,
    machine: Option<Content>,
    /// The request asks for it.
    requested: bool,
    /// For messages.
    name: String,
}

impl<'a> Plan<'a> {
    /// Plans the root; `inputs` tells what the inputs have at a path relative to their own root, symlinks unfollowed.
    pub(crate) fn new(
        specification: &'a Specification,
        inputs: &dyn Fn(&Path) -> io::Result<Kind>,
    ) -> Result<Self, SetupError> {
        let resolver = Resolver { inputs_dir: Path::new(&specification.inputs_dir), inputs };
        let mut plan = Plan::default();
        for (path, wish) in wishes(specification, &resolver)? {
            plan.fulfil(path, wish, &resolver)?;
        }
        plan.add_working_dir(&specification.working_dir, &resolver)?;
        for (name, contents) in &specification.additional_files {
            plan.add_requested_file(name, contents, &resolver)?;
        }
        for (path, contents) in MACHINE_FILES {
            // Whatever the inputs have there, or on the way there, stays.
            if let Ok((path, Kind::Missing)) = resolver.resolve(path) {
                plan.add_machine_file(&path, Source::Machine(contents));
            }
        }
        if specification.provide_bin_sh {
            plan.add_shell(&resolver)?;
        }
        Ok(plan)
    }

    /// Where the processes are shown, relative to the build's root.
    pub(crate) fn processes(&self) -> Option<&Path> {
        self.areas.iter().find(|area| area.content == Content::Processes).map(|area| area.at.as_path())
    }

    /// Nothing is put into the area's front.
    pub(crate) fn is_bare(&self, area: usize) -> bool {
        self.directories.iter().all(|directory| directory.area != area)
            && self.files.iter().all(|file| file.area != area)
    }

    /// Wishes come in the order of their paths, so the areas around this one are already known.
    fn fulfil(&mut self, at: PathBuf, wish: Wish, resolver: &Resolver<'_>) -> Result<(), SetupError> {
        let around = self.innermost(&at);
        if let Some((around, path)) = &around {
            let Content::Front { writable, .. } = self.areas[*around].content else {
                let at = self.areas[*around].at.display();
                return Err(refusal(Step::Places, format!("use {}: /{at} is the machine's own", wish.name)));
            };
            let owner = if writable { Owner::Build } else { Owner::Machine };
            let shared = wish.shared && writable;
            let (area, path) = (*around, path.clone());
            if matches!(wish.machine, Some(Content::Host { is_directory: false, .. })) {
                self.files.push(Placement { area, path, owner, source: Source::Machine("") });
            } else {
                self.directories.push(Directory { area, path, owner, shared });
            }
            if writable && wish.writable && !wish.inputs && wish.machine.is_none() {
                return Ok(());
            }
        }
        let content = match wish.machine {
            Some(content) => content,
            None => Content::Front {
                writable: wish.writable,
                shared: wish.shared,
                lower: resolver.lower(&at).map_err(|source| failure(Step::Places, &wish.name, source))?,
            },
        };
        self.areas.push(Area { at, content });
        Ok(())
    }

    /// A working directory below a scratch path need not be a scratch path itself.
    fn add_working_dir(&mut self, name: &str, resolver: &Resolver<'_>) -> Result<(), SetupError> {
        // One that can't be resolved can't be entered either; the command's own chdir finds out and is reported.
        let Ok((path, Kind::Missing)) = resolver.resolve(name) else { return Ok(()) };
        if let Some((area, path)) = self.innermost(&path)
            && let Content::Front { writable: true, .. } = self.areas[area].content
        {
            self.directories.push(Directory { area, path, owner: Owner::Build, shared: false });
        }
        Ok(())
    }

    fn add_requested_file(
        &mut self,
        name: &'a str,
        contents: &'a [u8],
        resolver: &Resolver<'_>,
    ) -> Result<(), SetupError> {
        let step = Step::AdditionalFiles;
        let (path, kind) =
            resolver.resolve(name).map_err(|source| failure(step, &format!("additional file {name:?}"), source))?;
        if kind == Kind::Directory {
            let source = io::Error::from_raw_os_error(libc::EISDIR);
            return Err(failure(step, &format!("additional file {name:?}"), source));
        }
        let place = self.innermost(&path).map(|(area, path)| (area, path, &self.areas[area]));
        let Some((area, path, Area { content: Content::Front { writable, .. }, .. })) = place else {
            return Err(refusal(step, format!("place additional file {name:?} among the machine's own")));
        };
        let owner = if *writable { Owner::Build } else { Owner::Machine };
        self.files.push(Placement { area, path, owner, source: Source::Request { name, contents } });
        Ok(())
    }

    /// A shell, unless the inputs have their own.
    fn add_shell(&mut self, resolver: &Resolver<'_>) -> Result<(), SetupError> {
        match resolver.resolve("bin/sh") {
            Ok((path, Kind::Missing)) => self.add_machine_file(&path, Source::Shell),
            Ok((_, Kind::Directory)) => {
                return Err(failure(Step::Places, "/bin/sh", io::Error::from_raw_os_error(libc::EISDIR)));
            }
            Ok(_) => {}
            Err(source) => return Err(failure(Step::Places, "/bin/sh", source)),
        }
        Ok(())
    }

    fn add_machine_file(&mut self, path: &Path, source: Source<'static>) {
        if let Some((area, path)) = self.innermost(path)
            && let Content::Front { .. } = self.areas[area].content
        {
            self.files.push(Placement { area, path, owner: Owner::Machine, source });
        }
    }

    /// The innermost area around a path, and the path relative to it.
    fn innermost(&self, path: &Path) -> Option<(usize, PathBuf)> {
        let within = |(index, area): (usize, &Area)| Some((index, path.strip_prefix(&area.at).ok()?.to_path_buf()));
        self.areas.iter().enumerate().filter_map(within).min_by_key(|(_, rest)| rest.components().count())
    }
}

type Wishes = BTreeMap<PathBuf, Wish>;

/// Everything that must be a mount or a directory, by resolved path; parents sort before what is in them.
fn wishes(specification: &Specification, resolver: &Resolver<'_>) -> Result<Wishes, SetupError> {
    let mut wishes = Wishes::new();
    wish(&mut wishes, resolver, "", "the root".to_owned())?;
    wish(&mut wishes, resolver, "proc", "/proc".to_owned())?.machine = Some(Content::Processes);
    wish(&mut wishes, resolver, "dev", "/dev".to_owned())?.machine = Some(Content::Devices);
    let tmp = wish(&mut wishes, resolver, "tmp", "/tmp".to_owned())?;
    tmp.writable = true;
    tmp.shared = true;
    let inputs_dir = &specification.inputs_dir;
    let inputs = wish(&mut wishes, resolver, inputs_dir, format!("inputs_dir {inputs_dir:?}"))?;
    inputs.inputs = true;
    inputs.requested = true;
    for path in &specification.scratch_paths {
        let scratch = wish(&mut wishes, resolver, path, format!("scratch path {path:?}"))?;
        scratch.writable = true;
        scratch.requested = true;
    }
    if let Some(wish) = wishes.values().find(|wish| wish.machine.is_some() && wish.requested) {
        return Err(refusal(Step::Places, format!("use {}: the machine has its own there", wish.name)));
    }
    for (number, HostPath { path, is_directory }) in specification.host_paths.iter().enumerate() {
        let name = format!("the host's path \"/{path}\"");
        if let Some(other) = wishes.get(&resolver.directory(path, &name)?) {
            return Err(refusal(Step::Places, format!("show {name}: {} is there", other.name)));
        }
        wish(&mut wishes, resolver, path, name)?.machine = Some(Content::Host { number, is_directory: *is_directory });
    }
    Ok(wishes)
}

fn wish<'w>(
    wishes: &'w mut Wishes,
    resolver: &Resolver<'_>,
    path: &str,
    name: String,
) -> Result<&'w mut Wish, SetupError> {
    let wish = wishes.entry(resolver.directory(path, &name)?).or_default();
    wish.name = name;
    Ok(wish)
}

/// Walks paths through the inputs' symlinks, never out of the build's root.
struct Resolver<'a> {
    inputs_dir: &'a Path,
    inputs: &'a dyn Fn(&Path) -> io::Result<Kind>,
}

impl Resolver<'_> {
    /// The place that a path leads to, and what the inputs have there.
    fn resolve(&self, path: impl AsRef<Path>) -> io::Result<(PathBuf, Kind)> {
        let mut place = PathBuf::new();
        let mut kind = Kind::Directory;
        let mut rest: VecDeque<OsString> = components(path.as_ref()).collect();
        let mut followed = 0;
        while let Some(name) = rest.pop_front() {
            if kind == Kind::File {
                return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
            }
            if name == ".." {
                place.pop();
                kind = self.kind(&place)?;
                continue;
            }
            place.push(name);
            kind = self.kind(&place)?;
            if let Kind::Symlink(target) = &kind {
                followed += 1;
                if followed > MAX_SYMLINKS {
                    return Err(io::Error::from_raw_os_error(libc::ELOOP));
                }
                place = if target.is_absolute() { PathBuf::new() } else { parent(place) };
                for name in components(target).collect::<Vec<_>>().into_iter().rev() {
                    rest.push_front(name);
                }
                kind = Kind::Directory;
            }
        }
        Ok((place, kind))
    }

    /// A place where a directory can be.
    fn directory(&self, path: &str, name: &str) -> Result<PathBuf, SetupError> {
        match self.resolve(path) {
            Ok((place, Kind::Directory | Kind::Missing)) => Ok(place),
            Ok(_) => Err(failure(Step::Places, name, io::Error::from_raw_os_error(libc::ENOTDIR))),
            Err(source) => Err(failure(Step::Places, name, source)),
        }
    }

    /// The directory of the inputs that belongs to a place.
    fn lower(&self, place: &Path) -> io::Result<Option<PathBuf>> {
        match place.strip_prefix(self.inputs_dir) {
            Ok(path) if self.kind(place)? == Kind::Directory => Ok(Some(path.to_path_buf())),
            _ => Ok(None),
        }
    }

    fn kind(&self, place: &Path) -> io::Result<Kind> {
        match place.strip_prefix(self.inputs_dir) {
            Ok(path) if path.as_os_str().is_empty() => Ok(Kind::Directory),
            Ok(path) => (self.inputs)(path),
            Err(_) if self.inputs_dir.starts_with(place) => Ok(Kind::Directory),
            Err(_) => Ok(Kind::Missing),
        }
    }
}

fn parent(mut path: PathBuf) -> PathBuf {
    path.pop();
    path
}

fn components(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    })
}

/// What is no fault of the request's is one of whoever serves the inputs.
fn failure(step: Step, name: &str, source: io::Error) -> SetupError {
    let step = if is_wrong_place(&source) { step } else { Step::Inputs };
    SetupError { step, action: format!("make room for {name} over the inputs"), source }
}

fn refusal(step: Step, action: String) -> SetupError {
    SetupError { step, action, source: io::Error::from_raw_os_error(libc::EBUSY) }
}

impl Kind {
    /// From what `lstat` and `readlink` say.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        match std::fs::symlink_metadata(path) {
            Ok(metadata) if metadata.is_dir() => Ok(Self::Directory),
            Ok(metadata) if metadata.is_symlink() => Ok(Self::Symlink(std::fs::read_link(path)?)),
            Ok(_) => Ok(Self::File),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::Missing),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests;

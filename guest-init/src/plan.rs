//! Decides what the build's root consists of: a pure function of the specification and of the inputs' directories.
//!
//! The root is a set of mounts. Most of them have an *upper* layer, a new directory. Those at a directory of the inputs
//! have that directory as their *lower* layer:
//!
//! ```text
//!               without lower layer                with lower layer
//!   read-only   bind mount of a tmpfs directory    overlay [tmpfs directory : inputs], read-only
//!   writable    bind mount of a scratch directory  overlay, upper = scratch directory, lower = inputs
//! ```
//!
//! Mount points, files and scratch paths inside a writable mount are made in the upper layer of the innermost mount
//! around them. All paths follow the inputs' symlinks first, but never out of the root: a scratch path `tmp` over inputs
//! with `tmp -> var/tmp` is `var/tmp`.

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::OsString,
    io,
    path::{Component, Path, PathBuf},
};

use cofferdam_protocol::{HostPath, SECRETS_DIR, Specification, Step};

use crate::error::{SetupError, is_path_error};

/// Limit on the symlinks followed in one path, the same as Linux's.
const MAX_SYMLINKS: usize = 40;

/// The kind of the inputs' entry at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    Symlink(PathBuf),
    /// A regular file.
    File,
    Missing,
}

/// The owner of a directory or file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// User and group 0.
    Root,
    /// The build's user and group.
    Build,
}

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// The mount point, relative to the build's root, with all symlinks followed.
    pub(crate) at: PathBuf,
    pub(crate) content: Content,
}

/// The contents of a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// An upper layer, and perhaps a lower one.
    Layers {
        /// Whether the upper layer is on the scratch disk. If not, it is on a tmpfs, and read-only.
        writable: bool,
        /// Whether every user can write there, as in `/tmp`.
        shared: bool,
        /// The lower layer: a directory of the inputs, relative to their root.
        lower: Option<PathBuf>,
    },
    /// A tmpfs with device nodes.
    Devices,
    /// The procfs of the build's PID namespace.
    Proc,
    /// The sysfs of the build's network namespace, read-only.
    Sys,
    /// A tmpfs with the secrets, read-only.
    Secrets,
    /// A host path.
    HostPath {
        /// Its name in the virtiofs device of the host paths.
        number: usize,
        /// Whether it is a directory or a file.
        is_directory: bool,
    },
}

/// A directory to make in the upper layer of a mount, with its parents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Directory {
    /// Index into [`Plan::mounts`].
    pub(crate) mount: usize,
    /// Relative to the mount point.
    pub(crate) path: PathBuf,
    pub(crate) owner: Owner,
    /// Whether every user can write there, as in `/tmp`.
    pub(crate) shared: bool,
}

/// A file to make in the upper layer of a mount, with its parents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NewFile<'a> {
    /// Index into [`Plan::mounts`].
    pub(crate) mount: usize,
    /// Relative to the mount point.
    pub(crate) path: PathBuf,
    pub(crate) owner: Owner,
    pub(crate) source: Source<'a>,
}

/// The contents of a new file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source<'a> {
    /// One of the request's `additional_files`.
    Request { name: &'a str, contents: &'a [u8] },
    /// A file of the host's. Files of the request take precedence, and so do those of the inputs, except over `ca_file`.
    Default(&'a [u8]),
    /// The static shell.
    Shell,
}

/// How to assemble the build's root.
#[derive(Debug, Default)]
pub(crate) struct Plan<'a> {
    /// In the order of mounting; the first is the root.
    pub(crate) mounts: Vec<Mount>,
    /// In the order of making.
    pub(crate) directories: Vec<Directory>,
    /// In the order of making. Of two files with one path, the first wins.
    pub(crate) files: Vec<NewFile<'a>>,
}

/// Paths and contents of the files that every build has.
const DEFAULT_FILES: [(&str, &str); 3] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/build:/noshell\n\
         nixbld:x:1000:100:build user:/build:/noshell\n\
         nobody:x:65534:65534:nobody:/:/noshell\n",
    ),
    ("etc/group", "root:x:0:\nnixbld:x:100:\nnogroup:x:65534:\n"),
    ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
];

/// Where the programs of most distributions look for CA certificates.
const CA_FILE: &str = "etc/ssl/certs/ca-certificates.crt";

/// The file of builds with a network that says who answers DNS queries: [`GATEWAY_IPV4`](cofferdam_protocol::network::GATEWAY_IPV4).
const RESOLV_CONF: &str = "nameserver 192.0.0.1\n";

/// The requirements for one path.
#[derive(Debug, Default)]
struct Claim {
    /// The path is `inputs_dir`.
    inputs: bool,
    writable: bool,
    shared: bool,
    /// Anything but layers.
    special: Option<Content>,
    /// The path is in the request.
    requested: bool,
    /// The path's name in error messages.
    name: String,
}

impl<'a> Plan<'a> {
    /// Plans the root. `inputs` returns what the inputs have at a path, relative to their root, and follows no symlinks.
    pub(crate) fn new(
        specification: &'a Specification,
        inputs: &dyn Fn(&Path) -> io::Result<Kind>,
    ) -> Result<Self, SetupError> {
        let resolver = Resolver { inputs_dir: Path::new(&specification.inputs_dir), inputs };
        let mut plan = Plan::default();
        for (path, claim) in claims(specification, &resolver)? {
            plan.add_mount(path, claim, &resolver)?;
        }
        plan.add_working_dir(&specification.working_dir, &resolver);
        for (name, contents) in &specification.additional_files {
            plan.add_requested_file(name, contents, &resolver)?;
        }
        if let Some(contents) = &specification.ca_file
            && let Ok((path, Kind::Missing | Kind::File)) = resolver.resolve(CA_FILE)
        {
            plan.add_own_file(&path, Source::Default(contents));
        }
        let resolv_conf = specification.network.then_some(("etc/resolv.conf", RESOLV_CONF));
        for (path, contents) in DEFAULT_FILES.into_iter().chain(resolv_conf) {
            // The inputs take precedence, even if their path can't be resolved.
            if let Ok((path, Kind::Missing)) = resolver.resolve(path) {
                plan.add_own_file(&path, Source::Default(contents.as_bytes()));
            }
        }
        if specification.provide_bin_sh {
            plan.add_shell(&resolver)?;
        }
        Ok(plan)
    }

    /// Mount point of the only mount with this content, relative to the build's root.
    pub(crate) fn mount_point(&self, content: &Content) -> Option<&Path> {
        self.mounts.iter().find(|mount| mount.content == *content).map(|mount| mount.at.as_path())
    }

    /// Whether nothing is made in the mount's upper layer.
    pub(crate) fn has_empty_upper(&self, mount: usize) -> bool {
        self.directories.iter().all(|directory| directory.mount != mount)
            && self.files.iter().all(|file| file.mount != mount)
    }

    /// Adds a mount, or a directory in a writable mount where that is enough. Claims come in the order of their paths,
    /// so the mounts around this one are known.
    fn add_mount(&mut self, at: PathBuf, claim: Claim, resolver: &Resolver<'_>) -> Result<(), SetupError> {
        if let Some((mount, path)) = self.innermost(&at) {
            let Content::Layers { writable, .. } = self.mounts[mount].content else {
                let reserved = self.mounts[mount].at.display();
                return Err(conflict(Step::Places, format!("use {}: /{reserved} is reserved", claim.name)));
            };
            let owner = if writable { Owner::Build } else { Owner::Root };
            let shared = claim.shared && writable;
            if matches!(claim.special, Some(Content::HostPath { is_directory: false, .. })) {
                self.files.push(NewFile { mount, path, owner, source: Source::Default(b"") });
            } else {
                self.directories.push(Directory { mount, path, owner, shared });
            }
            if writable && claim.writable && !claim.inputs && claim.special.is_none() {
                return Ok(());
            }
        }
        let content = match claim.special {
            Some(content) => content,
            None => Content::Layers {
                writable: claim.writable,
                shared: claim.shared,
                lower: resolver.lower(&at).map_err(|source| path_error(Step::Places, &claim.name, source))?,
            },
        };
        self.mounts.push(Mount { at, content });
        Ok(())
    }

    /// Makes the working directory if it is in a writable mount.
    fn add_working_dir(&mut self, name: &str, resolver: &Resolver<'_>) {
        // A path that can't be resolved can't be entered either: the command's chdir fails and is reported.
        if let Ok((path, Kind::Missing)) = resolver.resolve(name)
            && let Some((mount, path)) = self.innermost(&path)
            && let Content::Layers { writable: true, .. } = self.mounts[mount].content
        {
            self.directories.push(Directory { mount, path, owner: Owner::Build, shared: false });
        }
    }

    fn add_requested_file(
        &mut self,
        name: &'a str,
        contents: &'a [u8],
        resolver: &Resolver<'_>,
    ) -> Result<(), SetupError> {
        let step = Step::AdditionalFiles;
        let failed = |source| path_error(step, &format!("additional file {name:?}"), source);
        let (path, kind) = resolver.resolve(name).map_err(failed)?;
        if kind == Kind::Directory {
            return Err(failed(io::Error::from_raw_os_error(libc::EISDIR)));
        }
        let place = self.innermost(&path).map(|(mount, path)| (mount, path, &self.mounts[mount].content));
        let Some((mount, path, Content::Layers { writable, .. })) = place else {
            return Err(conflict(step, format!("make additional file {name:?} in a reserved directory")));
        };
        let owner = if *writable { Owner::Build } else { Owner::Root };
        self.files.push(NewFile { mount, path, owner, source: Source::Request { name, contents } });
        Ok(())
    }

    /// Adds `/bin/sh`, unless the inputs have one.
    fn add_shell(&mut self, resolver: &Resolver<'_>) -> Result<(), SetupError> {
        match resolver.resolve("bin/sh") {
            Ok((path, Kind::Missing)) => self.add_own_file(&path, Source::Shell),
            Ok((_, Kind::Directory)) => {
                return Err(path_error(Step::Places, "/bin/sh", io::Error::from_raw_os_error(libc::EISDIR)));
            }
            Ok(_) => {}
            Err(source) => return Err(path_error(Step::Places, "/bin/sh", source)),
        }
        Ok(())
    }

    fn add_own_file(&mut self, path: &Path, source: Source<'a>) {
        if let Some((mount, path)) = self.innermost(path)
            && let Content::Layers { .. } = self.mounts[mount].content
        {
            self.files.push(NewFile { mount, path, owner: Owner::Root, source });
        }
    }

    /// The innermost mount around a path, and the path relative to it.
    fn innermost(&self, path: &Path) -> Option<(usize, PathBuf)> {
        let within = |(index, mount): (usize, &Mount)| Some((index, path.strip_prefix(&mount.at).ok()?.to_path_buf()));
        self.mounts.iter().enumerate().filter_map(within).min_by_key(|(_, rest)| rest.components().count())
    }
}

/// Claims by resolved path. A directory sorts before everything in it.
type Claims = BTreeMap<PathBuf, Claim>;

/// The paths that must be mounts or directories.
fn claims(specification: &Specification, resolver: &Resolver<'_>) -> Result<Claims, SetupError> {
    let mut claims = Claims::new();
    claim(&mut claims, resolver, "", "the root".to_owned())?;
    claim(&mut claims, resolver, "proc", "/proc".to_owned())?.special = Some(Content::Proc);
    claim(&mut claims, resolver, "sys", "/sys".to_owned())?.special = Some(Content::Sys);
    claim(&mut claims, resolver, "dev", "/dev".to_owned())?.special = Some(Content::Devices);
    if !specification.secrets.is_empty() {
        claim(&mut claims, resolver, SECRETS_DIR, format!("/{SECRETS_DIR}"))?.special = Some(Content::Secrets);
    }
    let tmp = claim(&mut claims, resolver, "tmp", "/tmp".to_owned())?;
    tmp.writable = true;
    tmp.shared = true;
    let inputs_dir = &specification.inputs_dir;
    let inputs = claim(&mut claims, resolver, inputs_dir, format!("inputs_dir {inputs_dir:?}"))?;
    inputs.inputs = true;
    inputs.requested = true;
    for path in &specification.scratch_paths {
        let scratch = claim(&mut claims, resolver, path, format!("scratch path {path:?}"))?;
        scratch.writable = true;
        scratch.requested = true;
    }
    if let Some(claim) = claims.values().find(|claim| claim.special.is_some() && claim.requested) {
        return Err(conflict(Step::Places, format!("use {}: it is reserved", claim.name)));
    }
    for (number, HostPath { path, is_directory }) in specification.host_paths.iter().enumerate() {
        let name = format!("host path \"/{path}\"");
        if let Some(other) = claims.get(&resolver.directory(path, &name)?) {
            return Err(conflict(Step::Places, format!("mount {name}: {} is already there", other.name)));
        }
        let is_directory = *is_directory;
        claim(&mut claims, resolver, path, name)?.special = Some(Content::HostPath { number, is_directory });
    }
    Ok(claims)
}

fn claim<'c>(
    claims: &'c mut Claims,
    resolver: &Resolver<'_>,
    path: &str,
    name: String,
) -> Result<&'c mut Claim, SetupError> {
    let claim = claims.entry(resolver.directory(path, &name)?).or_default();
    claim.name = name;
    Ok(claim)
}

/// Follows the inputs' symlinks, but never out of the build's root.
struct Resolver<'a> {
    inputs_dir: &'a Path,
    inputs: &'a dyn Fn(&Path) -> io::Result<Kind>,
}

impl Resolver<'_> {
    /// The path with all symlinks followed, and what the inputs have there.
    fn resolve(&self, path: impl AsRef<Path>) -> io::Result<(PathBuf, Kind)> {
        let mut resolved = PathBuf::new();
        let mut kind = Kind::Directory;
        let mut rest: VecDeque<OsString> = components(path.as_ref()).collect();
        let mut followed = 0;
        while let Some(name) = rest.pop_front() {
            if kind == Kind::File {
                return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
            }
            if name == ".." {
                resolved.pop();
                kind = self.kind(&resolved)?;
                continue;
            }
            resolved.push(name);
            kind = self.kind(&resolved)?;
            if let Kind::Symlink(target) = &kind {
                followed += 1;
                if followed > MAX_SYMLINKS {
                    return Err(io::Error::from_raw_os_error(libc::ELOOP));
                }
                if target.is_absolute() {
                    resolved.clear();
                } else {
                    resolved.pop();
                }
                for name in components(target).collect::<Vec<_>>().into_iter().rev() {
                    rest.push_front(name);
                }
                kind = Kind::Directory;
            }
        }
        Ok((resolved, kind))
    }

    /// Resolves a path where the inputs have a directory or nothing.
    fn directory(&self, path: &str, name: &str) -> Result<PathBuf, SetupError> {
        match self.resolve(path) {
            Ok((resolved, Kind::Directory | Kind::Missing)) => Ok(resolved),
            Ok(_) => Err(path_error(Step::Places, name, io::Error::from_raw_os_error(libc::ENOTDIR))),
            Err(source) => Err(path_error(Step::Places, name, source)),
        }
    }

    /// The inputs' directory at a resolved path, relative to the inputs' root.
    fn lower(&self, resolved: &Path) -> io::Result<Option<PathBuf>> {
        match resolved.strip_prefix(self.inputs_dir) {
            Ok(path) if self.kind(resolved)? == Kind::Directory => Ok(Some(path.to_path_buf())),
            _ => Ok(None),
        }
    }

    fn kind(&self, resolved: &Path) -> io::Result<Kind> {
        match resolved.strip_prefix(self.inputs_dir) {
            Ok(path) if path.as_os_str().is_empty() => Ok(Kind::Directory),
            Ok(path) => (self.inputs)(path),
            Err(_) if self.inputs_dir.starts_with(resolved) => Ok(Kind::Directory),
            Err(_) => Ok(Kind::Missing),
        }
    }
}

fn components(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    })
}

/// An error at a path of the inputs. Unless the request's path caused it, the device that serves the inputs did.
fn path_error(step: Step, name: &str, source: io::Error) -> SetupError {
    let step = if is_path_error(&source) { step } else { Step::Inputs };
    SetupError { step, action: format!("make {name} over the inputs"), source }
}

fn conflict(step: Step, action: String) -> SetupError {
    SetupError { step, action, source: io::Error::from_raw_os_error(libc::EBUSY) }
}

impl Kind {
    /// Looks at a path, and follows no symlink at its end.
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

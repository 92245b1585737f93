//! The image's directory. [`Image::open`] opens it to boot a guest; [`ensure`] makes or updates it.
//!
//! ```text
//!   OUT ─▶ OUT.versions/XXXXXXXX/kernel, initramfs, scratch.ext4     OUT is a link, replaced by one rename
//!                                made-from                           has a shared lock for every open Image
//!   OUT.lock                                                         locked while an image is made
//! ```
//!
//! An [`Image`] has the paths of one version, so its files belong together even if the image is replaced meanwhile. Old
//! versions are deleted when the next one is made, unless they are open.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::bzimage::{self, BzImageError};
use crate::command::CommandError;
use crate::debian::{Debian, DebianError, Package};
use crate::prebuilt::{self, PrebuiltError};
use crate::scratch::{self, ScratchError};
use crate::{cache_dir, default_dir, guest_init, initramfs, minimal};

/// Must be increased when the same inputs shall produce a different image.
const LAYOUT: u32 = 4;

const KERNEL: &str = "kernel";
const INITRAMFS: &str = "initramfs";
const SCRATCH: &str = "scratch.ext4";
const MADE_FROM: &str = "made-from";

/// The files of an image, in the order of deletion. `made-from` is last, because it marks a directory as an image.
const FILES: [&str; 4] = [KERNEL, INITRAMFS, SCRATCH, MADE_FROM];

/// Limit on symlinks followed in a row, the same as Linux's.
const MAX_LINKS: usize = 40;

/// The package with the static shell, and the shell's possible paths in it.
const SHELL_PACKAGE: &str = "busybox-static";
const SHELL_PATHS: [&str; 2] = ["bin/busybox", "usr/bin/busybox"];

/// The files that a guest boots from. They stay unchanged until this and all its clones are dropped.
#[derive(Debug, Clone)]
pub struct Image {
    /// An ELF kernel with PVH entry, or a bzImage.
    pub kernel: PathBuf,
    /// A newc archive.
    pub initramfs: PathBuf,
    /// A small ext4 file system without a journal. A scratch disk is a copy of it, extended to the disk's size.
    pub scratch: PathBuf,
    /// Keeps [`ensure`] from deleting the files. `None` if they have no `made-from`, as in an image made by hand.
    _lock: Option<Arc<VersionLock>>,
}

/// A shared lock on a version. It is unlocked explicitly, because a child process that is just being started may have a
/// copy of the descriptor.
#[derive(Debug)]
struct VersionLock(File);

impl Drop for VersionLock {
    fn drop(&mut self) {
        // If this fails, closing the file unlocks it.
        let _ = self.0.unlock();
    }
}

/// Why an image can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file of the image is missing.
    #[error("the guest image lacks {}; `just image` makes it, COFFERDAM_IMAGE names another directory", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file of the image can't be read.
    #[error("the guest image's {} can't be used", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

impl Image {
    /// Opens the image in `dir`.
    ///
    /// # Errors
    ///
    /// A file is missing or can't be used.
    pub fn open(dir: &Path) -> Result<Self, ImageError> {
        let (dir, lock) = lock_version(dir)?;
        let file = |name| {
            let path = dir.join(name);
            match fs::metadata(&path) {
                Ok(data) if data.is_file() => Ok(path),
                Ok(_) => Err(ImageError::Unusable { path, source: io::ErrorKind::InvalidInput.into() }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ImageError::Missing { path }),
                Err(source) => Err(ImageError::Unusable { path, source }),
            }
        };
        let (kernel, initramfs, scratch) = (file(KERNEL)?, file(INITRAMFS)?, file(SCRATCH)?);
        Ok(Self { kernel, initramfs, scratch, _lock: lock.map(Arc::new) })
    }
}

/// The version that `dir` links to, and a lock on it.
fn lock_version(dir: &Path) -> Result<(PathBuf, Option<VersionLock>), ImageError> {
    loop {
        let version = follow_links(dir);
        let path = version.join(MADE_FROM);
        let lock = match File::open(&path).and_then(|file| file.lock_shared().map(|()| file)) {
            Ok(file) => Some(VersionLock(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(ImageError::Unusable { path, source }),
        };
        // Once locked, the version can't be deleted, but it may have been deleted just before.
        if follow_links(dir) == version {
            return Ok((version, lock));
        }
    }
}

/// Follows symlinks, even to a path that does not exist: `canonicalize` would fail if the version were deleted meanwhile.
fn follow_links(path: &Path) -> PathBuf {
    let mut path = without_trailing_slash(path);
    for _ in 0..MAX_LINKS {
        let Ok(target) = fs::read_link(&path) else { break };
        path = path.parent().unwrap_or(Path::new("")).join(target);
    }
    path
}

/// With a trailing slash, system calls would follow a link instead of reading or replacing it.
fn without_trailing_slash(path: &Path) -> PathBuf {
    path.components().collect()
}

/// The kernel of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum KernelChoice {
    /// The minimal kernel if [`minimal::compile`] has compiled it, or else Debian's.
    #[default]
    Best,
    /// Debian's cloud kernel, with the modules that a guest needs.
    Debian,
    /// This file. It must have everything built in that a guest needs.
    File(PathBuf),
}

/// The image to make, and its path.
#[derive(Debug, Clone)]
pub struct Options {
    /// The image's directory.
    pub out: PathBuf,
    /// The directory for packages and kernels.
    pub cache: PathBuf,
    /// The image's kernel.
    pub kernel: KernelChoice,
    /// Whether to look for newer packages.
    pub refresh: bool,
    /// Called with one line before each slow step.
    pub progress: fn(&str),
}

impl Default for Options {
    /// The user's image in [`default_dir`], with progress on standard error.
    fn default() -> Self {
        let progress = |line: &str| eprintln!("image: {line}");
        Self { out: default_dir(), cache: cache_dir(), kernel: KernelChoice::Best, refresh: false, progress }
    }
}

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum EnsureError {
    /// guest-init could not be compiled.
    #[error("could not compile guest-init")]
    GuestInit(#[source] CommandError),
    /// The kernel could not be prepared.
    #[error("could not prepare the kernel")]
    Kernel(#[from] PrebuiltError),
    /// The kernel could not be taken out of its bzImage.
    #[error("could not unpack the kernel")]
    BzImage(#[from] BzImageError),
    /// The static shell is not available.
    #[error("could not get the static shell")]
    Shell(#[source] DebianError),
    /// The package cache could not be used.
    #[error("could not use the package cache")]
    Cache(#[source] DebianError),
    /// The scratch template could not be made.
    #[error("could not make the scratch template")]
    Scratch(#[from] ScratchError),
    /// A file could not be read or written.
    #[error("could not {action} {}", path.display())]
    File {
        /// A verb, for example: read, write, lock.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The image's path is taken by something else.
    #[error(
        "{} must be an image made by cofferdam-image, an empty directory, or nothing: move it away, or name another \
         directory with --out or COFFERDAM_IMAGE",
        path.display()
    )]
    Foreign {
        /// The image's directory.
        path: PathBuf,
    },
    /// The new image can't be opened.
    #[error("the new image is incomplete")]
    Open(#[from] ImageError),
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> EnsureError {
    move |source| EnsureError::File { action, path: path.to_owned(), source }
}

/// The inputs of an image.
struct Inputs {
    guest_init: Vec<u8>,
    debian: Debian,
    shell: Package,
    kernel: KernelInput,
}

enum KernelInput {
    File(PathBuf),
    Debian(Package),
}

/// Makes the image, unless it exists and was made from the same inputs.
///
/// Several processes may call this for one directory at the same time: one of them makes the image. [`Image::open`]
/// finds either the old image or the new one.
///
/// # Errors
///
/// A part of the image could not be made. An existing image stays as it was, and so does a directory that is no image.
pub fn ensure(options: &Options) -> Result<Image, EnsureError> {
    let out = std::path::absolute(&options.out).map_err(file_error("find", &options.out))?;
    let out = without_trailing_slash(&out);
    check_replaceable(&out)?;
    let parent = out.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).map_err(file_error("create", parent))?;
    let lock_path = out.with_added_extension("lock");
    let lock = File::create(&lock_path).and_then(|file| file.lock().map(|()| file));
    let _lock = lock.map_err(file_error("lock", &lock_path))?;

    let inputs = gather(options)?;
    let made_from = describe(&inputs)?;
    if let Ok(image) = Image::open(&out)
        && fs::read_to_string(out.join(MADE_FROM)).is_ok_and(|found| found == made_from)
    {
        return Ok(image);
    }
    install(&out, |version| {
        // Written first, so that an image that a killed process left incomplete can be recognised and deleted.
        let path = version.join(MADE_FROM);
        fs::write(&path, &made_from).map_err(file_error("write", &path))?;
        write(&inputs, version)?;
        sync(&Image::open(version)?)
    })?;
    Ok(Image::open(&out)?)
}

/// Only an image or an empty directory may be replaced.
fn check_replaceable(out: &Path) -> Result<(), EnsureError> {
    match is_image_or_empty(out) {
        Ok(true) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::NotADirectory => Err(file_error("read", out)(error)),
        _ => Err(EnsureError::Foreign { path: out.to_owned() }),
    }
}

fn is_image_or_empty(directory: &Path) -> io::Result<bool> {
    let names = fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.file_name()));
    let names = names.collect::<io::Result<Vec<OsString>>>()?;
    let all_known = names.iter().all(|name| FILES.iter().any(|file| name == file));
    Ok(names.is_empty() || all_known && names.iter().any(|name| name == MADE_FROM))
}

fn gather(options: &Options) -> Result<Inputs, EnsureError> {
    let guest_init = guest_init::compile().map_err(EnsureError::GuestInit)?;
    let guest_init = fs::read(&guest_init).map_err(file_error("read", &guest_init))?;
    let debian = Debian::open(&options.cache, options.refresh, options.progress).map_err(EnsureError::Cache)?;
    let shell = debian.package(SHELL_PACKAGE).map_err(EnsureError::Shell)?;
    let file = match &options.kernel {
        KernelChoice::Best => minimal::compiled(&options.cache, &debian),
        KernelChoice::Debian => None,
        KernelChoice::File(path) => Some(path.clone()),
    };
    let kernel = match file {
        Some(path) => KernelInput::File(path),
        None => KernelInput::Debian(prebuilt::package(&debian)?),
    };
    Ok(Inputs { guest_init, debian, shell, kernel })
}

/// A text that changes exactly when the image does: the contents of `made-from`.
fn describe(inputs: &Inputs) -> Result<String, EnsureError> {
    let kernel = match &inputs.kernel {
        KernelInput::Debian(package) => format!("{} {}", package.name, package.version),
        KernelInput::File(path) => {
            let bytes = fs::read(path).map_err(file_error("read", path))?;
            format!("kernel {}", blake3::hash(&bytes))
        }
    };
    Ok(format!(
        "layout {LAYOUT}\n{kernel}\n{} {}\nguest-init {}\n{}\n",
        inputs.shell.name,
        inputs.shell.version,
        blake3::hash(&inputs.guest_init),
        scratch::formatter_version()?,
    ))
}

fn write(inputs: &Inputs, directory: &Path) -> Result<(), EnsureError> {
    let path = directory.join(KERNEL);
    let lists = match &inputs.kernel {
        KernelInput::File(kernel) => {
            fs::copy(kernel, &path).map_err(file_error("copy", kernel))?;
            Vec::new()
        }
        KernelInput::Debian(package) => {
            let prebuilt = prebuilt::kernel(&inputs.debian, package)?;
            fs::write(&path, bzimage::kernel(&prebuilt.image)?).map_err(file_error("write", &path))?;
            let list = |(name, modules): &(_, &[_])| Ok((*name, prebuilt.modules(modules)?));
            prebuilt::LISTS.iter().map(list).collect::<Result<_, PrebuiltError>>()?
        }
    };

    let shell = shell(&inputs.debian, &inputs.shell)?;
    let initramfs = initramfs::archive(&inputs.guest_init, &shell, &lists);
    let path = directory.join(INITRAMFS);
    fs::write(&path, initramfs).map_err(file_error("write", &path))?;

    Ok(scratch::write_template(&directory.join(SCRATCH))?)
}

fn shell(debian: &Debian, package: &Package) -> Result<Vec<u8>, EnsureError> {
    let unpacked = debian.unpacked(package).map_err(EnsureError::Shell)?;
    let places = SHELL_PATHS.map(|path| unpacked.join(path));
    let shell = places.iter().find(|path| path.exists()).unwrap_or(&places[0]);
    fs::read(shell).map_err(file_error("read", shell))
}

/// The files to boot a machine whose first program is a script.
#[derive(Debug)]
pub struct ScriptedMachine {
    /// Debian's newest cloud kernel.
    pub kernel: PathBuf,
    /// A newc archive: `/init`, busybox as `/sh`, the modules in `/lib` and their order in `/modules.order`.
    pub initramfs: Vec<u8>,
}

/// Debian's newest cloud kernel, these of its modules, and a busybox script as the first program.
///
/// # Errors
///
/// A package could not be downloaded, or lacks a module.
pub fn scripted_machine(
    cache: &Path,
    progress: fn(&str),
    modules: &[&str],
    init: &[u8],
) -> Result<ScriptedMachine, EnsureError> {
    let debian = Debian::open(cache, false, progress).map_err(EnsureError::Cache)?;
    let kernel = prebuilt::kernel(&debian, &prebuilt::newest_package(&debian)?)?;
    let package = debian.package(SHELL_PACKAGE).map_err(EnsureError::Shell)?;
    let modules = ("modules.order", kernel.modules(modules)?);
    let initramfs = initramfs::archive(init, &shell(&debian, &package)?, &[modules]);
    Ok(ScriptedMachine { kernel: kernel.image, initramfs })
}

/// Writes the image to the disk, so that it is complete even after a power cut.
fn sync(image: &Image) -> Result<(), EnsureError> {
    for path in [&image.kernel, &image.initramfs, &image.scratch] {
        File::open(path).and_then(|file| file.sync_all()).map_err(file_error("sync", path))?;
    }
    Ok(())
}

/// Makes a new version with `fill`, links `out` to it, and deletes the unused versions.
fn install(out: &Path, fill: impl FnOnce(&Path) -> Result<(), EnsureError>) -> Result<(), EnsureError> {
    let versions = out.with_added_extension("versions");
    fs::create_dir_all(&versions).map_err(file_error("create", &versions))?;
    let version = tempfile::Builder::new()
        .prefix("")
        .rand_bytes(8)
        .permissions(Permissions::from_mode(0o755))
        .tempdir_in(&versions)
        .map_err(file_error("write", &versions))?;
    fill(version.path())?;
    link_version(out, &versions, version.path()).map_err(file_error("replace", out))?;
    let current = version.keep();
    for entry in fs::read_dir(&versions).into_iter().flatten().flatten() {
        if entry.path() != current {
            // In use, or not a version. If deleting fails for another reason, the next `install` tries again.
            let _ = delete(&entry.path());
        }
    }
    Ok(())
}

fn link_version(out: &Path, versions: &Path, version: &Path) -> io::Result<()> {
    let link = versions.join("next");
    match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // A relative link, so that the image and its versions can be moved together.
    let names = [versions, version].map(|path| path.file_name().unwrap_or_default());
    symlink(names.iter().collect::<PathBuf>(), &link)?;
    // An empty directory or an image without versions. A link can't be renamed over a directory.
    if fs::symlink_metadata(out).is_ok_and(|data| data.is_dir()) {
        delete(out)?;
    }
    fs::rename(&link, out)
}

/// Deletes an unused image or an empty directory, and nothing else.
fn delete(directory: &Path) -> io::Result<()> {
    if !is_image_or_empty(directory)? {
        return Err(io::ErrorKind::DirectoryNotEmpty.into());
    }
    let _lock = match File::options().write(true).open(directory.join(MADE_FROM)) {
        Ok(file) => {
            file.try_lock()?;
            Some(file)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    for name in FILES {
        match fs::remove_file(directory.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::remove_dir(directory)
}

#[cfg(test)]
mod tests;

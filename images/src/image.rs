//! The image's directory: opened by whoever boots a guest, made or brought up to date by [`ensure`].
//!
//! ```text
//!   OUT ─▶ OUT.versions/XXXXXXXX/kernel, initramfs, scratch.ext4     replaced by one rename
//!                                made-from                           locked (shared) by every open Image
//!   OUT.lock                                                         held while an image is made
//! ```
//!
//! The paths of an [`Image`] lead to one version, so its files belong together however often the image is replaced
//! meanwhile. A version that is not the current one, and that nobody has open, is deleted when the next one is made.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::command::CommandError;
use crate::debian::{Debian, DebianError, Package};
use crate::prebuilt::{self, PrebuiltError};
use crate::scratch::{self, ScratchError};
use crate::{cache_dir, default_dir, guest_init, initramfs, minimal};

/// Raised when the same inputs shall give another image.
const LAYOUT: u32 = 2;

const KERNEL: &str = "kernel";
const INITRAMFS: &str = "initramfs";
const SCRATCH: &str = "scratch.ext4";
const MADE_FROM: &str = "made-from";

/// All of an image, in the order in which it is deleted: what still has the last one is known to be an image.
const FILES: [&str; 4] = [KERNEL, INITRAMFS, SCRATCH, MADE_FROM];

/// Most links from one to the next, as in Linux.
const MAX_LINKS: usize = 40;

/// The static shell's package, and the program in it.
const SHELL_PACKAGE: &str = "busybox-static";
const SHELL_PATHS: [&str; 2] = ["bin/busybox", "usr/bin/busybox"];

/// The files that a guest boots from. They stay as they are at least as long as this, or a clone of it, lives.
#[derive(Debug, Clone)]
pub struct Image {
    /// An ELF kernel with PVH entry, or a bzImage.
    pub kernel: PathBuf,
    /// A newc archive.
    pub initramfs: PathBuf,
    /// A small ext4 without journal; a copy of it, extended to the wanted size, is the scratch disk.
    pub scratch: PathBuf,
    /// Keeps [`ensure`] from deleting the files. An image that was made otherwise has none.
    _in_use: Option<Arc<InUse>>,
}

/// A shared lock. A child that is just being started has copies of its file, and must not keep it.
#[derive(Debug)]
struct InUse(File);

impl Drop for InUse {
    fn drop(&mut self) {
        // What could fail about it ends with the file.
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
    /// A file of the image can't be looked at.
    #[error("the guest image's {} can't be used", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl Image {
    /// The image in `dir`, if it is whole.
    ///
    /// # Errors
    ///
    /// Names the file that is missing, and what makes it.
    pub fn open(dir: &Path) -> Result<Self, ImageError> {
        let (dir, in_use) = hold(dir)?;
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
        Ok(Self { kernel, initramfs, scratch, _in_use: in_use.map(Arc::new) })
    }
}

/// The version that `dir` leads to, and the lock that keeps it there.
fn hold(dir: &Path) -> Result<(PathBuf, Option<InUse>), ImageError> {
    loop {
        let version = follow(dir);
        let path = version.join(MADE_FROM);
        let in_use = match File::open(&path).and_then(|file| file.lock_shared().map(|()| file)) {
            Ok(file) => Some(InUse(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(ImageError::Unusable { path, source }),
        };
        // From the lock on nobody deletes it; it may have been replaced and deleted before.
        if follow(dir) == version {
            return Ok((version, in_use));
        }
    }
}

/// Where the links end that `path` leads to, whether or not something is there. (`canonicalize` would also fail when a
/// version is deleted while it looks.)
fn follow(path: &Path) -> PathBuf {
    let mut path = without_slash(path);
    for _ in 0..MAX_LINKS {
        let Ok(target) = fs::read_link(&path) else { break };
        path = path.parent().unwrap_or(Path::new("")).join(target);
    }
    path
}

/// With a slash at the end, the system follows a link instead of reading or replacing it.
fn without_slash(path: &Path) -> PathBuf {
    path.components().collect()
}

/// Which kernel an image gets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum KernelChoice {
    /// The minimal kernel if [`minimal::compile`] was called before, else Debian's.
    #[default]
    Best,
    /// Debian's cloud kernel and the modules that a guest needs.
    Debian,
    /// This one, which must have everything built in.
    File(PathBuf),
}

/// What image to make, and where.
#[derive(Debug, Clone)]
pub struct Options {
    /// The image's directory.
    pub out: PathBuf,
    /// Where packages are kept.
    pub cache: PathBuf,
    /// Which kernel.
    pub kernel: KernelChoice,
    /// Ask for newer packages even if the known ones would do.
    pub refresh: bool,
    /// Hears one line before each slow step.
    pub progress: fn(&str),
}

impl Default for Options {
    /// The user's own image with the best kernel at hand, progress on standard error.
    fn default() -> Self {
        let progress = |line: &str| eprintln!("image: {line}");
        Self { out: default_dir(), cache: cache_dir(), kernel: KernelChoice::Best, refresh: false, progress }
    }
}

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum EnsureError {
    /// guest-init does not compile.
    #[error("could not compile guest-init")]
    GuestInit(#[source] CommandError),
    /// No kernel.
    #[error("could not prepare the kernel")]
    Kernel(#[from] PrebuiltError),
    /// No shell.
    #[error("could not get the static shell")]
    Shell(#[source] DebianError),
    /// The package cache could not be used.
    #[error("could not use the package cache")]
    Cache(#[source] DebianError),
    /// The scratch template.
    #[error("could not make the scratch template")]
    Scratch(#[from] ScratchError),
    /// A file could not be read or written.
    #[error("could not {action} {}", path.display())]
    File {
        /// What was attempted, for example: read, write, lock.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Something else is where the image shall be.
    #[error(
        "{} must be an image made by cofferdam-image, an empty directory, or nothing: move it away, or name another \
         directory with --out or COFFERDAM_IMAGE",
        path.display()
    )]
    Foreign {
        /// The image's directory.
        path: PathBuf,
    },
    /// Written, and yet not whole.
    #[error("the new image is not whole")]
    Open(#[from] ImageError),
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> EnsureError {
    move |source| EnsureError::File { action, path: path.to_owned(), source }
}

/// Everything that an image is made from.
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

/// Makes the image unless it is there and made from the same inputs. Processes that ask for one directory at the same
/// time make it once, and whoever opens it meanwhile finds the old one or the new one, whole, and keeps it.
///
/// # Errors
///
/// Says which part could not be made; an image that was there stays, and so does whatever is no image.
pub fn ensure(options: &Options) -> Result<Image, EnsureError> {
    let out = std::path::absolute(&options.out).map_err(file_error("find", &options.out))?;
    let out = without_slash(&out);
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
        // First, since it marks what a killed run leaves there.
        let path = version.join(MADE_FROM);
        fs::write(&path, &made_from).map_err(file_error("write", &path))?;
        write(&inputs, version)?;
        sync(&Image::open(version)?)
    })?;
    Ok(Image::open(&out)?)
}

/// Nothing is replaced, let alone deleted, that is not known to be an image.
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

/// Changes exactly when the image would.
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
    let (kernel, modules, kvm) = match &inputs.kernel {
        KernelInput::File(path) => (path.clone(), Vec::new(), Vec::new()),
        KernelInput::Debian(package) => {
            let kernel = |modules| prebuilt::kernel(&inputs.debian, package, modules);
            let guest = kernel(prebuilt::GUEST_MODULES)?;
            (guest.image, guest.modules, kernel(prebuilt::KVM_MODULES)?.modules)
        }
    };
    fs::copy(&kernel, directory.join(KERNEL)).map_err(file_error("copy", &kernel))?;

    let shell = shell(&inputs.debian, &inputs.shell)?;
    let initramfs = initramfs::archive(&inputs.guest_init, &shell, &modules, &kvm);
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

/// What a machine boots from that is no guest of a build.
#[derive(Debug)]
pub struct ScriptedMachine {
    /// Debian's newest cloud kernel.
    pub kernel: PathBuf,
    /// A newc archive: `/init`, busybox as `/sh`, the modules in `/lib` and their order in `/modules.order`.
    pub initramfs: Vec<u8>,
}

/// Debian's newest cloud kernel with these of its modules and a script for busybox as the first program.
///
/// # Errors
///
/// A package can't be had, or has no such module.
pub fn scripted_machine(
    cache: &Path,
    progress: fn(&str),
    modules: &[&str],
    init: &[u8],
) -> Result<ScriptedMachine, EnsureError> {
    let debian = Debian::open(cache, false, progress).map_err(EnsureError::Cache)?;
    let kernel = prebuilt::kernel(&debian, &prebuilt::newest_package(&debian)?, modules)?;
    let package = debian.package(SHELL_PACKAGE).map_err(EnsureError::Shell)?;
    let initramfs = initramfs::archive(init, &shell(&debian, &package)?, &kernel.modules, &[]);
    Ok(ScriptedMachine { kernel: kernel.image, initramfs })
}

/// An image that is found after a power cut must be whole, too.
fn sync(image: &Image) -> Result<(), EnsureError> {
    for path in [&image.kernel, &image.initramfs, &image.scratch] {
        File::open(path).and_then(|file| file.sync_all()).map_err(file_error("sync", path))?;
    }
    Ok(())
}

/// Has `fill` make a new version, lets `out` lead to it, and deletes the versions that nobody uses.
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
    switch(out, &versions, version.path()).map_err(file_error("replace", out))?;
    let current = version.keep();
    for entry in fs::read_dir(&versions).into_iter().flatten().flatten() {
        if entry.path() != current {
            // What can't be deleted now is in nobody's way.
            let _ = delete(&entry.path());
        }
    }
    Ok(())
}

fn switch(out: &Path, versions: &Path, version: &Path) -> io::Result<()> {
    let link = versions.join("next");
    match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Relative, so that all of it can be moved together.
    let names = [versions, version].map(|path| path.file_name().unwrap_or_default());
    symlink(names.iter().collect::<PathBuf>(), &link)?;
    // Empty, or an image from before there were versions; no link is renamed over a directory.
    if fs::symlink_metadata(out).is_ok_and(|data| data.is_dir()) {
        delete(out)?;
    }
    fs::rename(&link, out)
}

/// Deletes an image that nobody uses, or an empty directory, and nothing else.
fn delete(directory: &Path) -> io::Result<()> {
    if !is_image_or_empty(directory)? {
        return Err(io::ErrorKind::DirectoryNotEmpty.into());
    }
    let _unused = match File::options().write(true).open(directory.join(MADE_FROM)) {
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

//! The image's directory: opened by whoever boots a guest, made or brought up to date by [`ensure`].

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use crate::aside::Aside;
use crate::command::CommandError;
use crate::debian::{Debian, DebianError, Package};
use crate::prebuilt::{self, PrebuiltError};
use crate::scratch::{self, ScratchError};
use crate::{cache_dir, default_dir, guest_init, initramfs, minimal};

/// Raised when the same inputs shall give another image.
const LAYOUT: u32 = 1;

const KERNEL: &str = "kernel";
const INITRAMFS: &str = "initramfs";
const SCRATCH: &str = "scratch.ext4";
const MADE_FROM: &str = "made-from";

/// The static shell's package, and the program in it.
const SHELL_PACKAGE: &str = "busybox-static";
const SHELL_PATHS: [&str; 2] = ["bin/busybox", "usr/bin/busybox"];

/// The files that a guest boots from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// An ELF kernel with PVH entry, or a bzImage.
    pub kernel: PathBuf,
    /// A newc archive.
    pub initramfs: PathBuf,
    /// A small ext4 without journal; a copy of it, extended to the wanted size, is the scratch disk.
    pub scratch: PathBuf,
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
        let file = |name| {
            let path = dir.join(name);
            match fs::metadata(&path) {
                Ok(data) if data.is_file() => Ok(path),
                Ok(_) => Err(ImageError::Unusable { path, source: io::ErrorKind::InvalidInput.into() }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ImageError::Missing { path }),
                Err(source) => Err(ImageError::Unusable { path, source }),
            }
        };
        Ok(Self { kernel: file(KERNEL)?, initramfs: file(INITRAMFS)?, scratch: file(SCRATCH)? })
    }
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
/// time make it once, and whoever opens it meanwhile finds the old one or the new one, whole.
///
/// # Errors
///
/// Says which part could not be made; an image that was there stays.
pub fn ensure(options: &Options) -> Result<Image, EnsureError> {
    let out = std::path::absolute(&options.out).map_err(file_error("find", &options.out))?;
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
    let aside = Aside::create(out.with_added_extension("new")).map_err(file_error("write", parent))?;
    write(&inputs, aside.path())?;
    let path = aside.path().join(MADE_FROM);
    fs::write(&path, &made_from).map_err(file_error("write", &path))?;
    sync(&Image::open(aside.path())?)?;
    replace(aside.path(), &out).map_err(file_error("replace", &out))?;
    Ok(Image::open(&out)?)
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
    let (kernel, modules) = match &inputs.kernel {
        KernelInput::File(path) => (path.clone(), Vec::new()),
        KernelInput::Debian(package) => {
            let kernel = prebuilt::kernel(&inputs.debian, package)?;
            (kernel.image, kernel.modules)
        }
    };
    fs::copy(&kernel, directory.join(KERNEL)).map_err(file_error("copy", &kernel))?;

    let unpacked = inputs.debian.unpacked(&inputs.shell).map_err(EnsureError::Shell)?;
    let places = SHELL_PATHS.map(|path| unpacked.join(path));
    let shell = places.iter().find(|path| path.exists()).unwrap_or(&places[0]);
    let shell = fs::read(shell).map_err(file_error("read", shell))?;
    let initramfs = initramfs::archive(&inputs.guest_init, &shell, &modules);
    let path = directory.join(INITRAMFS);
    fs::write(&path, initramfs).map_err(file_error("write", &path))?;

    Ok(scratch::write_template(&directory.join(SCRATCH))?)
}

/// An image that is found after a power cut must be whole, too.
fn sync(image: &Image) -> Result<(), EnsureError> {
    for path in [&image.kernel, &image.initramfs, &image.scratch] {
        File::open(path).and_then(|file| file.sync_all()).map_err(file_error("sync", path))?;
    }
    Ok(())
}

/// Puts `new` in the place of `old`, which need not exist; what was there is deleted.
fn replace(new: &Path, old: &Path) -> io::Result<()> {
    match renameat2(AT_FDCWD, new, AT_FDCWD, old, RenameFlags::RENAME_EXCHANGE) {
        // What is now under the temporary name goes away with it.
        Ok(()) => Ok(()),
        Err(Errno::ENOENT) => fs::rename(new, old),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_named_with_the_command_that_makes_it() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(KERNEL), "").unwrap();
        let error = Image::open(directory.path()).unwrap_err().to_string();
        assert!(error.contains("initramfs") && error.contains("just image"), "{error}");
    }

    #[test]
    fn an_image_is_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("image");
        for contents in ["first", "second"] {
            let aside = Aside::create(directory.path().join("image.new")).unwrap();
            fs::write(aside.path().join(KERNEL), contents).unwrap();
            replace(aside.path(), &out).unwrap();
            drop(aside);
            assert_eq!(fs::read_to_string(out.join(KERNEL)).unwrap(), contents);
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}

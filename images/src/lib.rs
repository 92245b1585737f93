//! The guest image: a kernel, an initramfs and the template of the scratch disk.
//!
//! ```text
//!   guest-init/ ──────── cargo, static ─────────────┐
//!   busybox-static ───── apt, unpacked ─────────────┼─▶ initramfs ────┐
//!   cloud kernel ─────── apt, unpacked ──┬─ modules ┘                 ├─▶ one directory, and a link to it
//!     or minimal kernel, compiled ───────┴─ kernel ───────────────────┤
//!   mke2fs ──────────────────────────────── scratch.ext4 ─────────────┘
//! ```
//!
//! Nothing is mounted or installed, and no privileges are needed. Equal inputs produce byte-identical images. The file
//! `made-from` in the directory lists the inputs; [`ensure`] makes a new image only if they have changed.

mod bzimage;
mod command;
pub mod debian;
mod guest_init;
mod image;
mod initramfs;
pub mod minimal;
mod modules;
mod newc;
mod prebuilt;
mod scratch;
mod staging;

use std::env;
use std::path::PathBuf;

pub use bzimage::BzImageError;
pub use command::CommandError;
pub use image::{EnsureError, Image, ImageError, KernelChoice, Options, ScriptedMachine, ensure, scripted_machine};
pub use modules::ModulesError;
pub use prebuilt::PrebuiltError;
pub use scratch::{SCRATCH_TEMPLATE_BYTES, ScratchError};

/// The directory for images, packages, kernels and tools: `$XDG_CACHE_HOME/cofferdam`, by default `~/.cache/cofferdam`.
pub fn cache_dir() -> PathBuf {
    let home = || env::home_dir().unwrap_or_default().join(".cache");
    let base = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    base.unwrap_or_else(home).join("cofferdam")
}

/// Where an image is made: `$COFFERDAM_IMAGE`, by default `image` in [`cache_dir`].
pub fn default_dir() -> PathBuf {
    env::var_os("COFFERDAM_IMAGE").map_or_else(|| cache_dir().join("image"), PathBuf::from)
}

/// The image that machines boot: that of [`default_dir`], or the package's if there is none and no setting names one.
pub fn used_dir() -> PathBuf {
    let own = default_dir();
    if env::var_os("COFFERDAM_IMAGE").is_some() || own.exists() {
        return own;
    }
    let packaged = packaged_dir().map(|directory| directory.join("image"));
    packaged.filter(|image| image.exists()).unwrap_or(own)
}

/// Where a package keeps what only this program uses: `lib/cofferdam` beside the program's own directory.
pub fn packaged_dir() -> Option<PathBuf> {
    Some(env::current_exe().ok()?.parent()?.parent()?.join("lib/cofferdam"))
}

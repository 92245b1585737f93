//! Debian's cloud kernel: the quick start, with the few modules that whoever boots it needs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::debian::{Debian, DebianError, Package};
use crate::modules::{Module, ModulesError, Tree};

/// Depends on the current kernel of the Debian release.
const METAPACKAGE: &str = "linux-image-cloud-amd64";

/// What packages of Debian 12's first kernel are called, and what depends on its newer one.
const FIRST_OF_DEBIAN_12: &str = "linux-image-6.1.0-";
const NEWER_OF_DEBIAN_12: &str = "linux-image-6.12-cloud-amd64";

/// What a guest needs; all else is a dependency or built into the kernel.
pub(crate) const GUEST_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "pvpanic_pci",
    "virtio_blk",
    "virtiofs",
    "vmw_vsock_virtio_transport",
    "overlay",
    "ext4",
    "virtio_rng",
];

/// What a guest needs whose build asks for `/dev/kvm`; of the two, the one of its processor.
pub(crate) const KVM_MODULES: &[&str] = &["kvm_amd", "kvm_intel"];

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum PrebuiltError {
    /// The package could not be had.
    #[error("could not get Debian's cloud kernel")]
    Package(#[source] DebianError),
    /// The package isn't laid out as expected.
    #[error("package {package} has no {what}")]
    Layout {
        /// The package's name.
        package: String,
        /// What is missing.
        what: &'static str,
    },
    /// A directory could not be read.
    #[error("could not read {}", path.display())]
    Read {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The modules could not be gathered.
    #[error("could not gather the kernel's modules")]
    Modules(#[source] ModulesError),
}

/// A kernel and its modules in the order to load them.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// What the VMM boots.
    pub(crate) image: PathBuf,
    /// What its first program loads.
    pub(crate) modules: Vec<Module>,
}

/// The package, downloaded.
pub(crate) fn package(debian: &Debian) -> Result<Package, PrebuiltError> {
    debian.package_behind(METAPACKAGE, "linux-image-").map_err(PrebuiltError::Package)
}

/// The package whose kernel can do most, downloaded. Guests have no use for that: what they need is old.
pub(crate) fn newest_package(debian: &Debian) -> Result<Package, PrebuiltError> {
    let package = package(debian)?;
    if !package.name.starts_with(FIRST_OF_DEBIAN_12) {
        return Ok(package);
    }
    debian.package_behind(NEWER_OF_DEBIAN_12, "linux-image-").map_err(PrebuiltError::Package)
}

/// The kernel of the package, and of its modules those that are wanted.
pub(crate) fn kernel(debian: &Debian, package: &Package, modules: &[&str]) -> Result<Kernel, PrebuiltError> {
    let unpacked = debian.unpacked(package).map_err(PrebuiltError::Package)?;
    let missing = |what| PrebuiltError::Layout { package: package.name.clone(), what };
    let image = find(&unpacked.join("boot"), "vmlinuz-")?.ok_or_else(|| missing("boot/vmlinuz-*"))?;
    // Releases after Debian 12 have it below usr.
    let tree = ["lib/modules", "usr/lib/modules"].map(|path| unpacked.join(path));
    let tree = tree.iter().find(|path| path.exists()).ok_or_else(|| missing("lib/modules"))?;
    let tree = find(tree, "")?.ok_or_else(|| missing("lib/modules/*"))?;
    let modules = Tree::open(&tree).and_then(|tree| tree.load_order(modules)).map_err(PrebuiltError::Modules)?;
    Ok(Kernel { image, modules })
}

/// The entry of `directory` whose name starts so.
fn find(directory: &Path, prefix: &str) -> Result<Option<PathBuf>, PrebuiltError> {
    let failed = |source| PrebuiltError::Read { path: directory.to_owned(), source };
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

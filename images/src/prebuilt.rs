//! Debian's cloud kernel with the few modules that a guest needs. It needs no compiling, unlike the minimal kernel.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::debian::{Debian, DebianError, Package};
use crate::modules::{Module, ModulesError, Tree};

/// The package that depends on the current kernel of the Debian release.
const METAPACKAGE: &str = "linux-image-cloud-amd64";

/// The prefix of packages of Debian 12's first kernel, and the package that depends on its newer one.
const FIRST_OF_DEBIAN_12: &str = "linux-image-6.1.0-";
const NEWER_OF_DEBIAN_12: &str = "linux-image-6.12-cloud-amd64";

/// The modules that a guest needs, by the file of the initramfs that lists them. Everything else is a dependency of them, or built
/// in. Lists may have modules in common; the guest loads that of the scratch disk beside the first one.
pub(crate) const LISTS: [(&str, &[&str]); 4] = [
    (
        "modules.order",
        &[
            "virtio_pci",
            "virtio_console",
            "pvpanic_pci",
            "virtiofs",
            "vmw_vsock_virtio_transport",
            "overlay",
            "virtio_rng",
        ],
    ),
    ("scratch.order", &["virtio_pci", "virtio_blk", "ext4"]),
    ("network.order", &["virtio_net"]),
    // The guest loads the one for its processor.
    ("kvm.order", &["kvm_amd", "kvm_intel"]),
];

/// Why the kernel could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrebuiltError {
    /// The package is not available.
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
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The modules could not be collected.
    #[error("could not collect the kernel's modules")]
    Modules(#[source] ModulesError),
}

/// A kernel and its modules.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Its compressed image.
    pub(crate) image: PathBuf,
    tree: Tree,
}

impl Kernel {
    /// The wanted modules and their dependencies, in the order to load them.
    pub(crate) fn modules(&self, wanted: &[&str]) -> Result<Vec<Module>, PrebuiltError> {
        self.tree.load_order(wanted).map_err(PrebuiltError::Modules)
    }
}

/// Downloads the package of the release's current kernel.
pub(crate) fn package(debian: &Debian) -> Result<Package, PrebuiltError> {
    debian.dependency(METAPACKAGE, "linux-image-").map_err(PrebuiltError::Package)
}

/// Downloads the package of the release's newest kernel. Guests need none of its newer features.
pub(crate) fn newest_package(debian: &Debian) -> Result<Package, PrebuiltError> {
    let package = package(debian)?;
    if !package.name.starts_with(FIRST_OF_DEBIAN_12) {
        return Ok(package);
    }
    debian.dependency(NEWER_OF_DEBIAN_12, "linux-image-").map_err(PrebuiltError::Package)
}

/// Unpacks the package's kernel.
pub(crate) fn kernel(debian: &Debian, package: &Package) -> Result<Kernel, PrebuiltError> {
    let unpacked = debian.unpacked(package).map_err(PrebuiltError::Package)?;
    let missing = |what| PrebuiltError::Layout { package: package.name.clone(), what };
    let image = find(&unpacked.join("boot"), "vmlinuz-")?.ok_or_else(|| missing("boot/vmlinuz-*"))?;
    // Releases after Debian 12 have them below usr.
    let tree = ["lib/modules", "usr/lib/modules"].map(|path| unpacked.join(path));
    let tree = tree.iter().find(|path| path.exists()).ok_or_else(|| missing("lib/modules"))?;
    let tree = find(tree, "")?.ok_or_else(|| missing("lib/modules/*"))?;
    let tree = Tree::open(&tree).map_err(PrebuiltError::Modules)?;
    Ok(Kernel { image, tree })
}

/// An entry of `directory` whose name starts with `prefix`.
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

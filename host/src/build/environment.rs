//! The environment of a build as one digest: everything that the build can see of its host.

use std::{
    fs::{self, File},
    io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::Path,
};

use blake3::Hasher;
use cofferdam_castore::B3Digest;
use cofferdam_images::Image;
use cofferdam_protocol::VERSION;
use parking_lot::Mutex;

use super::settings::Settings;

/// Separates these digests from all others. Its number must be raised when the environment changes in a way that the fields
/// below don't show.
const CONTEXT: &str = "cofferdam v2: the environment of builds";

/// The digests of an image's files, computed again when one of them has changed.
#[derive(Debug, Default)]
pub(super) struct ImageDigest(Mutex<Option<([Stamp; 3], ImageDigests)>>);

/// The digests of a guest image's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ImageDigests {
    /// The kernel.
    pub kernel: B3Digest,
    /// The first root, with guest-init.
    pub initramfs: B3Digest,
    /// The template of scratch disks.
    pub scratch: B3Digest,
}

/// Identifies a version of a file: device, inode, size, and the times of its last changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp([i128; 5]);

impl Stamp {
    fn of(path: &Path) -> io::Result<Self> {
        let found = fs::metadata(path)?;
        let nanoseconds = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        Ok(Self([
            found.dev().into(),
            found.ino().into(),
            found.size().into(),
            nanoseconds(found.mtime(), found.mtime_nsec()),
            nanoseconds(found.ctime(), found.ctime_nsec()),
        ]))
    }
}

impl ImageDigest {
    pub(super) fn get(&self, image: &Image) -> io::Result<ImageDigests> {
        let files = [&image.kernel, &image.initramfs, &image.scratch];
        let mut known = self.0.lock();
        let mut stamps = [Stamp([0; 5]); 3];
        for (stamp, path) in stamps.iter_mut().zip(files) {
            *stamp = Stamp::of(path)?;
        }
        if let Some((of, digest)) = *known
            && of == stamps
        {
            return Ok(digest);
        }
        let digest = |path: &Path| -> io::Result<B3Digest> {
            let mut hasher = Hasher::new();
            hasher.update_reader(File::open(path)?)?;
            Ok(hasher.finalize().into())
        };
        let [kernel, initramfs, scratch] = files;
        let digests =
            ImageDigests { kernel: digest(kernel)?, initramfs: digest(initramfs)?, scratch: digest(scratch)? };
        *known = Some((stamps, digests));
        Ok(digests)
    }
}

/// The digest of the environment of builds with these settings.
pub(super) fn digest(settings: &Settings, image: &ImageDigest) -> io::Result<B3Digest> {
    let Settings { vmm, cpu_model, ro_paths, withhold_network, nested, user_namespaces, .. } = settings;
    let mut fields = Fields(Hasher::new_derive_key(CONTEXT));
    fields.add("protocol", &VERSION.to_le_bytes());
    let ImageDigests { kernel, initramfs, scratch } = image.get(&settings.image)?;
    let files = [kernel.as_slice(), initramfs.as_slice(), scratch.as_slice()].concat();
    fields.add("image", B3Digest::of(&files).as_slice());
    // Without `cpu_model`, the CPU depends on the host's, the VMM and the accelerator.
    fields.add("vmm", vmm.kind.to_string().as_bytes());
    fields.add("vmm version", vmm.version.as_bytes());
    fields.add("accelerator", vmm.accelerator.to_string().as_bytes());
    fields.add("CPU model", cpu_model.as_deref().unwrap_or_default().as_bytes());
    fields.add("nested", &[u8::from(*nested)]);
    fields.add("user namespaces", &[u8::from(*user_namespaces)]);
    fields.add("network withheld", &[u8::from(*withhold_network)]);
    for (seen, host) in ro_paths {
        fields.add("path", seen.as_str().as_bytes());
        fields.add("host path", host.as_os_str().as_bytes());
    }
    Ok(fields.0.finalize().into())
}

/// Names and values, each with its length, so that two different lists have different bytes.
struct Fields(Hasher);

impl Fields {
    fn add(&mut self, name: &str, value: &[u8]) {
        for part in [name.as_bytes(), value] {
            self.0.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, path::PathBuf};

    use super::*;
    use crate::{
        machine::vmm::{self, Accelerator},
        request::AbsolutePath,
    };

    fn settings(dir: &Path) -> Settings {
        for name in ["kernel", "initramfs", "scratch.ext4"] {
            fs::write(dir.join(name), name).unwrap();
        }
        let image = Image::open(dir).unwrap();
        let choice = vmm::choose(None).expect("images/setup.sh installs QEMU");
        Settings::new(image, choice, dir.join("run"))
    }

    #[test]
    fn each_part_of_the_environment_changes_its_digest() {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path());
        let digest = |settings: &Settings| digest(settings, &ImageDigest::default()).unwrap();
        let path = |path: &str| AbsolutePath::new(path).unwrap();
        let mut all = vec![digest(&settings)];
        let changes: [fn(&mut Settings); 6] = [
            |settings| settings.cpu_model = Some("Nehalem-v1".to_owned()),
            |settings| settings.nested = true,
            |settings| settings.user_namespaces = true,
            |settings| settings.withhold_network = true,
            |settings| settings.vmm.version = "another".to_owned(),
            |settings| {
                settings.vmm.accelerator = match settings.vmm.accelerator {
                    Accelerator::Kvm => Accelerator::Tcg,
                    Accelerator::Tcg => Accelerator::Kvm,
                };
            },
        ];
        for change in changes {
            let mut changed = settings.clone();
            change(&mut changed);
            all.push(digest(&changed));
        }
        for (seen, host) in [("/opt/a", "/srv/a"), ("/opt/a", "/srv/b"), ("/opt/as", "/rv/a")] {
            let ro_paths = [(path(seen), PathBuf::from(host))].into();
            all.push(digest(&Settings { ro_paths, ..settings.clone() }));
        }
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count, "two environments have one digest");
        assert_eq!(digest(&settings), digest(&settings.clone()));
    }

    #[test]
    fn a_change_of_the_image_shows_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let (settings, image) = (settings(dir.path()), ImageDigest::default());
        let first = digest(&settings, &image).unwrap();
        assert_eq!(digest(&settings, &image).unwrap(), first);
        for name in ["kernel", "initramfs", "scratch.ext4"] {
            let before = digest(&settings, &image).unwrap();
            let mut file = File::options().append(true).open(dir.path().join(name)).unwrap();
            file.write_all(&[0; 512]).unwrap();
            assert_ne!(digest(&settings, &image).unwrap(), before, "{name}");
        }
        fs::remove_file(dir.path().join("kernel")).unwrap();
        assert!(digest(&settings, &image).is_err());
    }
}

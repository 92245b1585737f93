//! Tests of the whole image. Packages come from the user's cache; the first run downloads them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use cofferdam_images::{Image, KernelChoice, Options, SCRATCH_TEMPLATE_BYTES, ensure};

fn image_in(directory: &Path) -> Image {
    // With a trailing slash, as shells complete it.
    let out = directory.join("image/");
    ensure(&Options { out, kernel: KernelChoice::Debian, ..Options::default() }).expect("the image can be made")
}

#[test]
fn two_images_from_the_same_inputs_are_byte_identical() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (one, two) = (image_in(one.path()), image_in(two.path()));
    let pairs = [(one.kernel, two.kernel), (one.initramfs, two.initramfs), (one.scratch, two.scratch)];
    for (one, two) in pairs {
        assert!(fs::read(&one).unwrap() == fs::read(&two).unwrap(), "{} differs from {}", one.display(), two.display());
    }
}

#[test]
fn a_current_image_stays_and_a_broken_one_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let image = image_in(directory.path());
    let inode = fs::metadata(&image.initramfs).unwrap().ino();
    assert_eq!(fs::metadata(image_in(directory.path()).initramfs).unwrap().ino(), inode);

    fs::remove_file(&image.scratch).unwrap();
    let replaced = image_in(directory.path());
    assert!(replaced.scratch.exists() && replaced.initramfs.exists());
    assert!(image.initramfs.exists(), "an open image stays");
}

#[test]
fn the_scratch_template_is_a_sound_file_system() {
    let directory = tempfile::tempdir().unwrap();
    let image = image_in(directory.path());
    assert_eq!(fs::metadata(&image.scratch).unwrap().len(), SCRATCH_TEMPLATE_BYTES);
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let check = Command::new("e2fsck").env("PATH", path).args(["-f", "-n"]).arg(&image.scratch).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
}

//! The image as its users get it. Packages come from the user's own cache; the first run ever fetches them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use cofferdam_images::{Image, KernelChoice, Options, SCRATCH_TEMPLATE_BYTES, ensure};

fn image_in(directory: &Path) -> Image {
    // With a slash at its end, as shells complete it.
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
fn an_image_that_is_up_to_date_is_left_alone_and_a_broken_one_is_mended() {
    let directory = tempfile::tempdir().unwrap();
    let image = image_in(directory.path());
    let inode = fs::metadata(&image.initramfs).unwrap().ino();
    assert_eq!(fs::metadata(image_in(directory.path()).initramfs).unwrap().ino(), inode);

    fs::remove_file(&image.scratch).unwrap();
    let mended = image_in(directory.path());
    assert!(mended.scratch.exists() && mended.initramfs.exists());
    assert!(image.initramfs.exists(), "somebody may still boot from it");
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

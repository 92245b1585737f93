//! Input data for the measurements.

use std::{fs, path::Path};

use anyhow::Result;

pub(crate) const FILES: usize = 10_000;
pub(crate) const FILE_BYTES: usize = 13_000;
const FILES_A_DIRECTORY: usize = 100;

/// Bytes without a pattern.
pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    blake3::Hasher::new_derive_key("cofferdam benchmark noise").finalize_xof().fill(&mut noise);
    noise
}

/// Many small files.
pub(crate) fn make_tree(tree: &Path) -> Result<()> {
    let mut contents = blake3::Hasher::new_derive_key("cofferdam benchmark tree").finalize_xof();
    let mut bytes = vec![0; FILE_BYTES];
    for number in 0..FILES {
        let directory = tree.join(format!("{:03}", number / FILES_A_DIRECTORY));
        if number % FILES_A_DIRECTORY == 0 {
            fs::create_dir_all(&directory)?;
        }
        contents.fill(&mut bytes);
        fs::write(directory.join(format!("{number:05}")), &bytes)?;
    }
    Ok(())
}

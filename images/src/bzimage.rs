//! The kernel in a bzImage, by the format in Linux's `Documentation/arch/x86/boot.rst`.
//!
//! ```text
//!   bzImage: setup code, header ── code that decompresses ── payload: the kernel's ELF file, compressed, and its length
//! ```
//!
//! Distributions have bzImages, in which a guest decompresses its kernel at every boot. VMMs boot the ELF file as well (PVH).

use std::{
    fs,
    io::{self, Seek as _, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

use crate::command::{self, CommandError};

/// Why a kernel could not be taken out of its bzImage.
#[derive(Debug, thiserror::Error)]
pub enum BzImageError {
    /// The file could not be read, or copied to a temporary one.
    #[error("could not read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The file isn't as expected.
    #[error("{} {what}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, as the end of a sentence.
        what: &'static str,
    },
    /// The kernel could not be decompressed.
    #[error("could not decompress the kernel; `images/setup.sh` installs what that needs")]
    Decompress(#[source] CommandError),
}

/// The ELF file of the kernel in a bzImage.
pub(crate) fn kernel(path: &Path) -> Result<Vec<u8>, BzImageError> {
    let failed = |source| BzImageError::Read { path: path.to_owned(), source };
    let wrong = |what| BzImageError::Format { path: path.to_owned(), what };
    let image = fs::read(path).map_err(failed)?;
    let payload = payload(&image).ok_or_else(|| wrong("is no bzImage"))?;
    let (program, payload) = decompressor(payload).ok_or_else(|| wrong("is compressed in an unknown way"))?;
    let stored = || {
        let mut file = tempfile::tempfile()?;
        file.write_all(payload)?;
        file.rewind()?;
        Ok(file)
    };
    let mut decompress = Command::new(program);
    decompress.args(["-d", "-c"]).stdin(stored().map_err(failed)?);
    let kernel = command::output(&mut decompress).map_err(BzImageError::Decompress)?;
    if !kernel.starts_with(b"\x7fELF") {
        return Err(wrong("has no ELF file in it"));
    }
    Ok(kernel)
}

/// The payload of a bzImage.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let number = |at: usize| Some(u32::from_le_bytes(*image.get(at..)?.first_chunk()?) as usize);
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = usize::from(*image.get(0x1f1)?) + 1;
    let payload = image.get(setup_sectors * 512..)?.get(number(0x248)?..)?;
    payload.get(..number(0x24c)?)
}

/// The program that decompresses a payload, and what it is to decompress.
fn decompressor(payload: &[u8]) -> Option<(&'static str, &[u8])> {
    // gzip's own format ends with the length.
    if payload.starts_with(b"\x1f\x8b") {
        return Some(("gzip", payload));
    }
    let (compressed, _length) = payload.split_last_chunk::<4>()?;
    let formats: [(&[u8], _); 3] = [(b"\x02\x21\x4c\x18", "lz4"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")];
    let (_, program) = formats.into_iter().find(|(magic, _)| compressed.starts_with(magic))?;
    Some((program, compressed))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with one sector of setup code beside the header's.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248] = 3;
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        [&image, &b"xyz"[..], payload, b"the rest"].concat()
    }

    fn compressed(program: &str, contents: &str) -> Vec<u8> {
        let script = format!("printf '{contents}' | {program}");
        command::output(Command::new("sh").args(["-c", &script])).unwrap()
    }

    fn kernel_of(image: &[u8]) -> Result<Vec<u8>, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kernel");
        fs::write(&path, image).unwrap();
        kernel(&path).map_err(|error| error.to_string().replace(&format!("{}", path.display()), "it"))
    }

    #[test]
    fn the_kernel_is_decompressed_by_its_format() {
        for program in ["gzip", "xz --check=crc32", "zstd", "lz4 -l"] {
            let mut payload = compressed(program, "\\177ELF and more");
            if program != "gzip" {
                payload.extend(13_u32.to_le_bytes());
            }
            assert_eq!(kernel_of(&bzimage(&payload)).unwrap(), b"\x7fELF and more", "{program}");
        }
    }

    #[test]
    fn other_files_are_refused() {
        let refused = |image: &[u8]| kernel_of(image).unwrap_err();
        assert_eq!(refused(b""), "it is no bzImage");
        assert_eq!(refused(&[0; 4096]), "it is no bzImage");
        let whole = bzimage(&compressed("gzip", "\\177ELF"));
        assert_eq!(refused(&whole[..1030]), "it is no bzImage");
        assert_eq!(refused(&bzimage(b"BZh9 and more")), "it is compressed in an unknown way");
        assert_eq!(refused(&bzimage(&compressed("gzip", "text"))), "it has no ELF file in it");
    }
}

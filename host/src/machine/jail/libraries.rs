//! The libraries of a program, which its root must contain. Its own dynamic loader lists them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use parking_lot::Mutex;

/// Most bytes of a loader's list.
const MAX_LIST_BYTES: u64 = 1 << 20;

/// A program's header of segments (`Elf64_Phdr`), in bytes.
const SEGMENT_BYTES: usize = 56;

/// Type of the segment that names the loader.
const PT_INTERP: u32 = 3;

/// Identifies a file, even if another one replaces it at its path.
type Identity = (u64, u64, i64, i64);

/// A cache of programs' libraries.
#[derive(Debug, Default)]
pub(super) struct Libraries(Mutex<HashMap<Identity, Arc<[PathBuf]>>>);

impl Libraries {
    /// Everything that the kernel and the loader open to start this program; empty for a static program.
    ///
    /// # Errors
    ///
    /// It isn't a program for this machine, or lacks a library.
    pub(super) fn of(&self, program: &File) -> io::Result<Arc<[PathBuf]>> {
        let found = program.metadata()?;
        let identity = (found.dev(), found.ino(), found.mtime(), found.mtime_nsec());
        if let Some(known) = self.0.lock().get(&identity) {
            return Ok(Arc::clone(known));
        }
        let libraries: Arc<[PathBuf]> = list(program)?.into();
        self.0.lock().insert(identity, Arc::clone(&libraries));
        Ok(libraries)
    }
}

fn list(program: &File) -> io::Result<Vec<PathBuf>> {
    let Some(loader) = loader(program)? else { return Ok(Vec::new()) };
    // The loader opens the file that it finds as its standard input, which is this very program even if its path now names
    // another one.
    let mut listing = Command::new(&loader)
        .args(["--list", "/proc/self/fd/0"])
        .env_clear()
        .stdin(program.try_clone()?)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut text = String::new();
    let output = listing.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let read = output.take(MAX_LIST_BYTES).read_to_string(&mut text);
    let status = listing.wait()?;
    read?;
    if !status.success() {
        return Err(invalid(format!("its loader {} can't list its libraries ({status})", loader.display())));
    }
    parse(&text).map(|libraries| libraries.into_iter().chain([loader]).collect())
}

/// Lines such as `libc.so.6 => /lib/libc.so.6 (0x7f…)`, `/lib64/ld.so (0x…)`, `linux-vdso.so.1 (0x…)`.
fn parse(list: &str) -> io::Result<Vec<PathBuf>> {
    let mut libraries = Vec::new();
    for line in list.lines().map(str::trim) {
        if line.ends_with("=> not found") {
            return Err(invalid(format!("a library is missing: {line}")));
        }
        let path = line.split_once("=> ").map_or(line, |(_, path)| path);
        let path = path.rsplit_once(" (0x").map_or(path, |(path, _)| path);
        if path.starts_with('/') && !path.starts_with("/proc/") {
            libraries.push(path.into());
        }
    }
    Ok(libraries)
}

/// The loader that a program names; a static program names none. See elf(5).
fn loader(program: &File) -> io::Result<Option<PathBuf>> {
    let mut header = [0; 64];
    program.read_exact_at(&mut header, 0).map_err(|_| not_a_program())?;
    if header[..2] == *b"#!" {
        return Err(invalid("it is a script; name the program that it starts".to_owned()));
    }
    if header[..6] != *b"\x7fELF\x02\x01" {
        return Err(not_a_program());
    }
    let segments = u64::from_le_bytes(field(&header, 32)?);
    let (size, count) = (u16::from_le_bytes(field(&header, 54)?), u16::from_le_bytes(field(&header, 56)?));
    if usize::from(size) != SEGMENT_BYTES {
        return Err(not_a_program());
    }
    for index in 0..u64::from(count) {
        let mut segment = [0; SEGMENT_BYTES];
        let at = segments.saturating_add(index * SEGMENT_BYTES as u64);
        program.read_exact_at(&mut segment, at).map_err(|_| not_a_program())?;
        if u32::from_le_bytes(field(&segment, 0)?) != PT_INTERP {
            continue;
        }
        let (at, length) = (u64::from_le_bytes(field(&segment, 8)?), u64::from_le_bytes(field(&segment, 32)?));
        let mut path = vec![0; usize::try_from(length.min(4096)).map_err(io::Error::other)?];
        program.read_exact_at(&mut path, at).map_err(|_| not_a_program())?;
        let path = path.split(|byte| *byte == 0).next().unwrap_or_default();
        return Ok(Some(Path::new(std::ffi::OsStr::from_bytes(path)).to_owned()));
    }
    Ok(None)
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    bytes.get(at..at + N).and_then(|field| field.try_into().ok()).ok_or_else(not_a_program)
}

fn not_a_program() -> io::Error {
    invalid("it is not a 64-bit ELF program".to_owned())
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(path: &str) -> io::Result<Arc<[PathBuf]>> {
        Libraries::default().of(&File::open(path)?)
    }

    #[test]
    fn the_loader_and_the_c_library_are_among_a_programs_libraries() {
        let libraries = of("/proc/self/exe").unwrap();
        for name in ["libc.so.6", "ld-linux-x86-64.so.2"] {
            assert!(libraries.iter().any(|path| path.file_name().is_some_and(|found| found == name)), "{libraries:?}");
        }
        assert!(libraries.iter().all(|path| path.exists()), "{libraries:?}");
    }

    #[test]
    fn what_is_no_program_is_refused_with_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        let file = |bytes: &[u8]| {
            let path = directory.path().join("file");
            std::fs::write(&path, bytes).unwrap();
            of(path.to_str().unwrap()).unwrap_err().to_string()
        };
        assert!(file(&[b"#!/bin/sh\n".as_slice(), &[0; 64]].concat()).contains("script"));
        assert!(file(b"").contains("ELF"));
        assert!(file(&[0; 64]).contains("ELF"));
        assert!(file(&[b"\x7fELF\x02\x01".as_slice(), &[0xff; 64]].concat()).contains("ELF"));
    }

    #[test]
    fn a_missing_library_is_named() {
        let error = parse("\tlinux-vdso.so.1 (0x1)\n\tlibnone.so.1 => not found\n").unwrap_err();
        assert!(error.to_string().contains("libnone.so.1"), "{error}");
        let found = parse("\tlinux-vdso.so.1 (0x1)\n\tliba.so => /a b/liba.so (0x2)\n\t/lib64/ld.so (0x3)\n").unwrap();
        assert_eq!(found, [PathBuf::from("/a b/liba.so"), "/lib64/ld.so".into()]);
    }
}

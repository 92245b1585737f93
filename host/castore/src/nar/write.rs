use std::{
    io::{self, BufWriter, Write},
    path::Path,
};

use sha2::{Digest as _, Sha256};

use super::{MAGIC, padding};
use crate::{
    Node, Store,
    archive::{Event, emit},
    export::ExportError,
};

/// The NAR hash and size, which Nix records for a store path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NarInfo {
    /// The NAR hash: SHA-256 of the archive.
    pub sha256: [u8; 32],
    /// Bytes in the archive.
    pub size: u64,
}

/// Writes the NAR of a node. Errors call the archive `name`. `interrupted` is called now and then, and ends the writing when
/// it returns `true`.
///
/// Blocks: call it from a thread that may.
///
/// # Errors
///
/// Names the path below `name` that can't be read from the store. Errors of `out` are [`ExportError::Write`].
pub fn write(
    store: &Store,
    node: &Node,
    name: &Path,
    out: &mut dyn Write,
    interrupted: &dyn Fn() -> bool,
) -> Result<(), ExportError> {
    let failed = |source| ExportError::Write { path: name.to_owned(), action: "write it", source };
    let mut out = BufWriter::new(out);
    strings(&mut out, &[MAGIC]).map_err(failed)?;
    let mut size = 0;
    let mut take = |path: &[u8], event: Event<'_>| {
        // Every node except the root is a directory entry.
        let entry = !path.is_empty();
        let begins = matches!(event, Event::Enter | Event::Symlink(_) | Event::File { .. });
        if entry && begins {
            let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
            strings(&mut out, &[b"entry", b"(", b"name", name, b"node"])?;
        }
        if begins {
            strings(&mut out, &[b"(", b"type"])?;
        }
        let ends = match event {
            Event::Enter => strings(&mut out, &[b"directory"]).map(|()| false),
            Event::Leave => Ok(true),
            Event::Symlink(target) => strings(&mut out, &[b"symlink", b"target", target.as_bytes()]).map(|()| true),
            Event::File { size: bytes, executable } => {
                strings(&mut out, &[b"regular"])?;
                if executable {
                    strings(&mut out, &[b"executable", b""])?;
                }
                strings(&mut out, &[b"contents"])?;
                size = bytes;
                out.write_all(&size.to_le_bytes()).map(|()| false)
            }
            Event::Data(bytes) => out.write_all(bytes).map(|()| false),
            Event::EndFile => out.write_all(&[0; 8][..padding(size)]).map(|()| true),
        }?;
        if ends {
            strings(&mut out, &[b")"])?;
            if entry {
                strings(&mut out, &[b")"])?;
            }
        }
        Ok(())
    };
    emit(store, node, name, interrupted, &mut take)?;
    out.flush().map_err(failed)
}

fn strings(out: &mut impl Write, strings: &[&[u8]]) -> io::Result<()> {
    for string in strings {
        let length = string.len() as u64;
        out.write_all(&length.to_le_bytes())?;
        out.write_all(string)?;
        out.write_all(&[0; 8][..padding(length)])?;
    }
    Ok(())
}

/// Computes the NAR hash and size of a node, in one pass over its blobs; see [`write()`].
///
/// # Errors
///
/// Names the path below `name` that can't be read from the store.
pub fn info(store: &Store, node: &Node, name: &Path, interrupted: &dyn Fn() -> bool) -> Result<NarInfo, ExportError> {
    let mut measure = Measure { hasher: Sha256::new(), size: 0 };
    write(store, node, name, &mut measure, interrupted)?;
    Ok(NarInfo { sha256: measure.hasher.finalize().into(), size: measure.size })
}

struct Measure {
    hasher: Sha256,
    size: u64,
}

impl Write for Measure {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

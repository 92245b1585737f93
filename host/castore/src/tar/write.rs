use std::{
    io::{self, BufWriter, Write},
    path::Path,
};

use ::tar::{EntryType, Header};

use crate::{
    Node, Store,
    archive::{Event, emit},
    export::ExportError,
};

const BLOCK_BYTES: u64 = 512;

/// In seconds since 1970, as in Nix's store: some programs treat 0 as no time at all.
const MTIME: u64 = 1;

/// The name of a GNU entry that holds the long name of the next entry.
const LONG_NAME: &[u8] = b"././@LongLink";

/// Writes the entries of a directory as a tar archive. Errors call the archive `name`. `interrupted` is called now and then,
/// and ends the writing when it returns `true`.
///
/// Blocks: call it from a thread that may.
///
/// # Errors
///
/// Names the path below `name` that can't be read from the store. Errors of `out`, and a `directory` that is not one, are
/// [`ExportError::Write`].
pub fn write(
    store: &Store,
    directory: &Node,
    name: &Path,
    out: &mut dyn Write,
    interrupted: &dyn Fn() -> bool,
) -> Result<(), ExportError> {
    let failed = |source| ExportError::Write { path: name.to_owned(), action: "write it", source };
    if !matches!(directory, Node::Directory { .. }) {
        let message = "a tar archive holds the entries of a directory, but this is not a directory";
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, message)));
    }
    let mut out = BufWriter::new(out);
    let mut size = 0;
    emit(store, directory, name, interrupted, &mut |path, event| match event {
        Event::Enter => {
            let path = if path.is_empty() { b"./".to_vec() } else { [path, b"/"].concat() };
            entry(&mut out, EntryType::Directory, &path, b"", 0, 0o755)
        }
        Event::Leave => Ok(()),
        Event::Symlink(target) => entry(&mut out, EntryType::Symlink, path, target.as_bytes(), 0, 0o777),
        Event::File { size: bytes, executable } => {
            size = bytes;
            entry(&mut out, EntryType::Regular, path, b"", size, if executable { 0o755 } else { 0o644 })
        }
        Event::Data(bytes) => out.write_all(bytes),
        Event::EndFile => pad(&mut out, size),
    })?;
    out.write_all(&[0; 2 * BLOCK_BYTES as usize]).and_then(|()| out.flush()).map_err(failed)
}

/// Writes the header of an entry, after those of its long names.
fn entry(out: &mut impl Write, kind: EntryType, path: &[u8], target: &[u8], size: u64, mode: u32) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(mode);
    header.set_mtime(MTIME);
    header.set_uid(0);
    header.set_gid(0);
    let gnu = header.as_gnu_mut().ok_or_else(|| io::Error::other("the header is not GNU's"))?;
    for (field, text, long) in
        [(&mut gnu.linkname, target, EntryType::GNULongLink), (&mut gnu.name, path, EntryType::GNULongName)]
    {
        if text.len() > field.len() {
            long_text(out, long, text)?;
        }
        let fits = text.len().min(field.len());
        field[..fits].copy_from_slice(&text[..fits]);
    }
    header.set_cksum();
    out.write_all(header.as_bytes())
}

/// Writes an entry with a text that does not fit into the next header. It ends with a NUL.
fn long_text(out: &mut impl Write, kind: EntryType, text: &[u8]) -> io::Result<()> {
    let size = text.len() as u64 + 1;
    entry(out, kind, LONG_NAME, b"", size, 0)?;
    out.write_all(text)?;
    out.write_all(&[0])?;
    pad(out, size)
}

/// Writes zeros up to the next block after `size` bytes.
fn pad(out: &mut impl Write, size: u64) -> io::Result<()> {
    let zeros = (BLOCK_BYTES - size % BLOCK_BYTES) % BLOCK_BYTES;
    io::copy(&mut io::Read::take(io::repeat(0), zeros), out).map(drop)
}

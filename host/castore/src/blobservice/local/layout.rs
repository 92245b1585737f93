//! The layout of a local store: where its files are, and the number of the layout, which `DIR/format` holds before a line
//! feed.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::Path,
};

use data_encoding::HEXLOWER;

use super::staging::{Staging, at_path};
use crate::B3Digest;

/// Directory of the committed blobs.
pub(super) const BLOBS: &str = "b3";

/// Directory of the blobs that are not committed yet.
pub(super) const STAGING: &str = "staging";

/// Directory of the leases.
pub(super) const LEASES: &str = "leases";

const FORMAT: &str = "format";

/// More than any layout number takes.
const MAX_FORMAT_BYTES: u64 = 32;

/// The layout that [`super`] describes. A change with which older versions would do harm increments this number, and
/// writes it before anything else.
const LAYOUT: u64 = 1;

/// Whether the store in this directory has a layout number. A store without one has layout 1.
///
/// # Errors
///
/// `Unsupported` when this version does not know the layout.
pub(crate) fn check_layout(dir: &Path) -> io::Result<bool> {
    let path = dir.join(FORMAT);
    let mut text = String::new();
    match File::open(&path).and_then(|file| file.take(MAX_FORMAT_BYTES).read_to_string(&mut text)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        read => drop(read.map_err(|error| at_path(&path, &error))?),
    }
    let layout = text.trim_end();
    if layout.parse() == Ok(LAYOUT) {
        return Ok(true);
    }
    let message = format!(
        "{}: the store has the layout {}, but this version only knows {LAYOUT}: use the version that wrote it, or \
         another directory",
        path.display(),
        layout.escape_debug()
    );
    Err(io::Error::new(io::ErrorKind::Unsupported, message))
}

/// Writes the layout number atomically.
pub(super) fn write_layout(dir: &Path, staging_parent: &Path) -> io::Result<()> {
    let staging = Staging::create(staging_parent, false)?;
    let (number, mut file) = staging.create_file()?;
    writeln!(file, "{LAYOUT}")?;
    file.sync_all()?;
    fs::rename(staging.path(number), dir.join(FORMAT))
}

/// The directory of a blob below `b3`.
pub(super) fn fan_out(digest: &B3Digest) -> String {
    let mut hex = digest.to_hex();
    hex.truncate(2);
    hex
}

/// The file of a blob below `b3`.
pub(super) fn blob_path(digest: &B3Digest) -> String {
    let hex = digest.to_hex();
    format!("{}/{hex}", &hex[..2])
}

/// The digest of the blob in this file; `None` when no blob's file would be in this place.
pub(crate) fn digest_of(path: &Path) -> Option<B3Digest> {
    let name = path.file_name()?.to_str()?;
    let fan_out = path.parent()?.file_name()?.to_str()?;
    let digest = B3Digest::try_from(&*HEXLOWER.decode(name.as_bytes()).ok()?).ok()?;
    name.starts_with(fan_out).then_some(digest).filter(|_| fan_out.len() == 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LocalBlobService;

    #[test]
    fn a_store_with_an_unknown_layout_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let format = dir.path().join(FORMAT);
        for _ in 0..2 {
            LocalBlobService::open(dir.path()).unwrap();
            assert_eq!(fs::read_to_string(&format).unwrap(), "1\n");
            // As older versions left it.
            fs::remove_file(&format).unwrap();
        }
        let leftover = dir.path().join("staging/1-0");
        fs::create_dir(&leftover).unwrap();
        for other in ["2\n", "0\n", "", "a\u{1b}\n"] {
            fs::write(&format, other).unwrap();
            let error = LocalBlobService::open(dir.path()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Unsupported);
            let start =
                format!("{}: the store has the layout {}, but", format.display(), other.trim_end().escape_debug());
            assert!(error.to_string().starts_with(&start), "{error}");
            assert!(leftover.exists());
        }
    }
}

//! Which layout a local store has: the number in `DIR/format`, followed by a line feed.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::Path,
};

use super::staging::{Staging, at_path};

const FORMAT: &str = "format";

/// Longer than any number of a layout.
const MAX_FORMAT_BYTES: u64 = 32;

/// The layout that [`super::local`] describes. Whoever changes it so that older versions would do harm counts up, and
/// writes the new number before anything else.
const LAYOUT: u64 = 1;

/// Whether the store in this directory says its layout. One that doesn't has the first.
///
/// # Errors
///
/// `Unsupported` when it is another layout than this version knows.
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
        "{}: the store has the layout {}, and this version knows {LAYOUT} alone: take the version that wrote it, or \
         another directory",
        path.display(),
        layout.escape_debug()
    );
    Err(io::Error::new(io::ErrorKind::Unsupported, message))
}

/// Notes the layout, at once or not at all.
pub(super) fn note_layout(dir: &Path, staging_parent: &Path) -> io::Result<()> {
    let staging = Staging::create(staging_parent, false)?;
    let (number, mut file) = staging.create_file()?;
    writeln!(file, "{LAYOUT}")?;
    file.sync_all()?;
    fs::rename(staging.path(number), dir.join(FORMAT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LocalBlobService;

    #[test]
    fn a_store_says_its_layout_and_one_of_another_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let format = dir.path().join(FORMAT);
        for _ in 0..2 {
            LocalBlobService::open(dir.path()).unwrap();
            assert_eq!(fs::read_to_string(&format).unwrap(), "1\n");
            // As older versions have left it.
            fs::remove_file(&format).unwrap();
        }
        let leftover = dir.path().join("staging/1-0");
        fs::create_dir(&leftover).unwrap();
        for other in ["2\n", "0\n", "", "a\u{1b}\n"] {
            fs::write(&format, other).unwrap();
            let error = LocalBlobService::open(dir.path()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Unsupported);
            let start =
                format!("{}: the store has the layout {}, and", format.display(), other.trim_end().escape_debug());
            assert!(error.to_string().starts_with(&start), "{error}");
            assert!(leftover.exists());
        }
    }
}

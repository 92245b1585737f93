//! Files that are either whole or absent.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

/// Creates or replaces a file, for its owner alone. `fill` writes it under another name, which ends in `.new`; then the file is
/// made durable and renamed. A failure leaves nothing new. One process at a time may do so with a path.
///
/// # Errors
///
/// That of `fill`, or the file can't be created, made durable or renamed.
pub fn create_whole<T, E: From<io::Error>>(path: &Path, fill: impl FnOnce(&File) -> Result<T, E>) -> Result<T, E> {
    let unfinished = path.with_added_extension("new");
    let created = || -> Result<T, E> {
        remove_if_there(&unfinished)?;
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(&unfinished)?;
        let filled = fill(&file)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)?;
        Ok(filled)
    };
    let created = created();
    if created.is_err() {
        // Its space may be needed.
        let _ = fs::remove_file(&unfinished);
    }
    let filled = created?;
    let parent = path.parent().filter(|parent| *parent != Path::new(""));
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(filled)
}

/// Removes a file that may be missing.
///
/// # Errors
///
/// It is there, and can't be removed.
pub fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_or_stays_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        // A killed process has left something.
        fs::write(path.with_added_extension("new"), "half of a longer one").unwrap();
        let write = |text: &'static str| move |mut file: &File| file.write_all(text.as_bytes());
        create_whole(&path, write("first")).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        let failed = create_whole(&path, |mut file| {
            file.write_all(b"second")?;
            Err::<(), _>(io::Error::other("no more"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "no more");
        assert_eq!(fs::read_to_string(&path).unwrap(), "first");
        create_whole(&path, write("third")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "third");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

//! The watermark of free disk space, below which nothing new is stored and no build starts.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::statvfs::statvfs;
use parking_lot::Mutex;

use crate::quantity::show_size;

/// The watermark without `[disk] min_free`: this, or the fraction below of the file system if that is less.
const DEFAULT_MIN_FREE: u64 = 2 << 30;

/// See [`DEFAULT_MIN_FREE`].
const DEFAULT_FRACTION: u64 = 20;

/// How long an answer of the file systems is used, so that a stream of small blobs doesn't ask for each.
const SAMPLE_AGE: Duration = Duration::from_millis(100);

/// The space of a file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Space {
    /// All of it.
    pub total: u64,
    /// What is free for this user.
    pub free: u64,
}

impl Space {
    /// The space of the file system that this path is on.
    ///
    /// # Errors
    ///
    /// The path can't be reached.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let found = statvfs(path)?;
        let bytes = |blocks: u64| blocks.saturating_mul(found.fragment_size());
        Ok(Self { total: bytes(found.blocks()), free: bytes(found.blocks_available()) })
    }

    fn default_min_free(self) -> u64 {
        DEFAULT_MIN_FREE.min(self.total / DEFAULT_FRACTION)
    }
}

/// A file system below its watermark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Low {
    path: PathBuf,
    free: u64,
    min_free: u64,
}

impl fmt::Display for Low {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, free, min_free) = (self.path.display(), show_size(self.free), show_size(self.min_free));
        write!(f, "{free} are free on the file system of {path}, less than [disk] min_free = {min_free}")
    }
}

/// The file systems that a daemon writes to.
#[derive(Debug)]
pub(crate) struct Disk {
    places: Vec<PathBuf>,
    /// In bytes. `None` for the default of each file system.
    min_free: Option<u64>,
    sample: Mutex<Option<Sample>>,
}

#[derive(Debug)]
struct Sample {
    taken: Instant,
    low: Option<Low>,
}

impl Disk {
    /// The file systems of these paths, of which each must have so many bytes free. `None` is 2 GiB, or a twentieth of
    /// a smaller file system.
    pub(crate) fn new(places: Vec<PathBuf>, min_free: Option<u64>) -> Self {
        Self { places, min_free, sample: Mutex::default() }
    }

    /// A file system below the watermark, if there is one. The answer may be [`SAMPLE_AGE`] old.
    pub(crate) fn low(&self) -> Option<Low> {
        let mut sample = self.sample.lock();
        let is_fresh = |sample: &&Sample| sample.taken.elapsed() < SAMPLE_AGE;
        if let Some(known) = sample.as_ref().filter(is_fresh) {
            return known.low.clone();
        }
        let low = self.places.iter().find_map(|place| self.low_at(place));
        let was_low = sample.as_ref().is_some_and(|sample| sample.low.is_some());
        match &low {
            Some(low) if !was_low => {
                tracing::warn!("the disk is too full: {low}; nothing is stored for clients, and no build starts");
            }
            None if was_low => tracing::warn!("the disk has enough space again"),
            _ => {}
        }
        *sample = Some(Sample { taken: Instant::now(), low: low.clone() });
        low
    }

    /// Says so if a file system is smaller than its watermark. A path that doesn't exist yet is looked for above.
    pub(crate) fn watermark_beyond(&self) -> Option<String> {
        let min_free = self.min_free?;
        self.places.iter().find_map(|place| {
            let (there, space) = place.ancestors().find_map(|above| Some((above, Space::of(above).ok()?)))?;
            let (total, there) = (show_size(space.total), there.display());
            (min_free >= space.total)
                .then(|| format!("must be less than {total}, the size of the file system of {there}"))
        })
    }

    fn low_at(&self, place: &Path) -> Option<Low> {
        // The daemon finds out by itself what can't be reached.
        let space = Space::of(place).ok()?;
        let min_free = self.min_free.unwrap_or_else(|| space.default_min_free());
        (space.free < min_free).then(|| Low { path: place.to_owned(), free: space.free, min_free })
    }
}

impl Disk {
    /// Whether something new may be stored.
    ///
    /// # Errors
    ///
    /// `StorageFull` below the watermark.
    pub(crate) fn may_store(&self) -> io::Result<()> {
        let Some(low) = self.low() else { return Ok(()) };
        let advice = "try again later; on the daemon's host, [gc], `cofferdam store gc` or a lower [records] max_size frees some";
        Err(io::Error::new(io::ErrorKind::StorageFull, format!("the disk is too full: {low}; {advice}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_a_twentieth_of_a_small_file_system_and_2_gib_of_a_large_one() {
        let of = |total| Space { total, free: 0 }.default_min_free();
        assert_eq!([of(20 << 30), of(40 << 30), of(2000 << 30)], [1 << 30, 2 << 30, 2 << 30]);
    }

    #[test]
    fn the_file_system_that_is_low_is_named_with_the_setting() {
        let dir = tempfile::tempdir().unwrap();
        let here = Space::of(dir.path()).unwrap();
        let disk = |min_free| Disk::new(vec![dir.path().to_owned()], min_free);
        assert_eq!(disk(Some(0)).low(), None);
        let low = disk(Some(here.total + 1)).low().unwrap();
        assert_eq!((low.path.as_path(), low.min_free), (dir.path(), here.total + 1));
        let refused = disk(Some(u64::MAX)).may_store().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::StorageFull);
        assert!(refused.to_string().contains("[disk] min_free"), "{refused}");
    }
}

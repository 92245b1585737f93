//! Which needles occur in a stream of bytes, whatever the pieces that it comes in.
//!
//! ```text
//!   needles ──▶ all 32 bytes of the nixbase32 alphabet? ── yes ──▶ skip scan over that alphabet
//!                                                       └─ no ───▶ Aho-Corasick
//!   feed ──▶ [ last max-1 bytes | first max-1 bytes of the piece ] ──▶ engine
//!        └─▶ [ the piece ] ──────────────────────────────────────────▶ engine ──▶ found
//! ```

use std::{collections::BTreeSet, sync::Arc};

use aho_corasick::{AhoCorasick, BuildError};

mod skip;

use skip::SkipScan;

/// Why there is no scan for these needles.
#[derive(Debug, thiserror::Error)]
pub enum NeedlesError {
    /// It would be in everything.
    #[error("needle {index} is empty; a needle has at least one byte")]
    Empty {
        /// Which one, from 0.
        index: usize,
    },
    /// They are too many or too long.
    #[error("the {count} needles are too many or too long for a search automaton")]
    TooLarge {
        /// How many.
        count: usize,
        /// Which limit.
        #[source]
        source: BuildError,
    },
}

/// What to look for. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Needles(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    count: usize,
    max_bytes: usize,
    engine: Engine,
}

#[derive(Debug)]
enum Engine {
    /// Without needles.
    Nothing,
    Skip(SkipScan),
    Automaton(AhoCorasick),
}

impl Needles {
    /// Needles of any bytes; each is known by its index from here on. Equal ones are all found together.
    ///
    /// # Errors
    ///
    /// When one is empty, or all together need too much memory.
    pub fn new<N: AsRef<[u8]>>(needles: impl IntoIterator<Item = N>) -> Result<Self, NeedlesError> {
        let needles: Vec<N> = needles.into_iter().collect();
        if let Some(index) = needles.iter().position(|needle| needle.as_ref().is_empty()) {
            return Err(NeedlesError::Empty { index });
        }
        let count = needles.len();
        let max_bytes = needles.iter().map(|needle| needle.as_ref().len()).max().unwrap_or(0);
        let engine = if count == 0 {
            Engine::Nothing
        } else if let Some(skip) = SkipScan::new(&needles) {
            Engine::Skip(skip)
        } else {
            let automaton = AhoCorasick::new(&needles);
            Engine::Automaton(automaton.map_err(|source| NeedlesError::TooLarge { count, source })?)
        };
        Ok(Self(Arc::new(Inner { count, max_bytes, engine })))
    }

    /// How many needles there are.
    pub fn len(&self) -> usize {
        self.0.count
    }

    /// Whether there is nothing to look for.
    pub fn is_empty(&self) -> bool {
        self.0.count == 0
    }

    /// A scanner that has found nothing yet.
    pub fn scanner(&self) -> Scanner {
        let found = Found { found: vec![false; self.0.count], missing: self.0.count };
        Scanner { needles: self.clone(), found, tail: Vec::new() }
    }
}

/// Looks for needles in streams, one after the other, and collects what it finds in all of them.
#[derive(Debug, Clone)]
pub struct Scanner {
    needles: Needles,
    found: Found,
    /// The end of the current stream, at most one byte less than the longest needle.
    tail: Vec<u8>,
}

impl Scanner {
    /// The next piece of the current stream.
    pub fn feed(&mut self, piece: &[u8]) {
        if self.found.missing == 0 {
            return;
        }
        let Inner { max_bytes, engine, .. } = &*self.needles.0;
        let keep = max_bytes - 1;
        let before = self.tail.len();
        self.tail.extend_from_slice(&piece[..piece.len().min(keep)]);
        if before > 0 {
            engine.scan(&self.tail, &mut self.found);
        }
        engine.scan(piece, &mut self.found);
        if piece.len() >= keep {
            self.tail.clear();
            self.tail.extend_from_slice(&piece[piece.len() - keep..]);
        } else {
            self.tail.drain(..self.tail.len().saturating_sub(keep));
        }
    }

    /// Ends the current stream: what is fed next begins another one.
    pub fn end_stream(&mut self) {
        self.tail.clear();
    }

    /// Scans bytes that stand alone, a name or the target of a symbolic link; the current stream goes on afterwards.
    pub fn scan_whole(&mut self, bytes: &[u8]) {
        if self.found.missing > 0 {
            self.needles.0.engine.scan(bytes, &mut self.found);
        }
    }

    /// Whether every needle has been found, so that feeding more is of no use.
    pub fn is_complete(&self) -> bool {
        self.found.missing == 0
    }

    /// The indexes of the needles found so far.
    pub fn found(&self) -> BTreeSet<u64> {
        (0..).zip(&self.found.found).filter(|(_, found)| **found).map(|(index, _)| index).collect()
    }
}

#[derive(Debug, Clone)]
struct Found {
    found: Vec<bool>,
    missing: usize,
}

impl Found {
    fn add(&mut self, index: usize) {
        if !std::mem::replace(&mut self.found[index], true) {
            self.missing -= 1;
        }
    }
}

impl Engine {
    fn scan(&self, bytes: &[u8], found: &mut Found) {
        match self {
            Self::Nothing => {}
            Self::Skip(skip) => skip.scan(bytes, found),
            Self::Automaton(automaton) => {
                for hit in automaton.find_overlapping_iter(bytes) {
                    found.add(hit.pattern().as_usize());
                    if found.missing == 0 {
                        return;
                    }
                }
            }
        }
    }
}

//! Finds out which needles occur in a stream of bytes, which may come in pieces of any size.
//!
//! ```text
//!   needles ──▶ all 32 bytes of the nixbase32 alphabet? ── yes ──▶ skip scan over that alphabet
//!                                                       └─ no ───▶ Aho-Corasick
//!   feed ──▶ [ last max-1 bytes | first max-1 bytes of the piece ] ──▶ engine
//!        └─▶ [ the piece ] ──────────────────────────────────────────▶ engine ──▶ found
//! ```

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
};

use aho_corasick::BuildError;

mod automaton;
mod skip;

use automaton::Automaton;
use skip::SkipScan;

/// Largest allowed [`automaton_size`], in states and matches: less than 400 MiB while it is built, and 100 MiB after that.
pub const MAX_AUTOMATON_SIZE: u64 = 4 * 1024 * 1024;

/// An upper bound for the states and matches of a search automaton for these needles. 0 when all of them are hashes of 32
/// nixbase32 characters, which need no automaton.
pub fn automaton_size<N: AsRef<[u8]>>(needles: &[N]) -> u64 {
    if needles.iter().all(|needle| skip::takes(needle.as_ref())) {
        return 0;
    }
    let distinct: HashSet<&[u8]> = needles.iter().map(AsRef::as_ref).collect();
    let mut lengths: Vec<u64> = distinct.into_iter().map(|needle| needle.len() as u64).collect();
    lengths.sort_unstable();
    // Each state stands for a prefix of a needle, and has a match for each needle that the prefix ends with: at most one of
    // each length up to its own.
    let (mut size, mut last, mut different, mut sum) = (0_u64, 0, 0, 0);
    for length in lengths {
        if length > last {
            (last, different, sum) = (length, different + 1, sum + length);
        }
        size = size.saturating_add(length + different * (length + 1) - sum);
    }
    size
}

/// An upper bound for the memory of a search for these needles while it is prepared, in bytes; afterwards it takes about a third of
/// that. `docs/cost.md` has the measurements.
pub fn memory_bytes<N: AsRef<[u8]>>(needles: &[N]) -> u64 {
    let count = needles.len() as u64;
    match automaton_size(needles) {
        0 => count * SKIP_BYTES,
        size => {
            let fastest = size.min(automaton::MAX_FASTEST_BYTES as u64) * FASTEST_BYTES;
            size.saturating_mul(STATE_BYTES).saturating_add(count * NEEDLE_BYTES).saturating_add(fastest)
        }
    }
}

/// Of each needle of a skip scan.
const SKIP_BYTES: u64 = 256;

/// Of each needle of an automaton.
const NEEDLE_BYTES: u64 = 2048;

/// Of each state or match of an automaton.
const STATE_BYTES: u64 = 64;

/// Beside that, of each of the first states, if the automaton is of the fastest kind.
const FASTEST_BYTES: u64 = 1024;

/// Why needles can't be searched for.
#[derive(Debug, thiserror::Error)]
pub enum PatternError {
    /// A needle is empty, so it would be found everywhere.
    #[error("needle {index} is empty: a needle has at least one byte")]
    Empty {
        /// Its index, from 0.
        index: usize,
    },
    /// The needles are too many or too long.
    #[error(
        "the needles need a search automaton of {size} states and matches, but only {MAX_AUTOMATON_SIZE} are allowed"
    )]
    TooLarge {
        /// Their [`automaton_size`].
        size: u64,
    },
    /// The search automaton can't be built.
    #[error("the {count} needles are too many or too long for a search automaton")]
    Automaton {
        /// How many.
        count: usize,
        /// The limit that they exceed.
        #[source]
        source: BuildError,
    },
}

/// A set of needles to search for. Cheap to clone.
///
/// ```
/// # use cofferdam_castore::refscan::ReferencePattern;
/// let pattern = ReferencePattern::new(["abc", "xyz"])?;
/// let mut scanner = pattern.scanner();
/// scanner.feed(b"..a");
/// scanner.feed(b"bc..");
/// assert_eq!(scanner.found().into_iter().collect::<Vec<_>>(), [0]);
/// # Ok::<_, cofferdam_castore::refscan::PatternError>(())
/// ```
#[derive(Debug, Clone)]
pub struct ReferencePattern(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    count: usize,
    max_bytes: usize,
    engine: Engine,
}

#[derive(Debug)]
enum Engine {
    /// For no needles.
    Nothing,
    Skip(SkipScan),
    Automaton(Automaton),
}

impl ReferencePattern {
    /// Creates a pattern from needles of any bytes. Results refer to them by index. Equal needles are found together.
    ///
    /// May take seconds: call it from a thread that may block.
    ///
    /// # Errors
    ///
    /// A needle is empty, or all together need too much memory.
    pub fn new<N: AsRef<[u8]>>(needles: impl IntoIterator<Item = N>) -> Result<Self, PatternError> {
        let needles: Vec<N> = needles.into_iter().collect();
        if let Some(index) = needles.iter().position(|needle| needle.as_ref().is_empty()) {
            return Err(PatternError::Empty { index });
        }
        let count = needles.len();
        let max_bytes = needles.iter().map(|needle| needle.as_ref().len()).max().unwrap_or(0);
        let engine = if count == 0 {
            Engine::Nothing
        } else if let Some(skip) = SkipScan::new(&needles) {
            Engine::Skip(skip)
        } else {
            let size = automaton_size(&needles);
            if size > MAX_AUTOMATON_SIZE {
                return Err(PatternError::TooLarge { size });
            }
            let automaton = Automaton::new(&needles);
            Engine::Automaton(automaton.map_err(|source| PatternError::Automaton { count, source })?)
        };
        Ok(Self(Arc::new(Inner { count, max_bytes, engine })))
    }

    /// The number of needles.
    pub fn len(&self) -> usize {
        self.0.count
    }

    /// Whether there are no needles.
    pub fn is_empty(&self) -> bool {
        self.0.count == 0
    }

    /// Creates a scanner.
    pub fn scanner(&self) -> ReferenceScanner {
        let found = Found { found: vec![false; self.0.count], missing: self.0.count };
        ReferenceScanner { needles: self.clone(), found, tail: Vec::new() }
    }
}

/// Searches streams, one after the other, and collects the needles that occur in any of them.
#[derive(Debug, Clone)]
pub struct ReferenceScanner {
    needles: ReferencePattern,
    found: Found,
    /// The last bytes of the current stream, at most one less than the longest needle has.
    tail: Vec<u8>,
}

impl ReferenceScanner {
    /// Searches the next piece of the current stream.
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

    /// Ends the current stream. The next piece begins another one.
    pub fn end_stream(&mut self) {
        self.tail.clear();
    }

    /// Searches bytes that are not part of a stream, such as a name. The current stream can be continued afterwards.
    pub fn scan_whole(&mut self, bytes: &[u8]) {
        if self.found.missing > 0 {
            self.needles.0.engine.scan(bytes, &mut self.found);
        }
    }

    /// Whether every needle has been found, so that there is no need to search further.
    pub fn is_complete(&self) -> bool {
        self.found.missing == 0
    }

    /// The indexes of the needles that have been found.
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
            Self::Automaton(automaton) => automaton.scan(bytes, found),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const STORE_HASH: &str = "0c6kzph7l0dcbfmjap64f0czdafn3b7x";
    const OTHER_HASH: &str = "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz";

    fn naive(needles: &[Vec<u8>], haystack: &[u8]) -> BTreeSet<u64> {
        let occurs = |needle: &Vec<u8>| haystack.windows(needle.len()).any(|window| window == needle);
        (0..).zip(needles).filter(|(_, needle)| occurs(needle)).map(|(index, _)| index).collect()
    }

    /// The needles found when the haystack is fed in pieces of these sizes, in turn.
    fn found_in_pieces(needles: &ReferencePattern, haystack: &[u8], sizes: &[usize]) -> BTreeSet<u64> {
        let mut scanner = needles.scanner();
        let mut rest = haystack;
        for size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, after) = rest.split_at(rest.len().min(*size));
            scanner.feed(piece);
            rest = after;
        }
        scanner.found()
    }

    fn all<N: AsRef<[u8]>>(needles: impl IntoIterator<Item = N>) -> ReferencePattern {
        ReferencePattern::new(needles).unwrap()
    }

    #[test]
    fn only_sets_of_store_hashes_take_the_skip_scan() {
        let takes_skip = |needles: &[&str]| matches!(all(needles).0.engine, Engine::Skip(_));
        assert!(takes_skip(&[STORE_HASH, OTHER_HASH]));
        assert!(!takes_skip(&[STORE_HASH, "e"]));
        assert!(!takes_skip(&["0c6kzph7l0dcbfmjap64f0czdafn3b7e"]));
        assert!(!takes_skip(&["0C6KZPH7L0DCBFMJAP64F0CZDAFN3B7X"]));
    }

    #[test]
    fn a_needle_is_found_wherever_the_stream_is_cut() {
        for needles in [all([STORE_HASH, OTHER_HASH]), all([STORE_HASH, "never there"])] {
            let haystack = format!("some e {STORE_HASH} e text").into_bytes();
            for first in 0..=haystack.len() {
                for second in first..=haystack.len() {
                    let mut scanner = needles.scanner();
                    scanner.feed(&haystack[..first]);
                    scanner.feed(&haystack[first..second]);
                    scanner.feed(&haystack[second..]);
                    assert_eq!(scanner.found(), BTreeSet::from([0]), "cut at {first} and {second}");
                }
            }
            assert_eq!(found_in_pieces(&needles, &haystack, &[1]), BTreeSet::from([0]));
        }
    }

    #[test]
    fn equal_overlapping_and_contained_needles_are_all_found() {
        let needles = all(["abc", "bcd", "abc", "b", "abcd", "x"]);
        assert_eq!(found_in_pieces(&needles, b"..abcd..", &[3]), BTreeSet::from([0, 1, 2, 3, 4]));
        let hashes = all([STORE_HASH, OTHER_HASH, STORE_HASH]);
        assert_eq!(found_in_pieces(&hashes, STORE_HASH.as_bytes(), &[32]), BTreeSet::from([0, 2]));
    }

    #[test]
    fn a_run_of_the_alphabet_is_searched_at_every_place() {
        let needles = all([STORE_HASH]);
        for before in 0..70 {
            let haystack = format!("{}{STORE_HASH}{}", &OTHER_HASH.repeat(3)[..before], &OTHER_HASH[..before % 31]);
            assert_eq!(found_in_pieces(&needles, haystack.as_bytes(), &[haystack.len()]), BTreeSet::from([0]));
        }
    }

    #[test]
    fn streams_names_and_targets_are_not_joined() {
        for needles in [all(["abcd"]), all([STORE_HASH])] {
            let needle = if needles.0.max_bytes == 4 { "abcd" } else { STORE_HASH };
            let (first, second) = needle.as_bytes().split_at(needle.len() / 2);
            let mut scanner = needles.scanner();
            scanner.feed(first);
            scanner.end_stream();
            scanner.feed(second);
            assert!(scanner.found().is_empty());

            scanner.end_stream();
            scanner.feed(first);
            scanner.scan_whole(second);
            assert!(scanner.found().is_empty());
            scanner.feed(second);
            assert!(scanner.is_complete());

            let mut scanner = needles.scanner();
            scanner.scan_whole(format!("{needle}-name").as_bytes());
            assert!(scanner.is_complete());
        }
    }

    #[test]
    fn no_needles_match_nothing_and_empty_ones_are_refused() {
        let none = all::<&str>([]);
        assert!(none.is_empty() && none.scanner().is_complete());
        assert_eq!(found_in_pieces(&none, b"anything", &[2]), BTreeSet::new());
        assert!(matches!(ReferencePattern::new(["a", ""]), Err(PatternError::Empty { index: 1 })));
    }

    #[test]
    fn an_automaton_that_would_take_too_much_memory_is_refused() {
        assert_eq!(automaton_size(&["ab", "ab", "b"]), (2 + 2 + 1) + (1 + 1));
        let suffixes: Vec<String> = (1..400).map(|length| "a".repeat(length)).collect();
        let Err(PatternError::TooLarge { size }) = ReferencePattern::new(&suffixes) else { panic!("not refused") };
        assert!(size > MAX_AUTOMATON_SIZE);
        assert_eq!(automaton_size(&vec![STORE_HASH; 65_536]), 0);
        let names: Vec<String> = (0..10_000).map(|name| format!("{STORE_HASH}-name-{}", name * name)).collect();
        assert!(automaton_size(&names) < MAX_AUTOMATON_SIZE / 4);
    }

    /// Few letters, so that matches and near misses are common.
    fn arb_general() -> impl Strategy<Value = (Vec<Vec<u8>>, Vec<u8>)> {
        let letters = || prop_oneof![Just(b'a'), Just(b'b'), Just(0xff)];
        (vec(vec(letters(), 1..6), 1..6), vec(letters(), 0..40))
    }

    /// Hashes among text of the alphabet and other bytes.
    fn arb_hashes() -> impl Strategy<Value = (Vec<Vec<u8>>, Vec<u8>)> {
        vec("[01z]{32}".prop_map(String::into_bytes), 1..6).prop_flat_map(|needles| {
            let piece = prop_oneof![
                3 => proptest::sample::select(needles.clone()),
                3 => "[01z]{0,40}".prop_map(String::into_bytes),
                1 => vec(any::<u8>(), 0..10),
                2 => (proptest::sample::select(needles.clone()), 0..32_usize).prop_map(|(needle, end)| needle[..end].to_vec()),
            ];
            (Just(needles), vec(piece, 0..8).prop_map(|pieces| pieces.concat()))
        })
    }

    proptest! {
        #[test]
        fn any_needles_in_any_pieces_are_found_as_by_a_naive_search(
            (needles, haystack) in prop_oneof![arb_general(), arb_hashes()],
            sizes in vec(1..50_usize, 1..6),
        ) {
            prop_assert_eq!(found_in_pieces(&all(&needles), &haystack, &sizes), naive(&needles, &haystack));
        }
    }
}

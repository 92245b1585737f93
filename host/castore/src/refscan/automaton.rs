use std::collections::HashMap;

use aho_corasick::{AhoCorasick, AhoCorasickKind, BuildError};

use super::Found;

/// Total length of needles up to which the fastest kind of automaton is used. It takes up to 1 KiB a byte.
pub(super) const MAX_FASTEST_BYTES: usize = 64 * 1024;

/// Searches for needles of any kind.
#[derive(Debug)]
pub(super) struct Automaton {
    search: AhoCorasick,
    /// The needles of each pattern. Equal needles share one, since each would add a match to every state.
    needles: Vec<Vec<usize>>,
}

impl Automaton {
    pub(super) fn new<N: AsRef<[u8]>>(needles: &[N]) -> Result<Self, BuildError> {
        let mut distinct = HashMap::<&[u8], Vec<usize>>::new();
        for (index, needle) in needles.iter().enumerate() {
            distinct.entry(needle.as_ref()).or_default().push(index);
        }
        let bytes: usize = distinct.keys().map(|needle| needle.len()).sum();
        let (patterns, needles): (Vec<_>, Vec<_>) = distinct.into_iter().unzip();
        let kind = (bytes > MAX_FASTEST_BYTES).then_some(AhoCorasickKind::ContiguousNFA);
        Ok(Self { search: AhoCorasick::builder().kind(kind).build(patterns)?, needles })
    }

    pub(super) fn scan(&self, bytes: &[u8], found: &mut Found) {
        for hit in self.search.find_overlapping_iter(bytes) {
            self.needles[hit.pattern().as_usize()].iter().for_each(|index| found.add(*index));
            if found.missing == 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_equal_needles_nor_long_ones_take_much_memory() {
        let mut equal = vec!["a".to_owned(); 10_000];
        equal.push("a".repeat(100));
        let long: Vec<String> = ('a'..='z').map(|letter| letter.to_string().repeat(4096)).collect();
        for (needles, most_bytes) in [(equal, 100_000), (long, 4_000_000)] {
            let bytes = Automaton::new(&needles).unwrap().search.memory_usage();
            assert!(bytes < most_bytes, "{bytes} bytes for {} needles", needles.len());
        }
    }

    #[test]
    fn an_automaton_takes_a_third_of_what_is_counted_at_most() {
        let hash = |index: u32| blake3::hash(&index.to_le_bytes());
        let of = |count, length: usize| -> Vec<Vec<u8>> {
            (0..count).map(|index| hash(index).as_bytes().repeat(1 + length / 32)[..length].to_vec()).collect()
        };
        let nested = (1..=200).map(|length| vec![b'a'; length]).collect();
        for needles in [of(21_000, 3), of(60_000, 4), of(20_000, 32), of(1000, 64), of(100, 4096), nested] {
            let taken = Automaton::new(&needles).unwrap().search.memory_usage() as u64;
            let counted = super::super::memory_bytes(&needles);
            assert!(3 * taken <= counted, "{taken} of {counted} bytes for {} needles", needles.len());
        }
    }
}

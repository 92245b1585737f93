use std::collections::HashMap;

use super::Found;

/// Length of the hash in a store path.
const LENGTH: usize = 32;

const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

const IN_ALPHABET: [bool; 256] = {
    let mut table = [false; 256];
    let mut index = 0;
    while index < ALPHABET.len() {
        table[ALPHABET[index] as usize] = true;
        index += 1;
    }
    table
};

/// Whether a [`SkipScan`] can search for this needle.
pub(super) fn takes(needle: &[u8]) -> bool {
    needle.len() == LENGTH && needle.iter().all(|byte| IN_ALPHABET[usize::from(*byte)])
}

/// Logarithm of the filter's size in bits. Its 8 KiB stay in the first-level cache.
const FILTER_BITS: u32 = 16;

/// Searches for needles of 32 characters of the nixbase32 alphabet.
///
/// A window of 32 bytes is checked from its end. At a byte outside of the alphabet, the window skips past that byte. In
/// binaries few windows consist of the alphabet alone. No byte is checked twice, since the window remembers how many of its
/// first bytes have been checked.
#[derive(Debug)]
pub(super) struct SkipScan {
    needles: HashMap<[u8; LENGTH], Vec<usize>>,
    filter: Box<[u64]>,
}

impl SkipScan {
    /// `None` when a needle is of another kind.
    pub(super) fn new<N: AsRef<[u8]>>(needles: &[N]) -> Option<Self> {
        let mut map = HashMap::<_, Vec<usize>>::new();
        let mut filter = vec![0; 1 << (FILTER_BITS - 6)].into_boxed_slice();
        for (index, needle) in needles.iter().enumerate() {
            let needle = <[u8; LENGTH]>::try_from(needle.as_ref()).ok().filter(|needle| takes(needle))?;
            let (word, bit) = filter_place(&needle);
            filter[word] |= bit;
            map.entry(needle).or_default().push(index);
        }
        Some(Self { needles: map, filter })
    }

    pub(super) fn scan(&self, bytes: &[u8], found: &mut Found) {
        let mut start = 0;
        let mut known_good = 0;
        loop {
            // Most windows of a binary end here, at their last byte, so the speed depends on this loop.
            while bytes.get(start + LENGTH - 1).is_some_and(|last| !IN_ALPHABET[usize::from(*last)]) {
                start += LENGTH;
                known_good = 0;
            }
            let Some(window) = bytes.get(start..).and_then(|rest| rest.first_chunk::<LENGTH>()) else { return };
            match (known_good..LENGTH).rev().find(|at| !IN_ALPHABET[usize::from(window[*at])]) {
                Some(bad) => {
                    start += bad + 1;
                    known_good = LENGTH - 1 - bad;
                }
                None => {
                    self.look_up(window, found);
                    if found.missing == 0 {
                        return;
                    }
                    start += 1;
                    known_good = LENGTH - 1;
                }
            }
        }
    }

    fn look_up(&self, window: &[u8; LENGTH], found: &mut Found) {
        let (word, bit) = filter_place(window);
        if self.filter[word] & bit == 0 {
            return;
        }
        for index in self.needles.get(window).into_iter().flatten() {
            found.add(*index);
        }
    }
}

/// The place of a needle in the filter, word and bit. It depends on the first eight bytes.
fn filter_place(needle: &[u8; LENGTH]) -> (usize, u64) {
    let [a, b, c, d, e, f, g, h, ..] = *needle;
    let hash = u64::from_le_bytes([a, b, c, d, e, f, g, h]).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let place = hash >> (64 - FILTER_BITS);
    ((place >> 6) as usize, 1 << (place & 63))
}

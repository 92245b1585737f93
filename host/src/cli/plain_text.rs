//! Filters the log of an untrusted build for a terminal.

use std::mem;

use vte::{Parser, Perform};

use crate::text::{changes_direction, cut_character};

// With the feature `std` the parser would store control strings without limit.
const _: () = assert!(size_of::<Parser>() > 1024, "vte must be built without its feature `std`");

/// Keeps the text, tabs and newlines of one stream, and removes everything that controls a terminal: escape sequences,
/// control characters, and characters that change the direction of text. The stream may be split anywhere.
#[derive(Default)]
pub(crate) struct PlainText {
    parser: Parser,
    kept: Kept,
    /// The first bytes of an incomplete character. The parser never sees a split character: vte 0.15 loses text after some
    /// of them.
    cut: Vec<u8>,
}

#[derive(Default)]
struct Kept {
    text: String,
    /// Whether the last character was a carriage return. It begins a new line (progress bars), unless a newline follows.
    returned: bool,
}

impl PlainText {
    /// Filters the next bytes.
    pub(crate) fn filter(&mut self, bytes: &[u8]) -> String {
        let mut joined = mem::take(&mut self.cut);
        let bytes = if joined.is_empty() {
            bytes
        } else {
            joined.extend_from_slice(bytes);
            &joined
        };
        let (whole, cut) = bytes.split_at(bytes.len() - cut_character(bytes));
        self.cut = cut.to_vec();
        self.parser.advance(&mut self.kept, whole);
        mem::take(&mut self.kept.text)
    }
}

impl Kept {
    fn push(&mut self, c: char) {
        if mem::take(&mut self.returned) && c != '\n' {
            self.text.push('\n');
        }
        self.text.push(c);
    }
}

impl Perform for Kept {
    fn print(&mut self, c: char) {
        if !c.is_control() && !changes_direction(c) {
            self.push(c);
        }
    }

    fn execute(&mut self, byte: u8) {
        match byte {
            b'\n' | b'\t' => self.push(byte.into()),
            b'\r' => self.returned = true,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whole(bytes: &[u8]) -> String {
        PlainText::default().filter(bytes)
    }

    #[test]
    fn text_stays_and_control_goes() {
        for (bytes, expected) in [
            (b"hello\tworld\n".as_slice(), "hello\tworld\n"),
            ("gr\u{fc}n \u{1f980}\n".as_bytes(), "gr\u{fc}n \u{1f980}\n"),
            (b"\x1b[31mred\x1b[0m", "red"),
            (b"\x1b]0;title\x07after", "after"),
            (b"\x1b]52;c;ZXZpbA==\x1b\\after", "after"),
            (b"\x1bP1;2|device\x1b\\after", "after"),
            (b"\x1bc\x1b[2J\x1b[Hcleared", "cleared"),
            (b"a\x08\x08\x07\x00\x0c\x0bb", "ab"),
            ("\u{9b}31mC1 as UTF-8".as_bytes(), "31mC1 as UTF-8"),
            (b"10%\r20%\r\n30%\n", "10%\n20%\n30%\n"),
            ("\u{202e}backwards".as_bytes(), "backwards"),
        ] {
            assert_eq!(whole(bytes), expected, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn a_cut_character_loses_nothing() {
        for bytes in ["[\u{80}[\u{1f980}".as_bytes(), b"\xc2\x80[\x80[", b"\xf0\x9f\xa6\x1b[31mred", b"\xe0\xe0\xa4x"] {
            for cut in 0..=bytes.len() {
                let (first, second) = bytes.split_at(cut);
                let mut plain = PlainText::default();
                let pieces = plain.filter(first) + &plain.filter(second);
                assert_eq!(pieces, whole(bytes), "{} cut at {cut}", bytes.escape_ascii());
            }
        }
    }

    #[test]
    fn a_sequence_without_end_is_not_kept() {
        let mut plain = PlainText::default();
        plain.filter(b"\x1b]0;");
        for _ in 0..1000 {
            assert_eq!(plain.filter(&[b'x'; 4096]), "");
        }
        assert_eq!(plain.filter(b"\x07after"), "after");
    }

    proptest! {
        #[test]
        fn cuts_change_nothing(bytes in proptest::collection::vec(prop_oneof![any::<u8>(), Just(0x1b), Just(b'['), Just(b'\r')], 0..64), cut in 0..64_usize) {
            let (first, second) = bytes.split_at(cut.min(bytes.len()));
            let mut plain = PlainText::default();
            let pieces = plain.filter(first) + &plain.filter(second);
            prop_assert!(!pieces.contains(|c: char| c.is_control() && !matches!(c, '\n' | '\t')));
            prop_assert_eq!(pieces, whole(&bytes));
        }
    }
}

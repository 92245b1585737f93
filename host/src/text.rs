//! What an untrusted build has written, as characters.

/// The length of an incomplete character at the end: at most three bytes.
pub(crate) fn cut_character(bytes: &[u8]) -> usize {
    let continuations = bytes.iter().rev().take(3).take_while(|&&byte| byte & 0xc0 == 0x80).count();
    let length = match bytes.iter().rev().nth(continuations) {
        Some(0xc2..0xe0) => 2,
        Some(0xe0..0xf0) => 3,
        Some(0xf0..0xf5) => 4,
        _ => 1,
    };
    if continuations + 1 < length { continuations + 1 } else { 0 }
}

/// Whether a character changes the direction of the text around it.
pub(crate) fn changes_direction(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

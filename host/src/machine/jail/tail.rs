//! The last part of what a child wrote, bounded and made harmless to print.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// How much of a child's output is kept, in bytes.
pub(super) const TAIL_BYTES: usize = 16 * 1024;

/// The end of an output stream. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Tail(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    bytes: VecDeque<u8>,
    cut: bool,
}

impl Tail {
    /// Reads until the last writer has closed the pipe. A read error ends it as well: this is for diagnosis only.
    pub(super) async fn follow(self, mut pipe: pipe::Receiver) {
        let mut buffer = [0; 4096];
        loop {
            match pipe.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(length) => self.push(&buffer[..length]),
            }
        }
    }

    fn push(&self, bytes: &[u8]) {
        let mut kept = self.0.lock();
        kept.bytes.extend(bytes);
        let excess = kept.bytes.len().saturating_sub(TAIL_BYTES);
        if excess > 0 {
            kept.bytes.drain(..excess);
            kept.cut = true;
        }
    }

    /// The kept text, see [`escape`]; begins with `…` where something before it was let go.
    pub(super) fn text(&self) -> String {
        let (bytes, cut) = {
            let kept = self.0.lock();
            (kept.bytes.iter().copied().collect::<Vec<u8>>(), kept.cut)
        };
        let text = escape(&bytes);
        if cut { format!("…{text}") } else { text }
    }
}

/// Foreign text for a message: on one line, and what could steer a terminal or hide is shown as an escape.
pub(crate) fn one_line(text: &str) -> String {
    let plain = |c| matches!(c, '\'' | '"' | '\\');
    text.chars().flat_map(|c| if plain(c) { vec![c] } else { c.escape_debug().collect() }).collect()
}

/// Foreign bytes for a terminal or a log: lines stay lines, line ends become `\n`, the white space around it goes, and
/// what could steer a terminal or isn't UTF-8 is shown as an escape.
pub(crate) fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        let mut characters = chunk.valid().chars().peekable();
        while let Some(character) = characters.next() {
            match character {
                '\r' if characters.peek() == Some(&'\n') => {}
                '\n' | '\t' => text.push(character),
                control if control.is_control() => text.extend(control.escape_default()),
                plain => text.push(plain),
            }
        }
        for byte in chunk.invalid() {
            write!(text, "\\x{byte:02x}").expect("writing to a string never fails");
        }
    }
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_bytes_are_kept() {
        let tail = Tail::default();
        tail.push(b"first");
        assert_eq!(tail.text(), "first");
        for _ in 0..10 {
            tail.push(&[b'x'; TAIL_BYTES / 2]);
        }
        tail.push(b"last");
        assert_eq!(tail.0.lock().bytes.len(), TAIL_BYTES);
        assert!(tail.text().starts_with("…xxx"));
        assert!(tail.text().ends_with("xlast"));
    }

    #[test]
    fn nothing_printed_can_steer_a_terminal() {
        assert_eq!(
            escape(b"\x1bc\x1b[2Jboot\r\nnext\tline\rback \x00\xff\xc3\xa9\xc2\x9b\n"),
            "\\u{1b}c\\u{1b}[2Jboot\nnext\tline\\rback \\u{0}\\xffé\\u{9b}"
        );
    }

    #[test]
    fn a_message_stays_one_plain_line() {
        assert_eq!(
            one_line("can't \"open\" a\\b é\n\x1b[2J\u{202e}\u{9b}"),
            "can't \"open\" a\\b é\\n\\u{1b}[2J\\u{202e}\\u{9b}"
        );
    }
}

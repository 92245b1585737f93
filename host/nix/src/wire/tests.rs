use std::io::{self, Read};

use proptest::prelude::*;

use super::*;

/// Bytes without end.
struct Endless(Vec<u8>, u64);

impl Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        for byte in &mut *buffer {
            *byte = self.0[usize::try_from(self.1).unwrap() % self.0.len()];
            self.1 += 1;
        }
        Ok(buffer.len())
    }
}

fn written(write: impl FnOnce(&mut Writer<Vec<u8>>) -> io::Result<()>) -> Vec<u8> {
    let mut writer = Writer(Vec::new());
    write(&mut writer).unwrap();
    writer.0
}

fn rule(error: &WireError) -> String {
    assert!(matches!(error, WireError::Broken { .. }), "{error:?}");
    error.to_string()
}

#[test]
fn primitives_are_what_the_protocol_says() {
    assert_eq!(written(|writer| writer.integer(0x0102_u64)), [2, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(written(|writer| writer.string("abc")), *b"\x03\0\0\0\0\0\0\0abc\0\0\0\0\0");
    assert_eq!(written(|writer| writer.string("12345678")), *b"\x08\0\0\0\0\0\0\x0012345678");
    assert_eq!(
        written(|writer| writer.texts(["", "a"])),
        *b"\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0a\0\0\0\0\0\0\0"
    );
}

#[test]
fn a_string_of_a_terabyte_is_refused_before_memory_is_taken() {
    let bytes = (1_u64 << 40).to_le_bytes();
    let mut reader = Reader::new(Endless(bytes.into(), 0));
    let error = rule(&reader.string("the name").unwrap_err());
    assert_eq!(error, "the name would take the message beyond 33554432 bytes with 1099511627776 more");
}

#[test]
fn a_list_of_a_billion_strings_is_refused_before_memory_is_taken() {
    for count in [1_000_000_000, u64::MAX] {
        let bytes = [count.to_le_bytes(), [0; 8]].concat();
        let mut reader = Reader::new(Endless(bytes, 0));
        let error = rule(&reader.texts("the set of paths").unwrap_err());
        assert!(error.starts_with("the set of paths "), "{error}");
        assert_eq!(reader.input().1, 8, "an element was read");
    }
}

#[test]
fn many_strings_that_fit_alone_are_refused_together() {
    let one = written(|writer| writer.string(vec![7; 1024 * 1024]));
    let mut reader = Reader::new(Endless(one, 0));
    let taken = (0..).take_while(|_| reader.string("an argument").is_ok()).count();
    assert_eq!(taken as u64, MAX_MESSAGE_BYTES / (1024 * 1024));
    reader.begin_message();
    let mut reader = Reader::new(&[1_u8][..]);
    assert!(matches!(reader.integer(), Err(WireError::Io(_))));
}

#[test]
fn other_values_than_allowed_are_named() {
    let mut reader = Reader::new(&[7, 0, 0, 0, 0, 0, 0, 0][..]);
    assert_eq!(rule(&reader.boolean("repair").unwrap_err()), "repair must be 0 or 1, not 7");
    let mut reader = Reader::new(&b"\x01\0\0\0\0\0\0\0a\0\0\0\0\0\0\x01"[..]);
    assert_eq!(rule(&reader.string("the name").unwrap_err()), "the name must be padded with zeros");
    let bytes = written(|writer| writer.string(b"\xff"));
    assert_eq!(rule(&Reader::new(&*bytes).text("the name").unwrap_err()), "the name must be UTF-8, not \"\\xff\"");
    let bytes = written(|writer| writer.string("/etc/passwd"));
    let error = rule(&Reader::new(&*bytes).path("the path").unwrap_err());
    assert_eq!(error, "the path must lie in /nix/store, not \"/etc/passwd\"");
}

#[test]
fn a_frame_of_a_terabyte_is_read_as_it_comes() {
    let begin = [(1_u64 << 40).to_le_bytes().as_slice(), b"abc"].concat();
    let mut framed = Framed::new(&*begin);
    let mut read = Vec::new();
    let error = framed.read_to_end(&mut read).unwrap_err();
    assert_eq!((error.kind(), &*read), (io::ErrorKind::UnexpectedEof, &b"abc"[..]));
    assert!(read.capacity() < 1024 * 1024);
}

proptest! {
    #[test]
    fn frames_have_their_bytes_and_end_where_they_end(pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..8)) {
        let mut bytes = Vec::new();
        for piece in &pieces {
            bytes.extend((piece.len() as u64).to_le_bytes());
            bytes.extend(piece);
        }
        bytes.extend([0; 8]);
        bytes.extend(b"next");
        let mut input = &*bytes;
        let mut framed = Framed::new(&mut input);
        let mut read = Vec::new();
        framed.read_to_end(&mut read).unwrap();
        prop_assert_eq!(read, pieces.concat());
        prop_assert_eq!(framed.skip().unwrap(), 0);
        prop_assert_eq!(input, b"next");
    }

    #[test]
    fn strings_come_back(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
        let written = written(|writer| writer.string(&bytes));
        prop_assert_eq!(written.len() % 8, 0);
        prop_assert_eq!(Reader::new(&*written).string("it").unwrap(), bytes);
    }
}

//! Compressed files that can be read from any offset, in zstd's seekable format (its `contrib/seekable_format`).
//!
//! The content is cut into pieces of [`PIECE_BYTES`], each compressed as a frame of its own. A table of the frames' sizes follows
//! in a skippable frame, so other zstd programs read the file as usual.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek as _, SeekFrom, Write},
};

use zstd::bulk::Compressor;

/// zstd's own default.
const LEVEL: i32 = 3;

/// Bytes of content in each frame but the last.
const PIECE_BYTES: usize = 256 * 1024;

/// Begins the skippable frame with the table.
const SKIPPABLE_MAGIC: u32 = 0x184D_2A5E;

/// Ends the file.
const SEEKABLE_MAGIC: u32 = 0x8F92_EAB1;

/// The number of frames, a byte of flags, and the magic number.
const FOOTER_BYTES: u32 = 9;

/// A frame's size, and its content's.
const ENTRY_BYTES: u32 = 8;

/// Compresses everything from a reader, and returns the content's size in bytes.
pub(super) fn compress(from: &mut impl Read, to: &mut impl Write) -> io::Result<u64> {
    let mut compressor = Compressor::new(LEVEL)?;
    let (mut piece, mut table, mut content_bytes) = (Vec::with_capacity(PIECE_BYTES), Vec::new(), 0);
    let mut frames = 0_u32;
    loop {
        piece.clear();
        from.by_ref().take(PIECE_BYTES as u64).read_to_end(&mut piece)?;
        if piece.is_empty() {
            break;
        }
        let frame = compressor.compress(&piece)?;
        to.write_all(&frame)?;
        for bytes in [frame.len(), piece.len()] {
            table.extend(u32::try_from(bytes).map_err(io::Error::other)?.to_le_bytes());
        }
        content_bytes += piece.len() as u64;
        frames += 1;
    }
    to.write_all(&SKIPPABLE_MAGIC.to_le_bytes())?;
    to.write_all(&(frames * ENTRY_BYTES + FOOTER_BYTES).to_le_bytes())?;
    to.write_all(&table)?;
    to.write_all(&frames.to_le_bytes())?;
    to.write_all(&[0])?;
    to.write_all(&SEEKABLE_MAGIC.to_le_bytes())?;
    Ok(content_bytes)
}

/// Moves to the frame that has this offset of the content, and returns how many bytes of the frame's content come before it. In a
/// file without a table this is the first frame.
pub(super) fn seek(file: &mut File, offset: u64) -> io::Result<u64> {
    let (start, before) = frame_at(file, offset)?.unwrap_or((0, offset));
    file.seek(SeekFrom::Start(start))?;
    Ok(before)
}

/// Where the frame with this offset of the content begins in the file, and how many bytes of its content come before the offset.
fn frame_at(file: &mut File, offset: u64) -> io::Result<Option<(u64, u64)>> {
    let size = file.metadata()?.len();
    let mut footer = [0; FOOTER_BYTES as usize];
    let Some(footer_start) = size.checked_sub(footer.len() as u64) else { return Ok(None) };
    file.seek(SeekFrom::Start(footer_start))?;
    file.read_exact(&mut footer)?;
    let [f0, f1, f2, f3, flags, magic @ ..] = footer;
    let frames = u32::from_le_bytes([f0, f1, f2, f3]);
    let table_start = footer_start.checked_sub(u64::from(frames) * u64::from(ENTRY_BYTES));
    let (true, Some(table_start)) = (flags == 0 && u32::from_le_bytes(magic) == SEEKABLE_MAGIC, table_start) else {
        return Ok(None);
    };
    file.seek(SeekFrom::Start(table_start))?;
    let mut table = BufReader::new(file);
    let (mut start, mut before) = (0, offset);
    for _ in 0..frames {
        let mut entry = [0; ENTRY_BYTES as usize];
        table.read_exact(&mut entry)?;
        let [c0, c1, c2, c3, p0, p1, p2, p3] = entry;
        let piece_bytes = u64::from(u32::from_le_bytes([p0, p1, p2, p3]));
        if before < piece_bytes {
            break;
        }
        before -= piece_bytes;
        start += u64::from(u32::from_le_bytes([c0, c1, c2, c3]));
    }
    Ok(Some((start, before)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zstd::stream::read::Decoder;

    use super::*;

    fn file_with(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn read_from(file: &mut File, offset: u64) -> (u64, Vec<u8>) {
        let before = seek(file, offset).unwrap();
        let (mut decoder, mut rest) = (Decoder::new(file).unwrap(), Vec::new());
        io::copy(&mut decoder.by_ref().take(before), &mut io::sink()).unwrap();
        decoder.read_to_end(&mut rest).unwrap();
        (before, rest)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn every_offset_is_found_with_at_most_one_piece_before_it(
            len in 0..4 * PIECE_BYTES + 2, offset in any::<prop::sample::Index>(), seed: u8,
        ) {
            let content: Vec<u8> = (0..len).map(|index| (index % 251) as u8 ^ (index >> 16) as u8 ^ seed).collect();
            let mut packed = Vec::new();
            prop_assert_eq!(compress(&mut content.as_slice(), &mut packed).unwrap(), len as u64);
            prop_assert!(zstd::decode_all(packed.as_slice()).unwrap() == content);
            let offset = offset.index(len + 1);
            let (before, rest) = read_from(&mut file_with(&packed), offset as u64);
            prop_assert!(before < PIECE_BYTES as u64);
            prop_assert!(rest == content[offset..]);
        }
    }

    #[test]
    fn a_file_without_a_table_is_read_from_its_start() {
        let content = vec![7; 3 * PIECE_BYTES];
        let packed = zstd::encode_all(content.as_slice(), LEVEL).unwrap();
        let (before, rest) = read_from(&mut file_with(&packed), 500_000);
        assert_eq!(before, 500_000);
        assert!(rest == content[500_000..]);
        for bytes in [&b""[..], b"short", &[0; 9]] {
            assert_eq!(seek(&mut file_with(bytes), 5).unwrap(), 5);
        }
    }

    #[test]
    fn a_table_that_lies_is_an_error_or_a_wrong_frame_but_never_a_panic() {
        let content = vec![7; 3 * PIECE_BYTES];
        let mut packed = Vec::new();
        compress(&mut content.as_slice(), &mut packed).unwrap();
        let footer = packed.len() - FOOTER_BYTES as usize;
        for frames in [0, 1, 4, 5, 1000, u32::MAX] {
            let mut wrong = packed.clone();
            wrong[footer..footer + 4].copy_from_slice(&frames.to_le_bytes());
            for offset in [0, 500_000, u64::MAX] {
                drop(seek(&mut file_with(&wrong), offset));
            }
        }
    }
}

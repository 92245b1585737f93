//! zstd, with a limit on the memory of a decoder.

use std::io::{self, Read as _};

use zstd::{
    DEFAULT_COMPRESSION_LEVEL,
    stream::raw::{DParameter, Decoder, Operation as _},
};

/// Logarithm of the largest window that a decoder allocates: 8 MiB, which RFC 8878 recommends, and which is enough for levels
/// up to 19.
const MAX_WINDOW_LOG: u32 = 23;

/// Maximum output of one step of a decoder.
const OUTPUT_BYTES: usize = 128 * 1024;

pub(super) fn compress(contents: &[u8]) -> io::Result<Vec<u8>> {
    zstd::encode_all(contents, DEFAULT_COMPRESSION_LEVEL)
}

/// Decompresses an object, up to `max_bytes + 1` bytes.
pub(super) fn decompress(compressed: &[u8], max_bytes: usize) -> io::Result<Vec<u8>> {
    let mut decoder = zstd::Decoder::with_buffer(compressed)?;
    decoder.window_log_max(MAX_WINDOW_LOG)?;
    let mut contents = Vec::new();
    decoder.take(max_bytes as u64 + 1).read_to_end(&mut contents)?;
    Ok(contents)
}

/// Decompresses a frame that comes in pieces.
pub(super) struct FrameDecoder {
    decoder: Decoder<'static>,
    output: Box<[u8]>,
    ended: bool,
}

impl FrameDecoder {
    pub(super) fn new() -> io::Result<Self> {
        let mut decoder = Decoder::new()?;
        decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))?;
        Ok(Self { decoder, output: vec![0; OUTPUT_BYTES].into(), ended: false })
    }

    /// Takes bytes from the start of `compressed`. Returns their number and the decompressed bytes. Both are empty only when
    /// the frame has ended or `compressed` is empty.
    pub(super) fn step(&mut self, compressed: &[u8]) -> io::Result<(usize, &[u8])> {
        if self.ended {
            return Ok((0, &[]));
        }
        let status = self.decoder.run_on_buffers(compressed, &mut self.output)?;
        self.ended = status.remaining == 0;
        Ok((status.bytes_read, &self.output[..status.bytes_written]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decompression_is_bounded_and_restores_the_bytes() {
        let contents = vec![7; 1_000_000];
        let compressed = compress(&contents).unwrap();
        assert_eq!(decompress(&compressed, 1_000_000).unwrap(), contents);
        assert_eq!(decompress(&compressed, 999).unwrap().len(), 1_000);
        assert!(decompress(&compressed[..compressed.len() - 1], 1_000_000).is_err());
        assert!(decompress(b"no frame", 1_000_000).is_err());
    }

    #[test]
    fn a_frame_that_asks_for_a_huge_window_is_refused() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(27).unwrap();
        std::io::Write::write_all(&mut encoder, &vec![0; 1 << 24]).unwrap();
        let compressed = encoder.finish().unwrap();
        assert!(decompress(&compressed, 1 << 24).is_err());
        assert!(FrameDecoder::new().unwrap().step(&compressed).is_err());
    }

    #[test]
    fn a_frame_comes_in_pieces_of_bounded_size() {
        let compressed = compress(&vec![7; 1_000_000]).unwrap();
        let mut decoder = FrameDecoder::new().unwrap();
        let (mut rest, mut total) = (&compressed[..], 0);
        loop {
            let (taken, output) = decoder.step(&rest[..rest.len().min(5)]).unwrap();
            assert!(output.len() <= OUTPUT_BYTES);
            total += output.len();
            if taken == 0 && output.is_empty() {
                break;
            }
            rest = &rest[taken..];
        }
        assert_eq!((total, rest.len()), (1_000_000, 0));
    }
}

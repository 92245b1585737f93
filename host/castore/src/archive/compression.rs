//! gzip and zstd, recognized by their first bytes.

use std::io::{self, Cursor, Read, Write};

use flate2::{read::MultiGzDecoder, write::GzEncoder};

use super::{ArchiveError, WHOLE};

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// The last three bytes of a skippable zstd frame's magic, whose first is 0x50 to 0x5f.
const ZSTD_SKIPPABLE: &[u8] = &[0x2a, 0x4d, 0x18];

/// Known formats that are not supported.
const UNSUPPORTED: [(&[u8], &str); 3] = [(b"\xfd7zXZ\0", "xz"), (b"BZh", "bzip2"), (&[0x04, 0x22, 0x4d, 0x18], "lz4")];

/// Bytes that are enough to recognize a format.
const MAGIC_BYTES: u64 = 6;

/// How an archive is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, without a file name and a time.
    Gzip,
    /// zstd.
    Zstd,
}

/// Decompresses an archive if its first bytes say that it is compressed. Memory use does not depend on the decompressed
/// size.
///
/// # Errors
///
/// The source can't be read, or is compressed in another way.
pub fn decompress<'a>(mut source: impl Read + 'a) -> Result<Box<dyn Read + 'a>, ArchiveError> {
    let failed = |source| ArchiveError::read(&[], source);
    let mut magic = Vec::new();
    source.by_ref().take(MAGIC_BYTES).read_to_end(&mut magic).map_err(failed)?;
    let is_zstd = magic.starts_with(ZSTD)
        || magic.first().is_some_and(|first| first & 0xf0 == 0x50) && magic[1..].starts_with(ZSTD_SKIPPABLE);
    let unsupported = UNSUPPORTED.iter().find(|(other, _)| magic.starts_with(other));
    if let Some((_, name)) = unsupported {
        let rule = format!("is compressed with {name}; only gzip and zstd are supported: decompress it first");
        return Err(ArchiveError::Malformed { at: WHOLE.to_owned(), rule });
    }
    let is_gzip = magic.starts_with(GZIP);
    let whole = Cursor::new(magic).chain(source);
    Ok(if is_gzip {
        Box::new(MultiGzDecoder::new(whole))
    } else if is_zstd {
        Box::new(zstd::Decoder::new(whole).map_err(failed)?)
    } else {
        Box::new(whole)
    })
}

/// Compresses the written bytes. The output depends only on the input.
pub enum Compressor<W: Write> {
    /// Not at all.
    None(W),
    /// As gzip.
    Gzip(GzEncoder<W>),
    /// As zstd.
    Zstd(zstd::Encoder<'static, W>),
}

impl<W: Write> Compressor<W> {
    /// Compresses into `out`.
    ///
    /// # Errors
    ///
    /// There is not enough memory.
    pub fn new(out: W, compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            Compression::None => Self::None(out),
            Compression::Gzip => Self::Gzip(GzEncoder::new(out, flate2::Compression::default())),
            Compression::Zstd => {
                let mut encoder = zstd::Encoder::new(out, zstd::DEFAULT_COMPRESSION_LEVEL)?;
                encoder.include_checksum(true)?;
                Self::Zstd(encoder)
            }
        })
    }

    /// Completes the output. Without this call it is cut short.
    ///
    /// # Errors
    ///
    /// `out` failed.
    pub fn finish(self) -> io::Result<W> {
        let mut out = match self {
            Self::None(out) => out,
            Self::Gzip(encoder) => encoder.finish()?,
            Self::Zstd(encoder) => encoder.finish()?,
        };
        out.flush()?;
        Ok(out)
    }
}

impl<W: Write> Write for Compressor<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::None(out) => out.write(bytes),
            Self::Gzip(encoder) => encoder.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::None(out) => out.flush(),
            Self::Gzip(encoder) => encoder.flush(),
            Self::Zstd(encoder) => encoder.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compressed(contents: &[u8], compression: Compression) -> Vec<u8> {
        let mut compressor = Compressor::new(Vec::new(), compression).unwrap();
        compressor.write_all(contents).unwrap();
        compressor.finish().unwrap()
    }

    fn decompressed(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut contents = Vec::new();
        decompress(bytes).map_err(io::Error::other)?.read_to_end(&mut contents)?;
        Ok(contents)
    }

    #[test]
    fn formats_are_recognized_by_their_first_bytes() {
        for contents in [b"".as_slice(), b"x", b"some text, some text", &[7; 300_000]] {
            for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
                let bytes = compressed(contents, compression);
                assert_eq!(decompressed(&bytes).unwrap(), contents);
                assert_eq!(compressed(contents, compression), bytes);
            }
        }
    }

    #[test]
    fn several_compressed_pieces_are_one() {
        for compression in [Compression::Gzip, Compression::Zstd] {
            assert_eq!(
                decompressed(&[compressed(b"on", compression), compressed(b"e", compression)].concat()).unwrap(),
                b"one"
            );
        }
        // A skippable frame of three bytes, as some tools begin with.
        let skippable = [b"\x5a\x2a\x4d\x18\x03\0\0\0abc".as_slice(), &compressed(b"one", Compression::Zstd)].concat();
        assert_eq!(decompressed(&skippable).unwrap(), b"one");
    }

    #[test]
    fn truncated_and_damaged_data_are_errors() {
        for compression in [Compression::Gzip, Compression::Zstd] {
            let whole = compressed(&(0..50_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>(), compression);
            assert!(decompressed(&whole[..whole.len() - 1]).is_err());
            assert!(decompressed(&whole[..whole.len() / 2]).is_err());
            let mut changed = whole;
            let last = changed.len() - 1;
            changed[last] ^= 1;
            assert!(decompressed(&changed).is_err());
        }
    }

    #[test]
    fn other_formats_are_named_in_the_error() {
        let refused = decompress(b"\xfd7zXZ\0\0".as_slice()).err().unwrap().to_string();
        assert!(refused.contains("compressed with xz"), "{refused}");
    }
}

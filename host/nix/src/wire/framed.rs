use std::io::{self, Read};

/// The bytes in the frames of a framed source, as they come.
#[derive(Debug)]
pub struct Framed<R> {
    input: R,
    /// Bytes left of this frame.
    left: u64,
    ended: bool,
}

impl<R: Read> Framed<R> {
    /// Reads frames from here on.
    pub fn new(input: R) -> Self {
        Self { input, left: 0, ended: false }
    }

    /// Skips what is left up to the last frame, so that the next message can be read.
    ///
    /// # Errors
    ///
    /// The input ended or failed.
    pub fn skip(&mut self) -> io::Result<u64> {
        io::copy(self, &mut io::sink())
    }
}

impl<R: Read> Read for Framed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.left == 0 && !self.ended {
            let mut length = [0; 8];
            self.input.read_exact(&mut length)?;
            self.left = u64::from_le_bytes(length);
            self.ended = self.left == 0;
        }
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        let read = self.input.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= read as u64;
        Ok(read)
    }
}

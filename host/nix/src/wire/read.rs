use std::{collections::BTreeSet, io::Read};

use super::{WireError, padding};
use crate::{StorePath, quoted};

/// Bytes of the largest message; see [`Reader::begin_message`].
pub const MAX_MESSAGE_BYTES: u64 = 32 * 1024 * 1024;

/// What an element of a list costs beside its bytes: about what it takes in memory.
const ELEMENT_BYTES: u64 = 64;

/// Bytes of a string for which memory is taken before they have arrived.
const PIECE_BYTES: u64 = 64 * 1024;

/// Reads the primitives, within a budget for each message.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    left: u64,
}

impl<R: Read> Reader<R> {
    /// Reads a first message from these bytes.
    pub fn new(input: R) -> Self {
        Self { input, left: MAX_MESSAGE_BYTES }
    }

    /// Begins a message, which may have [`MAX_MESSAGE_BYTES`] in strings and elements of lists.
    pub fn begin_message(&mut self) {
        self.left = MAX_MESSAGE_BYTES;
    }

    /// The bytes that follow.
    pub fn input(&mut self) -> &mut R {
        &mut self.input
    }

    /// Takes bytes from the message's budget.
    fn charge(&mut self, field: &'static str, bytes: u64) -> Result<(), WireError> {
        match self.left.checked_sub(bytes) {
            Some(left) => self.left = left,
            None => {
                let rule = format!("would take the message beyond {MAX_MESSAGE_BYTES} bytes with {bytes} more");
                return Err(WireError::broken(field, rule));
            }
        }
        Ok(())
    }

    /// Reads an integer.
    ///
    /// # Errors
    ///
    /// The input ended or failed.
    pub fn integer(&mut self) -> Result<u64, WireError> {
        let mut bytes = [0; 8];
        self.input.read_exact(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads a truth value.
    ///
    /// # Errors
    ///
    /// It is neither 0 nor 1, or the input ended or failed.
    pub fn boolean(&mut self, field: &'static str) -> Result<bool, WireError> {
        match self.integer()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(WireError::broken(field, format!("must be 0 or 1, not {other}"))),
        }
    }

    /// Reads a string of any bytes.
    ///
    /// # Errors
    ///
    /// It exceeds the message's budget, is not padded with zeros, or the input ended or failed.
    pub fn string(&mut self, field: &'static str) -> Result<Vec<u8>, WireError> {
        let length = self.integer()?;
        self.charge(field, length)?;
        let mut bytes = Vec::new();
        let mut left = length;
        while left > 0 {
            let piece = left.min(PIECE_BYTES);
            let begin = bytes.len();
            bytes.resize(begin + usize::try_from(piece).unwrap_or_default(), 0);
            self.input.read_exact(&mut bytes[begin..])?;
            left -= piece;
        }
        let mut zeros = [0; 8];
        let zeros = &mut zeros[..padding(length)];
        self.input.read_exact(zeros)?;
        if zeros.iter().any(|&zero| zero != 0) {
            return Err(WireError::broken(field, "must be padded with zeros"));
        }
        Ok(bytes)
    }

    /// Reads a text.
    ///
    /// # Errors
    ///
    /// As [`Reader::string`], or it is not UTF-8.
    pub fn text(&mut self, field: &'static str) -> Result<String, WireError> {
        String::from_utf8(self.string(field)?)
            .map_err(|error| WireError::broken(field, format!("must be UTF-8, not {}", quoted(error.as_bytes()))))
    }

    /// Reads a list, with a function for one element.
    ///
    /// # Errors
    ///
    /// It exceeds the message's budget, or the function fails.
    pub fn list<T, L: Default + Extend<T>>(
        &mut self,
        field: &'static str,
        mut element: impl FnMut(&mut Self) -> Result<T, WireError>,
    ) -> Result<L, WireError> {
        let count = self.integer()?;
        // Also keeps lists whose elements are empty within bounds.
        match count.checked_mul(ELEMENT_BYTES) {
            Some(bytes) => self.charge(field, bytes)?,
            None => return Err(WireError::broken(field, format!("must not have {count} elements"))),
        }
        let mut list = L::default();
        for _ in 0..count {
            list.extend([element(self)?]);
        }
        Ok(list)
    }

    /// Reads a list of texts.
    ///
    /// # Errors
    ///
    /// As [`Reader::list`] and [`Reader::text`].
    pub fn texts(&mut self, field: &'static str) -> Result<Vec<String>, WireError> {
        self.list(field, |reader| reader.text(field))
    }

    /// Reads a whole store path.
    ///
    /// # Errors
    ///
    /// As [`Reader::text`], or it is no store path.
    pub fn path(&mut self, field: &'static str) -> Result<StorePath, WireError> {
        let text = self.text(field)?;
        StorePath::parse(&text).map_err(|error| WireError::broken(field, error.to_string()))
    }

    /// Reads a store path, or an empty string for none.
    ///
    /// # Errors
    ///
    /// As [`Reader::path`].
    pub fn optional_path(&mut self, field: &'static str) -> Result<Option<StorePath>, WireError> {
        let text = self.text(field)?;
        if text.is_empty() {
            return Ok(None);
        }
        StorePath::parse(&text).map(Some).map_err(|error| WireError::broken(field, error.to_string()))
    }

    /// Reads a set of store paths.
    ///
    /// # Errors
    ///
    /// As [`Reader::list`] and [`Reader::path`].
    pub fn paths(&mut self, field: &'static str) -> Result<BTreeSet<StorePath>, WireError> {
        self.list(field, |reader| reader.path(field))
    }
}

use std::{
    fmt::Display,
    io::{self, Write},
};

use super::padding;

/// Writes the primitives. Nothing is flushed.
#[derive(Debug)]
pub struct Writer<W>(pub W);

impl<W: Write> Writer<W> {
    /// Writes an integer.
    ///
    /// # Errors
    ///
    /// Those of the output; as with all methods.
    pub fn integer(&mut self, value: impl Into<u64>) -> io::Result<()> {
        self.0.write_all(&value.into().to_le_bytes())
    }

    /// Writes a string.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn string(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        let bytes = bytes.as_ref();
        let length = bytes.len() as u64;
        self.integer(length)?;
        self.0.write_all(bytes)?;
        self.0.write_all(&[0; 8][..padding(length)])
    }

    /// Writes a text.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn text(&mut self, text: impl Display) -> io::Result<()> {
        self.string(text.to_string())
    }

    /// Writes a list of texts.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn texts<T: Display>(
        &mut self,
        texts: impl IntoIterator<Item = T, IntoIter: ExactSizeIterator>,
    ) -> io::Result<()> {
        let texts = texts.into_iter();
        self.integer(texts.len() as u64)?;
        for text in texts {
            self.text(text)?;
        }
        Ok(())
    }

    /// Writes a text, or an empty string for none.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn optional(&mut self, text: Option<impl Display>) -> io::Result<()> {
        match text {
            Some(text) => self.text(text),
            None => self.string(b""),
        }
    }
}

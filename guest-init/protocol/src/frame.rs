//! Frames: the length of a message as a little-endian `u32`, and the message, encoded with postcard.
//!
//! ```
//! use cofferdam_protocol::{FromHost, frame::{FrameError, FrameReader, FrameWriter, MAX_FROM_HOST_BYTES}};
//!
//! # fn main() -> Result<(), FrameError> {
//! let mut wire = Vec::new();
//! let mut writer = FrameWriter::new(&mut wire, MAX_FROM_HOST_BYTES);
//! writer.write(&FromHost::Input(b"ls\n".to_vec().into()))?;
//! writer.write(&FromHost::Acknowledge)?;
//!
//! let mut reader = FrameReader::new(wire.as_slice(), MAX_FROM_HOST_BYTES);
//! assert!(matches!(reader.read()?, FromHost::Input(bytes) if *bytes == b"ls\n"));
//! assert_eq!(reader.read::<FromHost>()?, FromHost::Acknowledge);
//!
//! // The peer has closed the connection.
//! assert!(matches!(reader.read::<FromHost>(), Err(FrameError::Io(_))));
//! # Ok(())
//! # }
//! ```

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Largest frame that a guest may send, header included, in bytes.
///
/// It is also the guest's largest write, which may have several small frames. vhost-device-vsock 0.3 stalls for ever when
/// a guest writes 64 KiB or more at a time; 28 KiB is the largest size that always works.
pub const MAX_FROM_GUEST_BYTES: usize = 28 * 1024;

/// Limit on the file or log bytes in one frame from the guest. The rest of the frame is for header, tag and length.
pub const MAX_DATA_BYTES: usize = MAX_FROM_GUEST_BYTES - 64;

/// Largest frame that the host may send, header included, in bytes. It limits a request's `additional_files`, beside
/// the secrets.
pub const MAX_FROM_HOST_BYTES: usize = 80 * 1024 * 1024;

const HEADER_BYTES: usize = size_of::<u32>();

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection failed or was closed.
    #[error("the vsock connection failed")]
    Io(#[source] io::Error),
    /// The frame exceeds the limit.
    #[error("a frame of {announced} bytes exceeds the limit of {limit} bytes")]
    TooLong {
        /// Length of the frame, header included, in bytes.
        announced: usize,
        /// The reader's or writer's limit.
        limit: usize,
    },
    /// The frame's contents are not exactly one message.
    #[error("a frame of {length} bytes does not hold exactly one message")]
    Malformed {
        /// Length without the header, in bytes.
        length: usize,
        /// postcard's error; `None` if there are bytes after the message.
        #[source]
        source: Option<postcard::Error>,
    },
}

/// Reads frames into one buffer, from which messages borrow.
#[derive(Debug)]
pub struct FrameReader<R> {
    inner: R,
    buffer: Vec<u8>,
    limit: usize,
}

impl<R: Read> FrameReader<R> {
    /// A reader that refuses frames of more than `limit` bytes, header included, before it reads them.
    ///
    /// ```
    /// use cofferdam_protocol::{FromGuest, frame::{FrameError, FrameReader, MAX_FROM_GUEST_BYTES}};
    ///
    /// let header = 1_000_000_u32.to_le_bytes();
    /// let mut reader = FrameReader::new(header.as_slice(), MAX_FROM_GUEST_BYTES);
    /// let error = reader.read::<FromGuest<'_>>().unwrap_err();
    /// assert!(matches!(error, FrameError::TooLong { announced: 1_000_004, limit: MAX_FROM_GUEST_BYTES }));
    /// ```
    pub fn new(inner: R, limit: usize) -> Self {
        Self { inner, buffer: Vec::new(), limit }
    }

    /// Waits for the next frame and decodes it.
    ///
    /// # Errors
    ///
    /// [`FrameError::Io`] with `UnexpectedEof` when the peer has closed the connection. A conversation always ends with a
    /// message, so this is an error even between frames.
    pub fn read<'a, M: Deserialize<'a>>(&'a mut self) -> Result<M, FrameError> {
        let mut header = [0; HEADER_BYTES];
        self.inner.read_exact(&mut header).map_err(FrameError::Io)?;
        let length = u32::from_le_bytes(header) as usize;
        let announced = length.saturating_add(HEADER_BYTES);
        if announced > self.limit {
            return Err(FrameError::TooLong { announced, limit: self.limit });
        }
        self.buffer.clear();
        let received = (&mut self.inner).take(length as u64).read_to_end(&mut self.buffer).map_err(FrameError::Io)?;
        if received < length {
            return Err(FrameError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        match postcard::take_from_bytes(&self.buffer) {
            Ok((message, [])) => Ok(message),
            Ok(_) => Err(FrameError::Malformed { length, source: None }),
            Err(error) => Err(FrameError::Malformed { length, source: Some(error) }),
        }
    }
}

/// Writes messages, each as one frame with one write.
#[derive(Debug)]
pub struct FrameWriter<W> {
    inner: W,
    buffer: Vec<u8>,
    limit: usize,
}

impl<W: Write> FrameWriter<W> {
    /// A writer that refuses messages whose frame has more than `limit` bytes, header included.
    pub fn new(inner: W, limit: usize) -> Self {
        Self { inner, buffer: Vec::new(), limit }
    }

    /// Writes one message. Success does not mean that it has arrived.
    ///
    /// # Errors
    ///
    /// [`FrameError::TooLong`] before anything is written; [`FrameError::Io`] if the connection failed.
    pub fn write<M: Serialize>(&mut self, message: &M) -> Result<(), FrameError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        buffer.extend([0; HEADER_BYTES]);
        let mut buffer = postcard::to_extend(message, buffer)
            .map_err(|error| FrameError::Malformed { length: 0, source: Some(error) })?;
        let announced = buffer.len();
        match u32::try_from(announced - HEADER_BYTES) {
            Ok(length) if announced <= self.limit => buffer[..HEADER_BYTES].copy_from_slice(&length.to_le_bytes()),
            _ => return Err(FrameError::TooLong { announced, limit: self.limit }),
        }
        self.inner.write_all(&buffer).map_err(FrameError::Io)?;
        self.buffer = buffer;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{FromGuest, FromHost, Sample, Usage, WindowSize, tree};

    fn sent(message: &FromGuest<'_>) -> Vec<u8> {
        let mut wire = Vec::new();
        FrameWriter::new(&mut wire, MAX_FROM_GUEST_BYTES).write(message).unwrap();
        wire
    }

    #[test]
    fn the_largest_log_and_data_messages_fit_into_one_frame() {
        let bytes = vec![0xff; MAX_DATA_BYTES];
        for message in [FromGuest::Log(&bytes), FromGuest::Tree(tree::Event::Data(&bytes)), FromGuest::Output(&bytes)] {
            let wire = sent(&message);
            let mut reader = FrameReader::new(wire.as_slice(), MAX_FROM_GUEST_BYTES);
            assert_eq!(reader.read::<FromGuest<'_>>().unwrap(), message);
        }
    }

    #[test]
    fn an_oversized_frame_is_refused_before_it_is_read() {
        let wire = u32::MAX.to_le_bytes();
        let mut reader = FrameReader::new(wire.as_slice(), MAX_FROM_GUEST_BYTES);
        assert!(matches!(reader.read::<FromGuest<'_>>(), Err(FrameError::TooLong { .. })));
        assert_eq!(reader.buffer.capacity(), 0);
    }

    #[test]
    fn a_frame_may_fill_its_limit() {
        let wire = sent(&FromGuest::Output(b"some bytes"));
        assert!(FrameReader::new(wire.as_slice(), wire.len()).read::<FromGuest<'_>>().is_ok());
        let refused = FrameReader::new(wire.as_slice(), wire.len() - 1).read::<FromGuest<'_>>().map(drop);
        assert!(matches!(refused, Err(FrameError::TooLong { announced, .. }) if announced == wire.len()));
    }

    #[test]
    fn an_oversized_message_is_not_sent() {
        let bytes = vec![0; MAX_FROM_GUEST_BYTES];
        let mut wire = Vec::new();
        let message = FromGuest::Log(&bytes);
        let error = FrameWriter::new(&mut wire, MAX_FROM_GUEST_BYTES).write(&message).unwrap_err();
        assert!(matches!(error, FrameError::TooLong { .. }));
        assert!(wire.is_empty());
    }

    #[test]
    fn bytes_after_the_message_are_refused() {
        let mut wire = sent(&FromGuest::Finished);
        wire.push(0);
        wire[0] += 1;
        let mut reader = FrameReader::new(wire.as_slice(), MAX_FROM_GUEST_BYTES);
        assert!(matches!(reader.read::<FromGuest<'_>>(), Err(FrameError::Malformed { source: None, .. })));
    }

    #[test]
    fn a_connection_that_closes_within_a_frame_is_an_error() {
        let wire = sent(&FromGuest::Log(b"half"));
        for end in 0..wire.len() {
            let mut reader = FrameReader::new(&wire[..end], MAX_FROM_GUEST_BYTES);
            assert!(matches!(reader.read::<FromGuest<'_>>(), Err(FrameError::Io(_))), "cut at {end}");
        }
    }

    /// A message with owned bytes.
    #[derive(Debug, Clone)]
    enum Owned {
        Log(Vec<u8>),
        Output(Vec<u8>),
        Other(FromGuest<'static>),
    }

    impl Owned {
        fn borrowed(&self) -> FromGuest<'_> {
            match self {
                Self::Log(bytes) => FromGuest::Log(bytes),
                Self::Output(bytes) => FromGuest::Output(bytes),
                Self::Other(message) => message.clone(),
            }
        }
    }

    fn messages() -> impl Strategy<Value = Owned> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..100);
        let sample = (any::<[u64; 6]>(), any::<u32>()).prop_map(|(numbers, processes)| {
            let [wall_us, user_us, system_us, peak_memory_bytes, scratch_bytes, memory_bytes] = numbers;
            let usage = Usage { wall_us, user_us, system_us, peak_memory_bytes, scratch_bytes };
            Owned::Other(FromGuest::Sample(Sample { usage, memory_bytes, processes }))
        });
        prop_oneof![
            bytes().prop_map(Owned::Log),
            bytes().prop_map(Owned::Output),
            sample,
            any::<u64>().prop_map(|skipped| Owned::Other(FromGuest::Kept { skipped })),
            Just(Owned::Other(FromGuest::ShellEnded)),
        ]
    }

    fn from_host() -> impl Strategy<Value = FromHost> {
        let size = || any::<(u16, u16)>().prop_map(|(rows, columns)| WindowSize { rows, columns });
        prop_oneof![
            Just(FromHost::Stop),
            any::<(u64, u64)>().prop_map(|(entries, bytes)| FromHost::Keep(tree::Limits { entries, bytes })),
            (".{0,9}", size()).prop_map(|(term, size)| FromHost::Shell { term, size }),
            proptest::collection::vec(any::<u8>(), 0..100).prop_map(|bytes| FromHost::Input(bytes.into())),
            size().prop_map(FromHost::Resize),
            Just(FromHost::Acknowledge),
        ]
    }

    proptest! {
        #[test]
        fn no_bytes_cause_a_panic(wire in proptest::collection::vec(any::<u8>(), 0..256)) {
            let mut reader = FrameReader::new(wire.as_slice(), MAX_FROM_GUEST_BYTES);
            while reader.read::<FromGuest<'_>>().is_ok() {}
        }

        #[test]
        fn messages_from_the_guest_survive_a_round_trip(message in messages(), rest in messages()) {
            let wire = [sent(&message.borrowed()), sent(&rest.borrowed())].concat();
            let mut reader = FrameReader::new(wire.as_slice(), MAX_FROM_GUEST_BYTES);
            prop_assert_eq!(reader.read::<FromGuest<'_>>().unwrap(), message.borrowed());
            prop_assert_eq!(reader.read::<FromGuest<'_>>().unwrap(), rest.borrowed());
        }

        #[test]
        fn messages_from_the_host_survive_a_round_trip(message in from_host()) {
            let mut wire = Vec::new();
            FrameWriter::new(&mut wire, MAX_FROM_HOST_BYTES).write(&message).unwrap();
            let mut reader = FrameReader::new(wire.as_slice(), MAX_FROM_HOST_BYTES);
            prop_assert_eq!(reader.read::<FromHost>().unwrap(), message);
        }
    }
}

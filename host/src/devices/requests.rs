//! One request of a guest: from a chain of descriptors in its memory to the answer there.

use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_queue::DescriptorChain;
use virtiofsd::descriptor_utils::{self, Reader, Writer};
use virtiofsd::filesystem::FileSystem;
use virtiofsd::fuse::{InHeader, Opcode, OutHeader};
use virtiofsd::server::Server;
use vm_memory::{GuestMemoryLoadGuard, GuestMemoryMmap};

/// A guest's memory.
pub(super) type Memory = GuestMemoryMmap<BitmapMmapRegion>;

/// The buffers of a request.
pub(super) type Chain = DescriptorChain<GuestMemoryLoadGuard<Memory>>;

/// Bytes with which every answer begins.
const ANSWER_HEADER_BYTES: usize = size_of::<OutHeader>();

/// Why a request got no answer. No guest's kernel makes such requests.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    /// Its buffers are elsewhere.
    #[error("a request's buffers do not lie in the guest's memory")]
    Buffers(#[from] descriptor_utils::Error),
    /// The answer can't even be begun.
    #[error("a request of kind {opcode} leaves {room} bytes for its answer, which begins with {ANSWER_HEADER_BYTES}")]
    NoRoom {
        /// FUSE's number of the kind of request.
        opcode: u32,
        /// Bytes in the buffers for the answer.
        room: usize,
    },
    /// It can't be decoded, or the answer doesn't fit.
    #[error("a request can't be answered")]
    Request(#[from] virtiofsd::Error),
}

/// Answers a request, and gives the length of the answer.
///
/// # Errors
///
/// See [`RequestError`].
pub(super) fn answer<F: FileSystem + Sync>(server: &Server<F>, chain: &Chain) -> Result<usize, RequestError> {
    let memory = chain.memory();
    let reader = Reader::new(memory, chain.clone())?;
    let writer = Writer::new(memory, chain.clone())?;
    let room = writer.available_bytes();
    if room < ANSWER_HEADER_BYTES {
        let header: InHeader = reader.clone().read_obj().map_err(virtiofsd::Error::DecodeMessage)?;
        // Server panics, where other requests get an error from it.
        if let Ok(Opcode::Read | Opcode::Readdir | Opcode::Readdirplus) = Opcode::try_from(header.opcode) {
            return Err(RequestError::NoRoom { opcode: header.opcode, room });
        }
    }
    Ok(server.handle_message(reader, writer, None::<&mut ()>)?)
}

//! Stores elsewhere.
//!
//! ```text
//!   the caller, on any thread          the stores' own threads
//!   has, get ───────────────── spawn ─▶ request ─▶ answer
//!   reader, stream ◀── Download ─────── checks each message, and the whole before it says that it is whole
//!   writer, putter ─── Upload ────────▶ watches that the peer takes what there is to take
//! ```
//!
//! Services are called from threads without a runtime too, and from runtimes that are blocked meanwhile: so everything
//! that needs a reactor or a clock is a task on the stores' own threads.

mod blob_reader;
mod blob_writer;
mod blobs;
mod directories;
mod download;
mod peer;
mod upload;

pub use blobs::GrpcBlobService;
pub use directories::GrpcDirectoryService;
pub use peer::{CERTIFICATE_VARIABLE, KEY_VARIABLE, Peer, PeerError, PeerOptions};

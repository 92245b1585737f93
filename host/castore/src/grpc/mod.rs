//! Blobs and directories over gRPC, as `snix.castore.v1` and `tvix.castore.v1`: the two have the same bytes.
//!
//! ```text
//!   BlobService, DirectoryService ─▶ client ─ Peer ═ TCP, TLS, Unix socket ═ Listener ─ server ─▶ Store
//!                                       │                                              │
//!       checks everything against digests                    one blocking thread a request, a limited number
//! ```
//!
//! Neither side trusts the other one. Messages, streams and waits have limits. Data in flight fills a few buffers at most;
//! then the sender waits.

use std::error::Error;

mod client;
mod message;
mod server;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use client::{
    CERTIFICATE_VARIABLE, GrpcBlobService, GrpcDirectoryService, KEY_VARIABLE, Peer, PeerError, PeerOptions,
};
pub(crate) use cofferdam_proto::EncodedDirectory;
pub(crate) use message::decode_checked;
pub use server::{Admission, Put, Puts, SERVICES, ServeOptions, add_services, serve};

use crate::directoryservice::MAX_TREE_BYTES;

/// Bytes of a blob in each message.
const CHUNK_BYTES: usize = 256 * 1024;

/// Largest message that is accepted, except for directories, in bytes.
const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;

/// Largest blob that is accepted, in bytes.
const MAX_BLOB_BYTES: u64 = 64 * 1024 * 1024 * 1024;

/// Maximum number of entries in a directory that is accepted or sent.
const MAX_DIRECTORY_ENTRIES: usize = 1024 * 1024;

/// The protobuf package of the services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Package {
    Snix,
    Tvix,
}

impl Package {
    const fn prefix(self) -> &'static str {
        match self {
            Self::Snix => "/snix.castore.v1.",
            Self::Tvix => "/tvix.castore.v1.",
        }
    }

    /// The same method in another package.
    fn readdress<B>(self, request: &mut tonic::codegen::http::Request<B>, to: Self) {
        let uri = request.uri();
        let Some(method) = uri.path().strip_prefix(self.prefix()) else { return };
        let mut parts = uri.clone().into_parts();
        parts.path_and_query = format!("{}{method}", to.prefix()).parse().ok();
        if let Ok(uri) = parts.try_into() {
            *request.uri_mut() = uri;
        }
    }
}

/// An error and its causes in one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    std::iter::successors(Some(error), |&error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

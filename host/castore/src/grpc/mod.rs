//! Blobs and directories over gRPC, as `snix.castore.v1` and `tvix.castore.v1`: the two have the same bytes.
//!
//! ```text
//!   BlobService, DirectoryService ─▶ client ─ Peer ═ TCP, TLS, Unix socket ═ Listener ─ server ─▶ Store
//!                                       │                                              │
//!       checks all that it gets against digests              one blocking thread a request, so many at a time
//! ```
//!
//! Both sides take the other one for hostile. Every message has a limit, every stream a total, every wait an end; what
//! is on its way fills a few buffers at most, and then the sender waits.

use std::error::Error;

mod client;
mod message;
mod queue;
mod server;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use client::{
    CERTIFICATE_VARIABLE, GrpcBlobService, GrpcDirectoryService, KEY_VARIABLE, Peer, PeerError, PeerOptions,
};
pub(crate) use message::EncodedDirectory;
pub use server::{
    DESCRIPTOR_SETS, Gate, Gated, Intake, Listener, SERVICES, ServeError, ServeOptions, Shares, Short, Tls, Turn,
    add_services, serve, serve_routes,
};
pub use tonic::{
    service::RoutesBuilder,
    transport::{Certificate, Identity},
};

use crate::directoryservice::MAX_TREE_BYTES;

/// Bytes of a blob in each message that is sent.
const CHUNK_BYTES: usize = 256 * 1024;

/// Bytes of the largest message other than a directory that is taken.
const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;

/// Bytes of the largest blob that is taken.
const MAX_BLOB_BYTES: u64 = 64 * 1024 * 1024 * 1024;

/// Entries in the largest directory that is taken or sent.
const MAX_DIRECTORY_ENTRIES: usize = 1024 * 1024;

/// Bytes that may be on their way in one stream without having been asked for by a reader.
const STREAM_WINDOW_BYTES: u32 = 512 * 1024;

/// What `tonic-prost-build` makes of the services.
#[expect(unreachable_pub, clippy::allow_attributes, reason = "generated")]
#[expect(clippy::allow_attributes_without_reason, reason = "generated")]
mod services {
    include!(concat!(env!("OUT_DIR"), "/grpc/snix.castore.v1.rs"));
}

/// Under which name the services are asked for.
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

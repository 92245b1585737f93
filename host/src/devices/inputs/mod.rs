//! A build's inputs, served to its VM over virtiofs straight from the store.
//!
//! ```text
//!   request's inputs ──resolve──▶ Tree: every directory and blob below them, and nothing else
//!                                  │
//!   host process                   ▼            device process, confined
//!   ┌─ server, one a VM ──────────────┐         ┌─ device ────────────────────┐            ┌─ VMM ──┐
//!   │ answers digests of the Tree,    │◀─digest─│ fs: FUSE requests           │◀─fs.sock───│ guest  │
//!   │ from the store; all else ends   │─bytes,──▶ layout: inode ⇄ path         │ vhost-user │ kernel │
//!   │ the connection                  │  files  │ blobs: open files, by LRU   │            └────────┘
//!   └─────────────────────────────────┘         └─────────────────────────────┘
//! ```
//!
//! The device starts without inputs, with its machine, and the guest mounts it. Its first question, for the root, waits until
//! they are bound, see [`Unbound`]; that is when the guest first looks into them.
//!
//! Contents never change, so the guest is told to cache everything for ever and never to open or release anything: a
//! file costs one READ, its name and attributes come with its directory. A guest that takes the device over holds a
//! process without files, capabilities and network, which can ask for this one build's inputs.
//!
//! A blob that the store has to fetch first is waited for by those who read it and by nobody else, so a VM starts before
//! its inputs have arrived.

mod blobs;
mod device;
mod fs;
mod layout;
mod resolve;
mod serve;
mod server;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod wire;

pub use device::Device;
pub(super) use fs::InputsFs;
pub use resolve::{
    MAX_BYTES, MAX_DEPTH, MAX_DIRECTORIES, MAX_DIRECTORY_BYTES, MAX_ENTRIES, MAX_PATHS, NIX_TIME, Place, ResolveError,
    TIME, Tree, resolve,
};
pub(super) use serve::run;
pub use server::{ServeError, Server, Unbound};
pub(super) use wire::Host;
pub use wire::NoRequest;
pub(crate) use wire::Request;

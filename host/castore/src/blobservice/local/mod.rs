//! Blobs as plain files.
//!
//! ```text
//!   open_write ─▶ buffer ── small ──────────────────┐
//!                   └────── grows ─▶ staging file ──┴─ close ─▶ staged ── commit ─▶ DIR/b3/XX/HEX
//! ```
//!
//! `commit` syncs the file system before it moves the staged files to `b3`, so a name in `b3` stands for a whole blob even
//! after a power failure. Until then only the service that wrote a blob can read it. `commit` also makes the names in `b3`
//! durable, including those of blobs that were found there: another process may have added them a moment ago. The empty
//! blob is never stored. `DIR/format` holds the number of this layout.
//!
//! Contents are checked against the digest. A reader hashes while it reads and fails before it returns the last bytes.
//! A file descriptor bypasses the service, so the whole file is hashed before the descriptor is returned: the first one to
//! open a large blob waits for that. Each process hashes a file once, and again only when its size or its times change
//! other than by the service itself. A file that fails the check is marked as damaged. A marked file counts as missing when
//! a blob is looked for or written, so the next writer of the right contents replaces it; reading it still names the damage.
//!
//! A batch records when it began, and finding a blob renews that blob's time; [`crate::gc`] explains why.
//!
//! Each module uses only the ones after it: `gc`, `service`, `writer`, `reader`, `blobs`, `lease`, `verified`, `layout`,
//! `staging`.

mod blobs;
mod collected;
mod gc;
mod layout;
mod lease;
mod reader;
mod service;
mod staging;
#[cfg(test)]
mod tests;
mod verified;
mod writer;

pub use collected::Kind;
pub(crate) use collected::{Collected, note_collected};
pub(crate) use gc::{Age, PENDING_BLOBS, PENDING_TREES, digests_in};
pub(crate) use layout::{check_layout, digest_of};
pub use lease::Lease;
pub(crate) use lease::{decode_node, encode_node};
pub(crate) use reader::LocalBlobReader;
pub use service::LocalBlobService;
pub(crate) use staging::lock;
pub(crate) use verified::mark_damaged;

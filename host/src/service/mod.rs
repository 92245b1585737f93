//! What every network front end shares.

mod client;
mod intake;
mod message;
pub mod proto;

pub use client::Client;
pub(crate) use intake::Intake;
pub use intake::Paid as MemoryPermit;
pub use message::EncodedRequest;

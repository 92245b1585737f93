//! What every network front end shares.

mod client;
mod intake;

pub use client::Client;
pub(crate) use intake::Intake;
pub use intake::Paid as MemoryPermit;

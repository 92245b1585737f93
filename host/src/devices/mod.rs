//! The processes that serve a guest.

pub mod inputs;
pub mod paths;

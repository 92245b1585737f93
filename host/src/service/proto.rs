//! The messages and services of the protocols that are served, made of `proto/`, which documents them.
#![expect(clippy::allow_attributes, reason = "generated")]
#![expect(clippy::allow_attributes_without_reason, missing_docs, reason = "generated")]

/// `snix.build.v1`: the services; the messages are in [`crate::request::proto`].
pub mod snix {
    include!(concat!(env!("OUT_DIR"), "/grpc/snix.build.v1.rs"));
}

/// `tvix.build.v1`.
pub mod tvix {
    include!(concat!(env!("OUT_DIR"), "/grpc/tvix.build.v1.rs"));
}

/// `cofferdam.v1`.
pub mod cofferdam {
    include!(concat!(env!("OUT_DIR"), "/grpc/cofferdam.v1.rs"));
}

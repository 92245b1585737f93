//! The protocols that Cofferdam speaks over gRPC, made from the `.proto` files beside `src`, which document them.
//!
//! Nothing here checks a message: the crates that receive one do.
#![expect(clippy::allow_attributes, clippy::allow_attributes_without_reason, missing_docs, reason = "generated")]

mod encoded;

pub use encoded::{Encoded, EncodedDirectory, EncodedNetwork, EncodedRequest};

/// snix's protocols.
pub mod snix {
    /// Blobs and directories.
    pub mod castore {
        /// Version 1.
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/snix.castore.v1.rs"));
            include!(concat!(env!("OUT_DIR"), "/grpc/snix.castore.v1.rs"));
        }
    }
    /// Builds.
    pub mod build {
        /// Version 1.
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/snix.build.v1.rs"));
            include!(concat!(env!("OUT_DIR"), "/grpc/snix.build.v1.rs"));
        }
    }
}

/// tvix's protocols, where they are more than another name for snix's.
pub mod tvix {
    /// Builds.
    pub mod build {
        /// Version 1, with [`Entry`](crate::snix::castore::v1::Entry) for nodes.
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/grpc/tvix.build.v1.rs"));
        }
    }
}

/// Our own protocol.
pub mod cofferdam {
    /// Version 1.
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/grpc/cofferdam.v1.rs"));

        /// Without the contents.
        impl std::fmt::Debug for Secret {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct("Secret").field("name", &self.name).finish_non_exhaustive()
            }
        }

        /// All connections that a build gets.
        #[derive(Clone, PartialEq, Eq, ::prost::Message)]
        pub struct Network {
            /// Rules about names.
            #[prost(string, repeated, tag = "1")]
            pub allow: ::prost::alloc::vec::Vec<::prost::alloc::string::String>,
            /// Rules about addresses.
            #[prost(string, repeated, tag = "2")]
            pub allow_addresses: ::prost::alloc::vec::Vec<::prost::alloc::string::String>,
        }
    }
}

/// The encoded `FileDescriptorSet` of `snix.castore.v1` and `tvix.castore.v1`.
pub const CASTORE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/castore.binpb"));

/// The encoded `FileDescriptorSet` of `snix.build.v1`, `tvix.build.v1`, `cofferdam.v1` and all that they import.
pub const BUILD_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/build.binpb"));

//! The validated `BuildRequest`, its canonical digest, and the result of a build.
//!
//! ```text
//!   ProtoJSON ──┐                                               ┌─▶ digest
//!   binary ─────┼─▶ proto::BuildRequest ──TryFrom──▶ BuildRequest ──admit(&Host)──▶ a build
//!   gRPC, run ──┘                    └──▶ RequestError ◀──┘                          │
//!                                                          BuildResult ◀─────────────┘
//! ```
//!
//! `TryFrom` is the only way to a [`BuildRequest`], so each one keeps every rule of the format. [`admit`] decides whether this
//! host can build it.

mod admission;
mod counts;
mod error;
mod json;
pub(crate) mod node_text;
mod output_order;
mod path;
mod validate;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use cofferdam_castore::{
    B3Digest, Node, PathComponent,
    proto::{Entry, EntryExt as _},
};
use cofferdam_proto::{EncodedRequest, snix::build::v1 as proto};
use prost::{DecodeError, Message};

use self::counts::Counts;

pub(crate) use admission::KVM;
pub use admission::{Admitted, Host, SYSTEM, admit};
pub use error::{RequestError, RequestErrorKind};
pub(crate) use json::entry_to_json;
pub use output_order::OutputOrder;
pub use path::{AbsolutePath, MAX_COMPONENT_BYTES, MAX_PATH_BYTES, RelativePath};
pub(crate) use validate::check_encoded_bytes;
pub use validate::{
    MAX_ADDITIONAL_FILES, MAX_ARG_BYTES, MAX_ARGS, MAX_ENCODED_BYTES, MAX_ENVIRONMENT_VARS, MAX_INPUTS,
    MAX_NEEDLE_BYTES, MAX_NEEDLES, MAX_OUTPUT_NEEDLES, MAX_OUTPUTS, MAX_RO_PATHS, MAX_SCRATCH_PATHS,
    MAX_SPECIFICATION_BYTES,
};

/// Separates digests of requests from all other digests.
const DIGEST_CONTEXT: &str = "cofferdam v1: digest of the deterministic encoding of a snix.build.v1.BuildRequest";

/// The inputs' directory in requests of snix, tvix and Nix.
const NIX_STORE: &str = "nix/store";

/// A command to run, and everything that it may see. Paths are relative to the build's root.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::manual_non_exhaustive, reason = "non_exhaustive doesn't keep the rest of this crate out")]
pub struct BuildRequest {
    /// What appears in `inputs_dir`, by name.
    pub inputs: BTreeMap<PathComponent, Node>,
    /// The command and its arguments; not empty.
    pub command_args: Vec<String>,
    /// Where the command starts.
    pub working_dir: RelativePath,
    /// Directories that are writable during the build; sorted.
    pub scratch_paths: Vec<RelativePath>,
    /// Where the inputs appear.
    pub inputs_dir: RelativePath,
    /// What the build must make, in the order of the answer. None is the root, and none is there twice.
    pub outputs: Vec<RelativePath>,
    /// The command's whole environment; sorted by key.
    pub environment_vars: Vec<EnvVar>,
    /// What the host must offer.
    pub constraints: Option<BuildConstraints>,
    /// Small files to place outside the inputs; sorted by path.
    pub additional_files: Vec<AdditionalFile>,
    /// Texts that the outputs are scanned for; none is empty.
    pub refscan_needles: Vec<String>,
    /// Keeps other modules from constructing one.
    _checked: (),
}

/// One environment variable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvVar {
    /// Not empty, without `=` and NUL.
    pub key: String,
    /// Without NUL.
    pub value: Bytes,
}

/// One file to place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdditionalFile {
    /// Where; not the root.
    pub path: RelativePath,
    /// Its contents.
    pub contents: Bytes,
}

/// What the host must offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildConstraints {
    /// Such as [`SYSTEM`]; not empty.
    pub system: String,
    /// Memory that the build needs, in bytes; 0 if it doesn't say.
    pub min_memory: u64,
    /// Paths of the host to show read-only; sorted.
    pub available_ro_paths: Vec<AbsolutePath>,
    /// Whether the build may use the network.
    pub network_access: bool,
    /// Whether there must be a `/bin/sh`.
    pub provide_bin_sh: bool,
}

/// What a successful build made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildResult {
    /// One for each of the request's outputs, in its order.
    pub outputs: Vec<BuildOutput>,
}

/// One output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildOutput {
    /// What it is.
    pub node: Node,
    /// Indexes of those of the request's `refscan_needles` that occur in it.
    pub needles: BTreeSet<u64>,
}

impl BuildRequest {
    /// Decodes and checks a binary message.
    ///
    /// # Errors
    ///
    /// The bytes are not a `BuildRequest`, or it breaks a rule.
    pub fn from_binary(bytes: &[u8]) -> Result<Self, RequestError> {
        Self::check_binary(bytes)?;
        proto::BuildRequest::decode(bytes).map_err(|error| not_binary(&error))?.try_into()
    }

    /// Checks the length of a binary message and the number of entries in its lists. To be called before the message is decoded,
    /// when it takes many times its size.
    ///
    /// # Errors
    ///
    /// The bytes are not a message, or a bound is exceeded.
    pub fn check_binary(bytes: &[u8]) -> Result<(), RequestError> {
        validate::check_encoded_bytes(bytes.len())?;
        Counts::of_binary(bytes).map_err(|error| not_binary(&error))?.check()
    }

    /// The paths below `inputs_dir`, relative to it, of which the build gets writable copies: its scratch paths there. The
    /// inputs in a scratch path that is `inputs_dir` or around it stay as they are: beside them a build of Nix makes its outputs.
    pub(crate) fn writable_inputs(&self) -> impl Iterator<Item = &str> {
        let below = self.scratch_paths.iter().filter(|path| **path != self.inputs_dir);
        below.filter_map(|path| path.as_path().strip_prefix(self.inputs_dir.as_path()).ok()?.to_str())
    }

    /// Whether its inputs are store paths of Nix.
    pub(crate) fn has_nix_store(&self) -> bool {
        self.inputs_dir.as_str() == NIX_STORE
    }

    /// The message of this request. Its lists are sorted, except for the outputs, which keep the request's order.
    pub fn to_proto(&self) -> proto::BuildRequest {
        use proto::build_request as wire;
        let text = |paths: &[RelativePath]| paths.iter().map(|path| path.as_str().to_owned()).collect();
        proto::BuildRequest {
            inputs: self.inputs.iter().map(|(name, node)| Entry::named(name.clone(), node.clone())).collect(),
            command_args: self.command_args.clone(),
            working_dir: self.working_dir.to_string(),
            scratch_paths: text(&self.scratch_paths),
            inputs_dir: self.inputs_dir.to_string(),
            outputs: text(&self.outputs),
            environment_vars: self
                .environment_vars
                .iter()
                .map(|EnvVar { key, value }| wire::EnvVar { key: key.clone(), value: value.clone() })
                .collect(),
            constraints: self.constraints.as_ref().map(|constraints| wire::BuildConstraints {
                system: constraints.system.clone(),
                min_memory: constraints.min_memory,
                available_ro_paths: constraints
                    .available_ro_paths
                    .iter()
                    .map(|path| path.as_str().to_owned())
                    .collect(),
                network_access: constraints.network_access,
                provide_bin_sh: constraints.provide_bin_sh,
            }),
            additional_files: self
                .additional_files
                .iter()
                .map(|AdditionalFile { path, contents }| wire::AdditionalFile {
                    path: path.to_string(),
                    contents: contents.clone(),
                })
                .collect(),
            refscan_needles: self.refscan_needles.clone(),
        }
    }

    /// The binary message of this request.
    pub(crate) fn encoded(&self) -> Vec<u8> {
        self.to_proto().encode_to_vec()
    }

    /// The request's identity. Equal requests have equal digests, in whichever form they arrive.
    ///
    /// BLAKE3 in its key derivation mode (so no file, directory or other message shares a digest with it) of the
    /// deterministic encoding: fields in the order of their numbers, default values left out, lists sorted.
    pub fn digest(&self) -> B3Digest {
        let mut message = self.to_proto();
        message.outputs.sort_unstable();
        blake3::Hasher::new_derive_key(DIGEST_CONTEXT).update(&message.encode_to_vec()).finalize().into()
    }

    /// The order of the outputs. Requests with one digest may differ in it.
    pub fn output_order(&self) -> OutputOrder {
        OutputOrder::of(&self.outputs)
    }
}

impl From<&BuildRequest> for EncodedRequest {
    fn from(request: &BuildRequest) -> Self {
        Self::from(&request.to_proto())
    }
}

fn not_binary(error: &DecodeError) -> RequestError {
    let rule = format!("must be a binary snix.build.v1.BuildRequest: {error}");
    RequestError::new(RequestErrorKind::Malformed, "the request", rule)
}

impl BuildResult {
    /// The message of this result.
    pub fn to_proto(&self) -> proto::BuildResponse {
        let output = |output: &BuildOutput| proto::build_response::Output {
            output: Some(Entry::unnamed(output.node.clone())),
            needles: output.needles.iter().copied().collect(),
        };
        proto::BuildResponse { outputs: self.outputs.iter().map(output).collect() }
    }
}

#[cfg(test)]
mod tests;

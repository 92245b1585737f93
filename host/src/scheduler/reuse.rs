//! Answers from earlier builds.

use std::{str::FromStr, sync::Arc};

use cofferdam_castore::{B3Digest, Node, Views, directoryservice::DirectoryMemory};
use serde::{Deserialize, Deserializer};
use uuid::Uuid;

use super::{
    Backend, Submission,
    active_build::arranged,
    presence::{self, has_all},
};
use crate::{
    network::Policy,
    quantity::text_or_number,
    records::{Outcome, Record},
    request::Admitted,
};

/// Separates keys from all other digests.
const KEY_CONTEXT: &str = "cofferdam v2: what a build can see of its request, its limits and its environment";

/// Which submissions of equal requests share an active build, and the result of an earlier one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Reuse {
    /// Those of the same client. No client learns what another has built.
    #[default]
    Tenant,
    /// Those of all clients.
    Shared,
    /// None.
    Off,
}

impl FromStr for Reuse {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "tenant" => Ok(Self::Tenant),
            "shared" => Ok(Self::Shared),
            "off" => Ok(Self::Off),
            _ => Err("it is none of these words".to_owned()),
        }
    }
}

impl<'de> Deserialize<'de> for Reuse {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_number(deserializer, "\"tenant\", \"shared\" or \"off\"")
    }
}

/// The key of a result: a digest of everything that the build could see, and of the client unless all clients share results.
/// Builds with equal keys can replace each other. What a build with a network sees is unknown, so its key is no other's, unless
/// the operator wants such results reused. Then builds that may see the same of the network have equal keys. One that isn't
/// repeatable or is compared with an earlier one has a key of its own, too.
pub(super) fn key(
    submission: &Submission<Admitted>,
    environment: &B3Digest,
    network: Option<&Policy>,
    reuse: Reuse,
) -> B3Digest {
    let mut hasher = blake3::Hasher::new_derive_key(KEY_CONTEXT);
    hasher.update(submission.digest.as_slice()).update(environment.as_slice());
    for limit in submission.options.limits.visible() {
        hasher.update(&limit.to_le_bytes());
    }
    if !submission.options.is_repeatable() || submission.compare_with.is_some() {
        hasher.update(Uuid::new_v4().as_bytes());
    }
    match network {
        // Policies that differ are printed differently.
        Some(policy) if policy.reuse => hasher.update(format!("{policy:?}").as_bytes()),
        Some(_) => hasher.update(Uuid::new_v4().as_bytes()),
        None => &mut hasher,
    };
    match reuse {
        Reuse::Tenant => hasher.update(submission.client.to_string().as_bytes()),
        Reuse::Shared => &mut hasher,
        Reuse::Off => hasher.update(Uuid::new_v4().as_bytes()),
    };
    hasher.finalize().into()
}

/// A key that no other build has.
pub(super) fn unequal_key() -> B3Digest {
    B3Digest::of(Uuid::new_v4().as_bytes())
}

/// Whether the client sees all inputs of its request.
pub(super) async fn sees_inputs(views: &Views, submission: &Submission<Admitted>) -> bool {
    let view = views.of(&submission.client.to_string());
    has_all(&view, &submission.inputs()).await.unwrap_or(false)
}

/// The record of a successful build with this key. Errors are only logged, since the build can run again. Blocks.
pub(super) fn earlier(backend: &Backend, key: &B3Digest) -> Option<Record> {
    let found = backend.records.result_for(key);
    found
        .inspect_err(|error| tracing::warn!(error = error as &dyn std::error::Error, "can't look for earlier builds"))
        .ok()?
}

/// The record as an answer, if the store still has all outputs. The client is granted them. Errors are only logged, too.
pub(super) async fn answer(
    backend: &Arc<Backend>,
    submission: &Submission<Admitted>,
    record: Record,
) -> Option<Record> {
    let record = complete(backend, &submission.request, record).await?;
    let Some(Outcome::Built(outputs)) = &record.outcome else { return None };
    let nodes: Vec<_> = outputs.iter().map(|output| output.node.clone()).collect();
    let memory = DirectoryMemory::limited(presence::MAX_DIRECTORY_MEMORY_BYTES);
    let granted = backend.views.grant(&submission.client.to_string(), &nodes, &memory).await;
    granted.inspect_err(|error| tracing::warn!(%error, "an earlier build's outputs can't be granted")).ok()?;
    Some(record)
}

/// The record of a successful build with its outputs in the order of an equal request, if the store still has all of them.
pub(super) async fn complete(backend: &Arc<Backend>, request: &Admitted, record: Record) -> Option<Record> {
    let record = arranged(record, &request.output_order())?;
    let Some(Outcome::Built(outputs)) = &record.outcome else { return None };
    if outputs.len() != request.outputs.len() {
        return None;
    }
    // Before they are looked for, so that what is found stays for a while.
    for output in outputs {
        if let Node::Directory { digest, .. } = &output.node {
            backend.store.directories.renew(digest).await.ok()?;
        }
    }
    let nodes: Vec<_> = outputs.iter().map(|output| output.node.clone()).collect();
    has_all(&backend.store, &nodes).await.ok()?.then_some(record)
}

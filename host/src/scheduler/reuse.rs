//! Answers from earlier builds.

use std::sync::Arc;

use cofferdam_castore::{B3Digest, PathComponent};
use tokio::task::spawn_blocking;

use super::{Backend, Submission};
use crate::{
    devices::inputs,
    records::{Outcome, Record},
};

/// What the results of builds are found by: all that one can see of what was asked for.
pub(super) fn key(submission: &Submission) -> B3Digest {
    let mut seen = submission.digest.as_slice().to_vec();
    seen.extend(submission.options.visible().into_iter().flat_map(u64::to_le_bytes));
    B3Digest::of(&seen)
}

/// The record of an equal build that has succeeded, if the store has all of its outputs still. Whatever is in the way of
/// finding out, the build can run again.
pub(super) async fn find(backend: &Arc<Backend>, submission: &Submission) -> Option<Record> {
    let (theirs, key) = (Arc::clone(backend), key(submission));
    let found = spawn_blocking(move || theirs.records.result_for(&key)).await.ok()?;
    let record = found
        .inspect_err(|error| tracing::warn!(error = error as &dyn std::error::Error, "can't look for earlier builds"))
        .ok()??;
    let Some(Outcome::Built(outputs)) = &record.outcome else { return None };
    if outputs.len() != submission.request.outputs.len() {
        return None;
    }
    let named = outputs.iter().enumerate().map(|(index, output)| {
        let name = PathComponent::try_from(index.to_string().as_bytes()).ok()?;
        Some((name, output.node.clone()))
    });
    let named = named.collect::<Option<_>>()?;
    inputs::resolve(&backend.store, &named).await.ok()?;
    Some(record)
}

//! Provenance: a signed statement of how each successful build's outputs were made.
//!
//! A statement is an in-toto Statement v1 with a predicate of SLSA provenance v1. It is signed in a DSSE envelope.

mod envelope;
mod key;

use std::time::{Duration, SystemTime};

use cofferdam_castore::{B3Digest, Node};
use data_encoding::HEXLOWER;
use serde_json::{Value, json};

use crate::{
    build::ImageDigests,
    network::Connection,
    records::{Outcome, Record},
    request::{BuildRequest, node_text},
};

pub(crate) use envelope::{MAX_ENVELOPE_BYTES, verify};
pub(crate) use key::{PublicKey, SigningKey};

const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";

const PREDICATE_TYPE: &str = "https://slsa.dev/provenance/v1";

/// The meaning of the parameters below.
const BUILD_TYPE: &str = "urn:cofferdam:build:v1";

/// Most inputs that a statement lists. The request's digest stands for all of them.
const MAX_INPUTS: usize = 1000;

/// Signs what one daemon has built.
#[derive(Debug)]
pub(crate) struct Signer {
    /// Its key.
    pub key: SigningKey,
    /// The name of its host.
    pub host: String,
}

impl Signer {
    /// The envelope of a build that has ended. `None` if it has no outputs. `is_interactive` if somebody typed into the build.
    pub(crate) fn sign(
        &self,
        request: &BuildRequest,
        record: &Record,
        image: &ImageDigests,
        is_interactive: bool,
    ) -> Option<Vec<u8>> {
        let statement = statement(&self.host, request, record, image, is_interactive)?;
        Some(envelope::seal(&self.key, statement.to_string().as_bytes()))
    }
}

fn statement(
    host: &str,
    request: &BuildRequest,
    record: &Record,
    image: &ImageDigests,
    is_interactive: bool,
) -> Option<Value> {
    let Some(Outcome::Built(outputs)) = &record.outcome else { return None };
    let named = request.outputs.iter().zip(outputs);
    let subjects: Vec<_> = named.map(|(path, output)| resource(path.as_str(), &output.node)).collect();
    let inputs = request.inputs.iter().take(MAX_INPUTS);
    let mut dependencies: Vec<_> =
        inputs.map(|(name, node)| resource(&node_text::percent_encoded(name.as_bytes()), node)).collect();
    let files =
        [("image/kernel", &image.kernel), ("image/initramfs", &image.initramfs), ("image/scratch", &image.scratch)];
    dependencies.extend(files.map(|(name, digest)| json!({ "name": name, "digest": { "blake3": hex(digest) } })));
    let machine = record.machine.clone().unwrap_or_default();
    let mut builder_version = json!({ "cofferdam": env!("CARGO_PKG_VERSION") });
    builder_version[&machine.vmm] = json!(machine.version);
    let network = request.constraints.as_ref().is_some_and(|constraints| constraints.network_access);
    Some(json!({
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "requestDigest": { "blake3": hex(&record.request_digest) },
                    "command": record.description,
                    "tenant": record.client,
                    "networkAccess": network,
                    "secrets": record.secrets,
                    "interactive": is_interactive,
                },
                "internalParameters": {
                    "environmentDigest": { "blake3": hex(&record.environment) },
                    "accelerator": machine.accelerator,
                },
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": { "id": format!("urn:cofferdam:host:{host}"), "version": builder_version },
                "metadata": {
                    "invocationId": record.id.to_string(),
                    "startedOn": time(record.created, started(record)),
                    "finishedOn": time(record.created, record.ended.unwrap_or_default()),
                },
                "cofferdam_moreInputs": request.inputs.len().saturating_sub(MAX_INPUTS),
                "cofferdam_connections": record.connections.iter().map(connection).collect::<Vec<_>>(),
                "cofferdam_moreConnections": record.more_connections,
            },
        },
    }))
}

/// A node as an in-toto ResourceDescriptor. The digest is that of a file's contents, of a castore Directory's encoding, or of a
/// link's target; the annotation has it with the rest of the node.
fn resource(name: &str, node: &Node) -> Value {
    let digest = match node {
        Node::Directory { digest, .. } | Node::File { digest, .. } => *digest,
        Node::Symlink { target } => B3Digest::of(target.as_bytes()),
    };
    json!({
        "name": name,
        "digest": { "blake3": hex(&digest) },
        "annotations": { "node": node_text::format(node) },
    })
}

fn connection(connection: &Connection) -> Value {
    json!({
        "name": connection.name,
        "address": connection.address.map(|address| address.to_string()),
        "sent": connection.sent,
        "received": connection.received,
        "verdict": connection.verdict.to_string(),
    })
}

fn hex(digest: &B3Digest) -> String {
    HEXLOWER.encode(digest.as_slice())
}

/// When the build left the queue.
fn started(record: &Record) -> Duration {
    record.phases.get(1).map_or(Duration::ZERO, |(_, begun)| *begun)
}

fn time(created: SystemTime, after: Duration) -> String {
    let time = created.checked_add(after).unwrap_or(created);
    humantime::format_rfc3339_millis(time).to_string()
}

/// An output that a verified statement names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Subject {
    /// Its path in the build.
    pub path: String,
    /// What it is, see [`node_text`].
    pub node: String,
}

/// The outputs in a verified statement.
///
/// # Errors
///
/// The rule that the statement breaks.
pub(crate) fn subjects(statement: &Value) -> Result<Vec<Subject>, &'static str> {
    if statement["_type"] != STATEMENT_TYPE {
        return Err("is no in-toto statement, version 1");
    }
    if statement["predicateType"] != PREDICATE_TYPE
        || statement["predicate"]["buildDefinition"]["buildType"] != BUILD_TYPE
    {
        return Err("is not about a build of Cofferdam's");
    }
    let subjects = statement["subject"].as_array().ok_or("has no list of subjects")?;
    let subject = |subject: &Value| {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        Some(Subject { path: text(&subject["name"])?, node: text(&subject["annotations"]["node"])? })
    };
    subjects.iter().map(subject).collect::<Option<_>>().ok_or("has a subject without a name or a node")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_statement_of_ours_names_outputs() {
        let subject = json!({ "name": "build/out", "annotations": { "node": "link:a" } });
        let ours = || {
            json!({
                "_type": STATEMENT_TYPE,
                "predicateType": PREDICATE_TYPE,
                "predicate": { "buildDefinition": { "buildType": BUILD_TYPE } },
                "subject": [subject],
            })
        };
        let expected = [Subject { path: "build/out".to_owned(), node: "link:a".to_owned() }];
        assert_eq!(subjects(&ours()).unwrap(), expected);
        for key in ["_type", "predicateType", "predicate", "subject"] {
            let mut wrong = ours();
            wrong[key] = json!("another");
            assert!(subjects(&wrong).is_err(), "{key}");
        }
        let mut nameless = ours();
        nameless["subject"][0]["name"] = json!(1);
        assert!(subjects(&nameless).is_err());
    }

    #[test]
    fn a_resource_has_the_digest_of_its_contents() {
        let digest = B3Digest::of(b"contents");
        let file = resource("a", &Node::File { digest, size: 8, executable: true });
        assert_eq!(file["digest"]["blake3"], hex(&digest));
        assert_eq!(file["annotations"]["node"], format!("file:{digest}:8:x"));
        let link = resource("b", &Node::Symlink { target: "there".try_into().unwrap() });
        assert_eq!(link["digest"]["blake3"], hex(&B3Digest::of(b"there")));
    }
}

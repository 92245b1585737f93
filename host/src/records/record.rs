use std::{
    collections::BTreeSet,
    fmt::Write as _,
    ops::Range,
    time::{Duration, SystemTime},
};

use cofferdam_castore::{B3Digest, Node};
use cofferdam_protocol::{Sample, Usage};
use serde::{Deserialize, Serialize, de};

use super::BuildId;
use crate::{
    build::{Phase, StandbyUse, failure::Failure},
    machine::vmm,
    network::Connection,
    request::{BuildOutput, OutputOrder},
};

/// Most characters of a command line that [`describe`] shows.
const MAX_DESCRIPTION_CHARS: usize = 200;

/// The reason of a failed build whose end was not recorded.
pub(super) const LOST: &str = "lost";

/// The record of one build. Durations count from `created`, by the monotonic clock.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The build's id.
    #[serde(with = "text")]
    pub id: BuildId,
    /// [`crate::request::BuildRequest::digest`].
    #[serde(with = "text")]
    pub request_digest: B3Digest,
    /// Digest of everything the build could see beside its request, see [`crate::build::Builder::environment`].
    #[serde(with = "text", default = "unknown")]
    pub environment: B3Digest,
    /// The client that submitted the request.
    pub client: String,
    /// Clients that submitted an equal request while the build was active, at most [`super::MAX_JOINED`].
    #[serde(default)]
    pub joined: Vec<String>,
    /// The command line, see [`describe`].
    pub description: String,
    /// When the request arrived, by the wall clock.
    pub created: SystemTime,
    /// The phases, and when each began.
    pub phases: Vec<(Phase, Duration)>,
    /// When it ended.
    pub ended: Option<Duration>,
    /// The VMM that ran it.
    pub machine: Option<Machine>,
    /// Whether it had a standby machine. `None` without a stock of them, and before the build's start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<StandbyUse>,
    /// Its resource usage.
    pub usage: Option<Usage>,
    /// The size of its log, see [`super::Records::read_log`].
    pub log: Log,
    /// The order of the outputs in the request and in the outcome.
    #[serde(default, skip_serializing_if = "OutputOrder::is_sorted")]
    pub output_order: OutputOrder,
    /// The outputs' paths in the order of the outcome, at most [`super::MAX_OUTPUT_PATHS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub output_paths: Vec<String>,
    /// What its command used as it ran, at most [`super::MAX_SAMPLES`] in the order of their times.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub samples: Vec<Sampled>,
    /// The names of its secrets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// How it ended; `None` while it waits or runs.
    pub outcome: Option<Outcome>,
    /// Its connections, at most [`super::MAX_CONNECTIONS`], in the order in which they ended.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub connections: Vec<Connection>,
    /// How many more there were.
    #[serde(default)]
    pub more_connections: u64,
    /// The remains of a failed build, if they were kept.
    #[serde(with = "optional_node")]
    pub kept: Option<Node>,
}

/// The VMM that ran a build.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// The kind of VMM, as in `cloud-hypervisor`.
    pub vmm: String,
    /// Its version.
    pub version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
}

impl From<&vmm::Choice> for Machine {
    fn from(choice: &vmm::Choice) -> Self {
        Self {
            vmm: choice.kind.to_string(),
            version: choice.version.clone(),
            accelerator: choice.accelerator.to_string(),
        }
    }
}

/// The size of a log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Log {
    /// Its length in bytes, uncompressed.
    pub bytes: u64,
    /// Whether the log was cut at its limit.
    pub truncated: bool,
}

/// What a command used until, and at, some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "[u64; 3]", into = "[u64; 3]")]
pub(crate) struct Sampled {
    /// Since the command's start.
    pub wall_ms: u64,
    /// Processor time until then.
    pub cpu_ms: u64,
    /// Memory at that moment.
    pub memory_bytes: u64,
}

impl From<&Sample> for Sampled {
    fn from(Sample { usage, memory_bytes, .. }: &Sample) -> Self {
        let cpu_us = usage.user_us.saturating_add(usage.system_us);
        Self { wall_ms: usage.wall_us / 1000, cpu_ms: cpu_us / 1000, memory_bytes: *memory_bytes }
    }
}

impl From<[u64; 3]> for Sampled {
    fn from([wall_ms, cpu_ms, memory_bytes]: [u64; 3]) -> Self {
        Self { wall_ms, cpu_ms, memory_bytes }
    }
}

impl From<Sampled> for [u64; 3] {
    fn from(Sampled { wall_ms, cpu_ms, memory_bytes }: Sampled) -> Self {
        [wall_ms, cpu_ms, memory_bytes]
    }
}

/// How a build ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// It succeeded, with these outputs in the request's order.
    Built(Vec<Output>),
    /// It has no result.
    Failed(Failure),
}

/// One output of a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// What it is.
    #[serde(with = "node")]
    pub node: Node,
    /// See [`BuildOutput::needles`].
    pub needles: BTreeSet<u64>,
}

impl From<BuildOutput> for Output {
    fn from(BuildOutput { node, needles }: BuildOutput) -> Self {
        Self { node, needles }
    }
}

impl From<Output> for BuildOutput {
    fn from(Output { node, needles }: Output) -> Self {
        Self { node, needles }
    }
}

/// A build's state, for lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// It waits or runs.
    Unfinished,
    /// It has succeeded.
    Built,
    /// It has failed.
    Failed,
}

impl Record {
    /// The build's state.
    pub(crate) fn status(&self) -> Status {
        match self.outcome {
            None => Status::Unfinished,
            Some(Outcome::Built(_)) => Status::Built,
            Some(Outcome::Failed(_)) => Status::Failed,
        }
    }

    /// Whether the process that ran the build was killed, or could not record how it ended.
    pub(crate) fn is_lost(&self) -> bool {
        matches!(&self.outcome, Some(Outcome::Failed(failure)) if failure.reason == LOST)
    }

    /// Each phase, from its beginning to the next phase or the build's end.
    pub(crate) fn spans(&self) -> impl Iterator<Item = (Phase, Range<Duration>)> {
        let ends = self.phases.iter().skip(1).map(|(_, begun)| *begun).chain(self.ended);
        self.phases.iter().zip(ends).map(|((phase, begun), end)| (*phase, *begun..end.max(*begun)))
    }

    pub(super) fn encode(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(self)
    }

    /// Decodes the record stored under this id.
    pub(super) fn decode(id: BuildId, bytes: &[u8]) -> serde_json::Result<Self> {
        let record: Self = serde_json::from_slice(bytes)?;
        if record.id != id {
            return Err(de::Error::custom(format!("it is the record of build {}", record.id)));
        }
        Ok(record)
    }
}

/// The environment in records that don't have one.
fn unknown() -> B3Digest {
    [0; B3Digest::LENGTH].into()
}

/// A command line as one short line without control characters.
pub(crate) fn describe(command_args: &[String]) -> String {
    let mut line = String::new();
    for arg in command_args {
        if line.len() > 4 * MAX_DESCRIPTION_CHARS {
            break;
        }
        let separator = if line.is_empty() { "" } else { " " };
        let start: String = arg.chars().take(MAX_DESCRIPTION_CHARS).collect();
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "%+,-./:=@_".contains(c);
        let written = if !start.is_empty() && start.chars().all(is_plain) {
            write!(line, "{separator}{start}")
        } else {
            write!(line, "{separator}{start:?}")
        };
        written.expect("a String takes all");
    }
    match line.char_indices().nth(MAX_DESCRIPTION_CHARS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// Serialises a value as its text.
mod text {
    use std::{fmt::Display, str::FromStr};

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(value: &impl Display, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// Serialises a node as a `snix.castore.v1.Entry` without a name, in base64.
mod node {
    use cofferdam_castore::proto::{Entry, EntryExt as _};
    use data_encoding::BASE64;
    use prost::Message as _;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use super::Node;

    pub(super) fn serialize<S: Serializer>(node: &Node, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(&Entry::unnamed(node.clone()).encode_to_vec()))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Node, D::Error> {
        let text = String::deserialize(deserializer)?;
        let encoded = BASE64.decode(text.as_bytes()).map_err(D::Error::custom)?;
        let entry = Entry::decode(encoded.as_slice()).map_err(D::Error::custom)?;
        entry.try_into_unnamed().map_err(D::Error::custom)
    }
}

mod optional_node {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Node;

    #[derive(Serialize, Deserialize)]
    struct Wrapped(#[serde(with = "super::node")] Node);

    pub(super) fn serialize<S: Serializer>(node: &Option<Node>, serializer: S) -> Result<S::Ok, S::Error> {
        node.clone().map(Wrapped).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Node>, D::Error> {
        Ok(Option::<Wrapped>::deserialize(deserializer)?.map(|Wrapped(node)| node))
    }
}

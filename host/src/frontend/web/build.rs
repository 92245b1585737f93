//! One build.

use std::time::{Duration, SystemTime};

use askama::Template;
use bytes::Bytes;
use cofferdam_castore::Node;
use cofferdam_rpc::{Client, Page};
use futures::stream;
use tonic::codegen::http::StatusCode;

use super::{
    Ask, Site,
    answer::{self, Frame, Problem},
    picture::{self, Bar, Curve},
};
use crate::{
    build::{StandbyUse, failure::Failure},
    network::Connection,
    quantity::{show_age, show_duration, show_size},
    records::{BuildId, Outcome, Record},
    request::node_text,
    scheduler::{Found, State, queue::Waiting},
    text::changes_direction,
};

#[derive(Template)]
#[template(path = "build.html")]
struct BuildPage {
    frame: Frame,
    id: String,
    state: &'static str,
    command: String,
    rows: Vec<(&'static str, String)>,
    bars: Vec<Bar>,
    curves: Vec<Curve>,
    log_bytes: String,
    is_active: bool,
    failure: Option<FailureView>,
    repeat: Option<String>,
    outputs: Vec<OutputLine>,
    connections: Vec<ConnectionLine>,
    more_connections: u64,
    has_provenance: bool,
}

struct FailureView {
    kind: &'static str,
    reason: String,
    message: String,
    causes: Vec<String>,
    advice: Vec<String>,
    fields: Vec<(String, String)>,
}

pub(super) struct OutputLine {
    pub(super) href: String,
    pub(super) name: String,
    pub(super) kind: &'static str,
    pub(super) size: String,
}

struct ConnectionLine {
    server: String,
    verdict: String,
    sent: String,
    received: String,
}

impl Site {
    /// A build that a client may see, as it stands.
    pub(super) async fn record(&self, client: &Client, id: BuildId) -> Result<(Record, Option<State>), Problem> {
        Ok(match self.scheduler.find(client, id).await? {
            Found::Active(subscription) => {
                (subscription.build.record(), Some(subscription.build.state().borrow().clone()))
            }
            Found::Ended(record) => (*record, None),
        })
    }

    pub(super) async fn build(&self, ask: &Ask, id: BuildId) -> Result<Page, Problem> {
        let client = &ask.guest.client;
        let _turn = self.turn(&self.pages, client).await?;
        let (record, state) = self.record(client, id).await?;
        let has_request = self.scheduler.request(client, id).await?.is_some();
        let has_provenance = self.scheduler.proof(client, id).await.is_ok();
        let age = SystemTime::now().duration_since(record.created).unwrap_or_default();
        let page = BuildPage {
            frame: Frame { is_live: ask.question.has("live") && record.outcome.is_none(), ..Frame::of(&ask.guest) },
            id: record.id.to_string(),
            state: state_word(&record, state.as_ref()),
            command: shown(&record.description),
            rows: rows(&record, state.as_ref(), &self.scheduler.owner_for(client, &record)),
            bars: picture::bars(&record, age),
            curves: picture::curves(&record.samples),
            log_bytes: show_size(record.log.bytes),
            is_active: record.outcome.is_none(),
            failure: failure(&record),
            repeat: has_request.then(|| format!("cofferdam build --rebuild request-{}.binpb", record.id)),
            outputs: outputs(&record),
            connections: connections(&record),
            more_connections: record.more_connections,
            has_provenance,
        };
        Ok(answer::page(StatusCode::OK, &page))
    }

    pub(super) async fn provenance(&self, ask: &Ask, id: BuildId) -> Result<Page, Problem> {
        let _turn = self.turn(&self.pages, &ask.guest.client).await?;
        let statement = self.scheduler.proof(&ask.guest.client, id).await?;
        Ok(whole(&format!("provenance-{id}.json"), statement))
    }

    pub(super) async fn request(&self, ask: &Ask, id: BuildId) -> Result<Page, Problem> {
        let _turn = self.turn(&self.pages, &ask.guest.client).await?;
        let request = self.scheduler.request(&ask.guest.client, id).await?;
        let request = request.ok_or_else(|| Problem::unknown("the build's request was too large to be kept"))?;
        Ok(whole(&format!("request-{id}.binpb"), request))
    }
}

fn whole(name: &str, contents: Vec<u8>) -> Page {
    let bytes = contents.len() as u64;
    answer::download(name.as_bytes(), Some(bytes), stream::iter([Ok(Bytes::from(contents))]))
}

/// A build's state in a word, which is also a class of the style sheet.
pub(super) fn state_word(record: &Record, state: Option<&State>) -> &'static str {
    match (&record.outcome, state) {
        (Some(Outcome::Built(_)), _) => "succeeded",
        (Some(Outcome::Failed(_)), _) if record.is_lost() => "lost",
        (Some(Outcome::Failed(_)), _) => "failed",
        (None, Some(State::Queued { .. })) => "queued",
        (None, _) => "running",
    }
}

/// Why a build waits.
pub(super) fn waits_for(state: Option<&State>) -> Option<String> {
    let Some(State::Queued { position, waiting_for }) = state else { return None };
    let why = match waiting_for {
        Waiting::Builds => "as many builds run as the budget allows".to_owned(),
        Waiting::Memory => "running builds leave it too little memory".to_owned(),
        Waiting::Cpus => "running builds leave it too few CPUs".to_owned(),
        Waiting::Disk => "the disk has too little free space".to_owned(),
        Waiting::Tenant { running } => format!("its tenant may run no more than {running} at a time"),
        Waiting::Quota { disk_bytes, allowed_bytes } => format!(
            "its tenant's running builds may grow to {} on the disk, of {} that they may have",
            show_size(*disk_bytes),
            show_size(*allowed_bytes)
        ),
        Waiting::Turn => "others come first".to_owned(),
    };
    Some(format!("{position} before it: {why}"))
}

/// Text of a build or a client, without characters that control or reorder what is around them.
pub(super) fn shown(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || changes_direction(c) { '\u{fffd}' } else { c }).collect()
}

/// How long ago something was.
pub(super) fn age(time: SystemTime, now: SystemTime) -> String {
    show_age(now.duration_since(time).unwrap_or_default())
}

/// A time so long after another one.
pub(super) fn time(created: SystemTime, after: Duration) -> String {
    let time = created.checked_add(after).unwrap_or(created);
    humantime::format_rfc3339_seconds(time).to_string()
}

/// What there is to say of a node in a list.
pub(super) fn kind_and_size(node: &Node) -> (&'static str, String) {
    match node {
        Node::Directory { size, .. } => ("directory", format!("{size} entries in all")),
        Node::File { size, executable: true, .. } => ("program", show_size(*size)),
        Node::File { size, .. } => ("file", show_size(*size)),
        Node::Symlink { target } => ("link", shown(&format!("to {}", String::from_utf8_lossy(target.as_bytes())))),
    }
}

fn rows(record: &Record, state: Option<&State>, client: &str) -> Vec<(&'static str, String)> {
    let mut rows = vec![("Tenant", shown(client)), ("Submitted", time(record.created, Duration::ZERO))];
    rows.extend(waits_for(state).map(|why| ("Waits", why)));
    if let Some(ended) = record.ended {
        rows.push(("Ended", format!("{}, after {}", time(record.created, ended), show_duration(ended))));
    }
    if let Some(machine) = &record.machine {
        rows.push(("Machine", format!("{} {}, {}", machine.vmm, machine.version, machine.accelerator)));
    }
    rows.extend(record.standby.map(|standby| ("Standby machine", standby_text(standby).to_owned())));
    if let Some(usage) = &record.usage {
        let cpu = Duration::from_micros(usage.user_us.saturating_add(usage.system_us));
        let [memory, scratch] = [usage.peak_memory_bytes, usage.scratch_bytes].map(show_size);
        let cpu = show_duration(cpu);
        rows.push(("Used", format!("processor time {cpu}, memory {memory} at most, scratch disk {scratch}")));
    }
    if let Some(State::Running { sample: Some(sample), .. }) = state {
        let [memory, scratch] = [sample.memory_bytes, sample.usage.scratch_bytes].map(show_size);
        rows.push(("Uses", format!("memory {memory}, scratch disk {scratch}, {} processes", sample.processes)));
    }
    if !record.secrets.is_empty() {
        rows.push(("Secrets", shown(&record.secrets.join(", "))));
    }
    rows.push(("Request", record.request_digest.to_string()));
    rows.push(("Environment", record.environment.to_string()));
    rows
}

fn standby_text(standby: StandbyUse) -> &'static str {
    match standby {
        StandbyUse::Used => "yes",
        StandbyUse::Network => "no: a build with a network needed a machine of its own",
        StandbyUse::Paths => "no: a build that sees paths of the host needed a machine of its own",
        StandbyUse::NoneInStock => "no: there was none with its memory, CPUs, scratch size and devices",
        StandbyUse::Broken => "no: the machine in stock had died or did not answer",
    }
}

fn failure(record: &Record) -> Option<FailureView> {
    let Some(Outcome::Failed(failure)) = &record.outcome else { return None };
    let Failure { kind, reason, message, causes, advice, fields } = failure;
    let value = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    Some(FailureView {
        kind: match kind.word() {
            "build_failed" => "the build",
            "request_wrong" => "the request",
            _ => "the daemon's host",
        },
        reason: shown(reason),
        message: shown(message),
        causes: causes.iter().map(|cause| shown(cause)).collect(),
        advice: advice.as_deref().into_iter().chain(failure.hint()).map(shown).collect(),
        fields: fields
            .iter()
            .filter(|(name, _)| *name != "hint")
            .map(|(name, field)| (shown(name), shown(&value(field))))
            .collect(),
    })
}

fn outputs(record: &Record) -> Vec<OutputLine> {
    let line = |at: String, name: String, node: &Node| {
        let (kind, size) = kind_and_size(node);
        OutputLine { href: format!("/builds/{}/outputs/{at}", record.id), name: shown(&name), kind, size }
    };
    let built = match &record.outcome {
        Some(Outcome::Built(outputs)) => &outputs[..],
        _ => &[],
    };
    let name = |index: usize| record.output_paths.get(index).cloned().unwrap_or_else(|| format!("output {index}"));
    let lines = built.iter().enumerate().map(|(index, output)| line(index.to_string(), name(index), &output.node));
    let kept = record.kept.iter().map(|node| line("kept".to_owned(), "what the failed build left".to_owned(), node));
    lines.chain(kept).collect()
}

fn connections(record: &Record) -> Vec<ConnectionLine> {
    let line = |connection: &Connection| ConnectionLine {
        server: shown(&connection.server()),
        verdict: shown(&connection.verdict.to_string()),
        sent: show_size(connection.sent),
        received: show_size(connection.received),
    };
    record.connections.iter().map(line).collect()
}

/// A node as commands take it.
pub(super) fn node(node: &Node) -> String {
    node_text::format(node).to_string()
}

//! `builds`: what a daemon builds and has built.

use std::{
    borrow::Cow,
    io::{self, ErrorKind, IsTerminal as _, Write as _},
    time::{Duration, SystemTime},
};

use clap::{Args, Subcommand};
use cofferdam_castore::proto::{Entry, EntryExt as _};
use cofferdam_proto::cofferdam::v1::{
    BuildInfo, CancelRequest, GetRequest, ListRequest, LogRequest, Phase, ProvenanceRequest, Times, build_info::State,
    done::Outcome,
};
use data_encoding::BASE64;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    CliError, ClientArgs, node_text,
    plain_text::PlainText,
    print,
    quantity::{show_age, show_duration, show_size},
    remote,
    timestamps::Timestamps,
};
use crate::{build::failure::usage_fields, machine::jail::one_line, records::BuildId};

const EXAMPLES: &str = "\
Examples:
  cofferdam builds list --active
  cofferdam builds log -f 0197b3a2-…
  cofferdam builds cancel 0197b3a2-…

An id may be shortened to its beginning, if no other of the latest 1000 builds begins so.";

/// Most builds in a list.
const MAX_LISTED: u32 = 1000;

/// Most builds that are named where an id is ambiguous.
const MAX_CANDIDATES: usize = 5;

/// Shows, follows and cancels a daemon's builds
///
/// The daemon is the one of --daemon or COFFERDAM_DAEMON, else the one at daemon.sock in the state directory.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct BuildsArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prints a header and one line a build, the latest first, with tabs between
    ///
    /// The columns: id, state, age, how long it has run, the client (for operators, who see the builds of all clients) and
    /// the command. Operators are root and those that the daemon's configuration lists in `[operators]`. With --json each
    /// line is an object, and there is no header.
    #[command(after_help = "Examples:\n  cofferdam builds list --active\n  cofferdam builds list --json | jq .id")]
    List {
        /// Only builds that wait or run
        #[arg(long)]
        active: bool,
        /// Most builds to list, up to 1000
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: u32,
    },
    /// Prints the record of a build
    #[command(after_help = "Examples:\n  cofferdam builds show 0197b3a2-…\n  cofferdam builds show --json 0197b3a2-…")]
    Show {
        /// The build
        id: String,
    },
    /// Writes to stdout what a build has written to stdout and stderr
    #[command(
        after_help = "Examples:\n  cofferdam builds log 0197b3a2-…\n  cofferdam builds log --follow --timestamps 0197b3a2-…"
    )]
    Log {
        /// The build
        id: String,
        /// Go on until the build ends
        #[arg(long, short)]
        follow: bool,
        /// Skip this many bytes at the beginning
        #[arg(long, value_name = "BYTES", default_value_t = 0)]
        offset: u64,
        /// Begin each line with the time when it comes to this host. Lines from before this command have `-`, since the log keeps
        /// no times
        #[arg(long, requires = "follow")]
        timestamps: bool,
    },
    /// Writes to stdout the signed statement of how a build's outputs were made, for `cofferdam verify`
    #[command(
        after_help = "Examples:\n  cofferdam builds provenance --public-key > daemon.pem\n  cofferdam builds provenance 0197b3a2-… > statement.json\n  cofferdam verify statement.json --key daemon.pem --out result"
    )]
    Provenance {
        /// The build
        #[arg(required_unless_present = "public_key")]
        id: Option<String>,
        /// Print the daemon's key, which checks its statements, instead
        #[arg(long, conflicts_with = "id")]
        public_key: bool,
    },
    /// Ends your interest in a build, which goes on if others wait for it; for operators, cancels it for all
    #[command(after_help = "Examples:\n  cofferdam builds cancel 0197b3a2-…")]
    Cancel {
        /// The build
        id: String,
    },
}

impl BuildsArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let daemon = remote::Daemon::at_or_own(client.daemon())?;
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(CliError::interrupted()),
            done = self.command.execute(client, &daemon) => done,
        }
    }
}

impl Command {
    async fn execute(self, args: &ClientArgs, daemon: &remote::Daemon) -> Result<(), CliError> {
        let refused = |status: tonic::Status| daemon.refused(&status);
        let mut client = daemon.client();
        match self {
            Self::List { active, limit } => {
                let list = client.list(ListRequest { limit, active }).await.map_err(refused)?.into_inner();
                if !args.json {
                    print(&header(list.of_all_clients))?;
                }
                let show = |build: &BuildInfo| args.print(&line(build, list.of_all_clients), &object(build));
                list.builds.iter().try_for_each(show)
            }
            Self::Show { id } => {
                let id = whole_id(daemon, id).await?;
                let build = client.get(GetRequest { id }).await.map_err(refused)?.into_inner();
                args.print(&sheet(&build), &object(&build))
            }
            Self::Log { id, follow, offset, timestamps } => {
                args.refuse_json("what the build has written")?;
                let id = whole_id(daemon, id).await?;
                let live_from = match timestamps {
                    true => {
                        Some(client.get(GetRequest { id: id.clone() }).await.map_err(refused)?.into_inner().log_bytes)
                    }
                    false => None,
                };
                let chunks = client.log(LogRequest { id: id.clone(), offset, follow }).await.map_err(refused)?;
                let (mut chunks, mut out) = (chunks.into_inner(), LogOut::new(live_from));
                while let Some(chunk) = chunks.message().await.map_err(|status| daemon.left(&status, &id))? {
                    match out.write(chunk.offset, &chunk.data) {
                        Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
                        written => written.map_err(|error| CliError::failed("can't write to stdout", error))?,
                    }
                }
                Ok(())
            }
            Self::Provenance { id, public_key } => {
                args.refuse_json("a statement, which is JSON anyway, or a key")?;
                let id = match id {
                    Some(id) => whole_id(daemon, id).await?,
                    None => String::new(),
                };
                let answer = client.provenance(ProvenanceRequest { id }).await.map_err(refused)?.into_inner();
                let envelope = String::from_utf8_lossy(&answer.envelope);
                print(if public_key { &answer.public_key } else { &envelope })
            }
            Self::Cancel { id } => {
                let id = whole_id(daemon, id).await?;
                client.cancel(CancelRequest { id: id.clone() }).await.map_err(refused)?;
                args.print("", &json!({ "id": id }))
            }
        }
    }
}

/// The id that begins like this.
async fn whole_id(daemon: &remote::Daemon, text: String) -> Result<String, CliError> {
    if text.parse::<BuildId>().is_ok() {
        return Ok(text);
    }
    let list = daemon.client().list(ListRequest { limit: MAX_LISTED, active: false }).await;
    let builds = list.map_err(|status| daemon.refused(&status))?.into_inner().builds;
    matching(&text, &builds)
}

fn matching(text: &str, builds: &[BuildInfo]) -> Result<String, CliError> {
    let found: Vec<_> = builds.iter().filter(|build| !text.is_empty() && build.id.starts_with(text)).collect();
    match found[..] {
        [build] => Ok(build.id.clone()),
        [] => {
            Err(CliError::wrong(format!("none of your latest {MAX_LISTED} builds has an id that begins with {text:?}"))
                .try_this("`cofferdam builds list` shows the ids; an older build needs its whole id"))
        }
        _ => {
            let shown =
                found.iter().take(MAX_CANDIDATES).map(|build| format!("{} ({})", build.id, one_line(&build.command)));
            let mut candidates = shown.collect::<Vec<_>>().join(", ");
            if let Some(more @ 1..) = found.len().checked_sub(MAX_CANDIDATES) {
                candidates += &format!(" and {more} more");
            }
            Err(CliError::wrong(format!("{} builds have ids that begin with {text:?}: {candidates}", found.len()))
                .try_this("more of the id"))
        }
    }
}

/// stdout: as it is for programs, harmless for terminals.
struct LogOut {
    plain_text: Option<PlainText>,
    /// With the offset from which on times are known.
    timestamps: Option<(u64, Timestamps)>,
}

impl LogOut {
    fn new(live_from: Option<u64>) -> Self {
        let timestamps = live_from.map(|offset| (offset, Timestamps::default()));
        Self { plain_text: io::stdout().is_terminal().then(PlainText::default), timestamps }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut bytes = Cow::Borrowed(bytes);
        if let Some(plain_text) = &mut self.plain_text {
            bytes = plain_text.filter(&bytes).into_bytes().into();
        }
        if let Some((live_from, timestamps)) = &mut self.timestamps {
            let time = (offset >= *live_from).then(SystemTime::now);
            bytes = timestamps.stamp(&bytes, time).into();
        }
        let mut stdout = io::stdout().lock();
        stdout.write_all(&bytes)?;
        stdout.flush()
    }
}

fn state(build: &BuildInfo) -> &'static str {
    match build.state() {
        State::Queued => "queued",
        State::Running => match build.phase() {
            Phase::Resolving => "resolving",
            Phase::Booting => "booting",
            Phase::Ingesting => "ingesting",
            Phase::Keeping => "keeping",
            Phase::Shell => "shell",
            Phase::Running | Phase::Unspecified => "running",
        },
        State::Succeeded => "succeeded",
        State::Failed => "failed",
        State::Lost => "lost",
        State::Unspecified => "unknown",
    }
}

fn time(unix_ms: u64) -> String {
    let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(unix_ms));
    time.map_or_else(String::new, |time| humantime::format_rfc3339_seconds(time).to_string())
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// How long it has been running, or ran.
fn ran(build: &BuildInfo) -> Option<Duration> {
    let end = if build.ended_unix_ms == 0 { now() } else { Duration::from_millis(build.ended_unix_ms) };
    (build.started_unix_ms != 0).then(|| end.saturating_sub(Duration::from_millis(build.started_unix_ms)))
}

fn header(with_client: bool) -> String {
    format!("ID\tSTATE\tAGE\tRAN\t{}COMMAND\n", if with_client { "CLIENT\t" } else { "" })
}

fn line(build: &BuildInfo, with_client: bool) -> String {
    let state = match &build.queued {
        Some(queued) if !queued.waiting_for.is_empty() => format!("{}: {}", state(build), queued.waiting_for),
        _ => state(build).to_owned(),
    };
    let age = show_age(now().saturating_sub(Duration::from_millis(build.submitted_unix_ms)));
    let ran = ran(build).map_or_else(|| "-".to_owned(), show_duration);
    let client = if with_client { format!("{}\t", build.client) } else { String::new() };
    format!("{}\t{}\t{age}\t{ran}\t{client}{}\n", build.id, state, one_line(&build.command))
}

fn sheet(build: &BuildInfo) -> String {
    let mut rows = vec![
        ("id", build.id.clone()),
        ("state", state(build).to_owned()),
        ("client", build.client.clone()),
        ("command", build.command.clone()),
        ("request", BASE64.encode(&build.request_digest)),
        ("environment", BASE64.encode(&build.environment_digest)),
        ("submitted", time(build.submitted_unix_ms)),
        ("log", format!("{} bytes{}", build.log_bytes, if build.log_truncated { ", cut" } else { "" })),
    ];
    if let Some(queued) = &build.queued {
        rows.push(("queue", remote::waiting(queued)));
    }
    if let Some(ran) = ran(build) {
        rows.push(("ran", show_duration(ran)));
        rows.push(("machine", format!("{} {}, {}", build.vmm, build.vmm_version, build.accelerator)));
        rows.extend(standby(&build.standby).map(|standby| ("standby", standby.to_owned())));
    }
    if let Some(times) = &build.times {
        let phases = phases(times).map(|(phase, us)| format!("{phase} {}", show_duration(Duration::from_micros(us))));
        rows.push(("phases", phases.join(", ")));
    }
    if let Some(usage) = &build.usage {
        let cpu = show_duration(Duration::from_micros(usage.user_us.saturating_add(usage.system_us)));
        let [memory, scratch] = [usage.peak_memory_bytes, usage.scratch_bytes].map(show_size);
        rows.push(("used", format!("processor {cpu}, memory {memory}, scratch {scratch}")));
    }
    match build.done.as_ref().and_then(|done| done.outcome.as_ref()) {
        Some(Outcome::Success(success)) => {
            let outputs = success.response.iter().flat_map(|response| &response.outputs);
            rows.extend(outputs.map(|output| ("output", node(output.output.as_ref()))));
        }
        Some(Outcome::Failure(failure)) => {
            let failure = remote::failed(failure.clone());
            rows.push(("failure", failure.chain()));
            rows.extend(failure.hint().map(|hint| ("hint", hint.to_owned())));
            rows.extend(failure.fields.get("kept").and_then(Value::as_str).map(|node| ("kept", node.to_owned())));
        }
        None => {}
    }
    rows.extend(build.secrets.iter().map(|name| ("secret", name.clone())));
    for connection in &build.connections {
        let [sent, received] = [connection.sent, connection.received].map(show_size);
        let server = [&*connection.name, &*connection.address].join(" ");
        let carried = format!("{}, {sent} sent, {received} received", connection.verdict);
        rows.push(("connection", format!("{} {carried}", server.trim())));
    }
    if build.more_connections > 0 {
        rows.push(("connections", format!("and {} more", build.more_connections)));
    }
    rows.into_iter().map(|(name, value)| format!("{name}\t{}\n", one_line(&value))).collect()
}

/// Whether a build had a standby machine, and if it hadn't, why. `None` if its daemon keeps none.
fn standby(word: &str) -> Option<&str> {
    Some(match word {
        "" => return None,
        "used" => "yes",
        "network" => "no: a build with a network needed a machine of its own",
        "paths" => "no: a build that sees paths of the host needed a machine of its own",
        "none_in_stock" => "no: there was none with its memory, CPUs, scratch size and devices",
        "broken" => "no: the machine in stock had died or did not answer",
        other => other,
    })
}

fn phases(times: &Times) -> [(&'static str, u64); 4] {
    let Times { resolve_us, boot_us, run_us, ingest_us } = *times;
    [("resolving", resolve_us), ("booting", boot_us), ("running", run_us), ("ingesting", ingest_us)]
}

fn object(build: &BuildInfo) -> Value {
    let mut object = json!({
        "id": build.id,
        "state": state(build),
        "client": build.client,
        "command": build.command,
        "request_digest": BASE64.encode(&build.request_digest),
        "environment_digest": BASE64.encode(&build.environment_digest),
        "submitted_unix_ms": build.submitted_unix_ms,
        "started_unix_ms": build.started_unix_ms,
        "ended_unix_ms": build.ended_unix_ms,
        "vmm": build.vmm,
        "vmm_version": build.vmm_version,
        "accelerator": build.accelerator,
        "standby": build.standby,
        "log_bytes": build.log_bytes,
    });
    if let Some(queued) = &build.queued {
        object["queued"] = json!({
            "position": queued.position,
            "waiting_for": queued.waiting_for,
            "running": queued.running,
            "disk_bytes": queued.disk_bytes,
            "disk_limit_bytes": queued.disk_limit_bytes,
        });
    }
    if let Some(times) = &build.times {
        object["seconds"] =
            phases(times).map(|(phase, us)| (phase, Duration::from_micros(us).as_secs_f64())).into_iter().collect();
    }
    if let Some(usage) = &build.usage {
        object["usage"] = usage_fields(&remote::used(*usage));
    }
    if !build.secrets.is_empty() {
        object["secrets"] = json!(build.secrets);
    }
    if !build.connections.is_empty() {
        let connections = build.connections.iter().map(|connection| {
            json!({
                "name": connection.name,
                "address": connection.address,
                "sent": connection.sent,
                "received": connection.received,
                "verdict": connection.verdict,
            })
        });
        object["connections"] = connections.collect();
        object["more_connections"] = json!(build.more_connections);
    }
    match build.done.as_ref().and_then(|done| done.outcome.as_ref()) {
        Some(Outcome::Success(success)) => {
            let outputs = success.response.iter().flat_map(|response| &response.outputs);
            object["outputs"] = outputs.map(|output| node(output.output.as_ref())).collect();
        }
        Some(Outcome::Failure(failure)) => object["failure"] = remote::failed(failure.clone()).to_json(),
        None => {}
    }
    object
}

fn node(entry: Option<&Entry>) -> String {
    let node = entry.cloned().unwrap_or_default().try_into_unnamed();
    node.map_or_else(|error| format!("no node: {error}"), |node| node_text::format(&node))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(id: &str) -> BuildInfo {
        BuildInfo { id: id.to_owned(), command: "/bin/true".to_owned(), ..BuildInfo::default() }
    }

    #[test]
    fn an_id_is_found_by_its_beginning_if_that_is_unique() {
        let builds = ["0197b3a2-aa", "0197b3a2-ab", "0197b3a3-aa"].map(build);
        assert_eq!(matching("0197b3a2-ab", &builds).unwrap(), "0197b3a2-ab");
        assert_eq!(matching("0197b3a3", &builds).unwrap(), "0197b3a3-aa");
        let ambiguous = matching("0197b3a2", &builds).unwrap_err();
        assert_eq!(ambiguous.exit().code(), 2);
        let candidates =
            "2 builds have ids that begin with \"0197b3a2\": 0197b3a2-aa (/bin/true), 0197b3a2-ab (/bin/true)";
        assert_eq!(ambiguous.to_string(), candidates);
        let many: Vec<_> = (0..8).map(|at| build(&format!("0197-{at}"))).collect();
        assert!(matching("0197", &many).unwrap_err().to_string().ends_with("and 3 more"));
        for unknown in ["0198", "", "197b3a2"] {
            assert_eq!(matching(unknown, &builds).unwrap_err().exit().code(), 2, "{unknown:?}");
        }
    }

    #[test]
    fn a_line_has_a_column_for_each_word_of_the_header() {
        let columns = |text: &str| text.matches('\t').count();
        for with_client in [false, true] {
            assert_eq!(columns(&line(&build("a"), with_client)), columns(&header(with_client)));
        }
    }
}

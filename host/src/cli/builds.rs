//! `builds`: what a daemon builds and has built.

use std::{
    io::{self, ErrorKind, IsTerminal as _, Write as _},
    time::{Duration, SystemTime},
};

use clap::{Args, Subcommand};
use cofferdam_castore::proto::{Entry, EntryExt as _};
use cofferdam_proto::cofferdam::v1::{
    BuildInfo, CancelRequest, GetRequest, ListRequest, LogRequest, Phase, Times, build_info::State, done::Outcome,
};
use data_encoding::BASE64;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    CliError, node_text,
    plain_text::PlainText,
    print,
    quantity::{show_duration, show_size},
    remote, state_dir,
};
use crate::{build::failure::usage_fields, machine::jail::one_line};

const EXAMPLES: &str = "\
Examples:
  cofferdam builds list --active
  cofferdam builds log -f 0197b3a2-…
  cofferdam builds cancel 0197b3a2-…";

/// Shows, follows and cancels a daemon's builds
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct BuildsArgs {
    /// The daemon: grpc+unix:///SOCKET, grpc+http://HOST:PORT or grpc+https://HOST:PORT [default: daemon.sock in the state
    /// directory]
    #[arg(long, global = true, value_name = "ADDR", env = "COFFERDAM_DAEMON")]
    daemon: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prints one line a build, the latest first: id, state, when, how long, command; tabs between
    #[command(after_help = "Examples:\n  cofferdam builds list --active\n  cofferdam builds list --json | jq .id")]
    List {
        /// Only those that wait or run
        #[arg(long)]
        active: bool,
        /// Most builds to list, up to 1000
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: u32,
        /// Print one JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Prints what is known of a build
    #[command(after_help = "Examples:\n  cofferdam builds show 0197b3a2-…\n  cofferdam builds show --json 0197b3a2-…")]
    Show {
        /// The build
        id: String,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Writes to stdout what a build has written to stdout and stderr
    #[command(after_help = "Examples:\n  cofferdam builds log 0197b3a2-…\n  cofferdam builds log --follow 0197b3a2-…")]
    Log {
        /// The build
        id: String,
        /// Go on until the build ends
        #[arg(long, short)]
        follow: bool,
        /// Leave out so many bytes at the begin
        #[arg(long, value_name = "BYTES", default_value_t = 0)]
        offset: u64,
    },
    /// Ends a build, for all who wait for it
    #[command(after_help = "Examples:\n  cofferdam builds cancel 0197b3a2-…")]
    Cancel {
        /// The build
        id: String,
    },
}

impl BuildsArgs {
    pub(super) fn json(&self) -> bool {
        matches!(self.command, Command::List { json: true, .. } | Command::Show { json: true, .. })
    }

    pub(super) async fn execute(self, cancel: &CancellationToken) -> Result<(), CliError> {
        let addr = match self.daemon {
            Some(addr) => addr,
            None => format!("grpc+unix://{}", state_dir()?.join("daemon.sock").display()),
        };
        let daemon = remote::Daemon::at(&addr)?;
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(CliError::interrupted()),
            done = self.command.execute(&daemon) => done,
        }
    }
}

impl Command {
    async fn execute(self, daemon: &remote::Daemon) -> Result<(), CliError> {
        let refused = |status: tonic::Status| daemon.refused(&status);
        let mut client = daemon.client();
        match self {
            Self::List { active, limit, json } => {
                let builds = client.list(ListRequest { limit, active }).await.map_err(refused)?.into_inner().builds;
                builds.iter().try_for_each(|build| match json {
                    true => print(&format!("{}\n", object(build))),
                    false => print(&line(build)),
                })
            }
            Self::Show { id, json } => {
                let build = client.get(GetRequest { id }).await.map_err(refused)?.into_inner();
                print(&match json {
                    true => format!("{}\n", object(&build)),
                    false => sheet(&build),
                })
            }
            Self::Log { id, follow, offset } => {
                let chunks = client.log(LogRequest { id, offset, follow }).await.map_err(refused)?;
                let (mut chunks, mut out) = (chunks.into_inner(), LogOut::new());
                while let Some(chunk) = chunks.message().await.map_err(refused)? {
                    match out.write(&chunk.data) {
                        Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
                        written => written.map_err(|error| CliError::failed("can't write to stdout", error))?,
                    }
                }
                Ok(())
            }
            Self::Cancel { id } => client.cancel(CancelRequest { id }).await.map(drop).map_err(refused),
        }
    }
}

/// stdout: as it is for programs, harmless for terminals.
struct LogOut(Option<PlainText>);

impl LogOut {
    fn new() -> Self {
        Self(io::stdout().is_terminal().then(PlainText::default))
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        match &mut self.0 {
            Some(plain) => stdout.write_all(plain.filter(bytes).as_bytes())?,
            None => stdout.write_all(bytes)?,
        }
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
        State::Unspecified => "unknown",
    }
}

fn time(unix_ms: u64) -> String {
    let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(unix_ms));
    time.map_or_else(String::new, |time| humantime::format_rfc3339_seconds(time).to_string())
}

/// How long it has been running, or ran.
fn ran(build: &BuildInfo) -> Option<Duration> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let end = if build.ended_unix_ms == 0 { now } else { Duration::from_millis(build.ended_unix_ms) };
    (build.started_unix_ms != 0).then(|| end.saturating_sub(Duration::from_millis(build.started_unix_ms)))
}

fn line(build: &BuildInfo) -> String {
    let ran = ran(build).map_or_else(|| "-".to_owned(), show_duration);
    format!("{}\t{}\t{}\t{ran}\t{}\n", build.id, state(build), time(build.submitted_unix_ms), one_line(&build.command))
}

fn sheet(build: &BuildInfo) -> String {
    let mut rows = vec![
        ("id", build.id.clone()),
        ("state", state(build).to_owned()),
        ("client", build.client.clone()),
        ("command", build.command.clone()),
        ("request", BASE64.encode(&build.request_digest)),
        ("submitted", time(build.submitted_unix_ms)),
        ("log", format!("{} bytes{}", build.log_bytes, if build.log_truncated { ", cut" } else { "" })),
    ];
    if let Some(queued) = &build.queued {
        rows.push(("waits", format!("for {}, behind {} builds", queued.waiting_for, queued.position)));
    }
    if let Some(ran) = ran(build) {
        rows.push(("ran", show_duration(ran)));
        rows.push(("machine", format!("{} {}, {}", build.vmm, build.vmm_version, build.accelerator)));
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
            rows.extend(failure.fields.get("kept").and_then(Value::as_str).map(|node| ("kept", node.to_owned())));
        }
        None => {}
    }
    rows.into_iter().map(|(name, value)| format!("{name}\t{}\n", one_line(&value))).collect()
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
        "submitted_unix_ms": build.submitted_unix_ms,
        "started_unix_ms": build.started_unix_ms,
        "ended_unix_ms": build.ended_unix_ms,
        "vmm": build.vmm,
        "vmm_version": build.vmm_version,
        "accelerator": build.accelerator,
        "log_bytes": build.log_bytes,
    });
    if let Some(queued) = &build.queued {
        object["queued"] = json!({ "position": queued.position, "waiting_for": queued.waiting_for });
    }
    if let Some(times) = &build.times {
        object["seconds"] =
            phases(times).map(|(phase, us)| (phase, Duration::from_micros(us).as_secs_f64())).into_iter().collect();
    }
    if let Some(usage) = &build.usage {
        object["usage"] = usage_fields(&remote::used(*usage));
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

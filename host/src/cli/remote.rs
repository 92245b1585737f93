//! The client of a daemon.

use std::{cell::RefCell, error::Error as _, time::Duration};

use cofferdam_castore::{
    grpc::{Peer, PeerOptions},
    proto::EntryExt as _,
};
use cofferdam_proto::{
    cofferdam::v1::{
        self as wire, Event, NixBytes, ShellInput, ShellStart, Success, TerminalSize,
        build_service_client::BuildServiceClient, done::Outcome, event::Event as Said,
        nix_service_client::NixServiceClient, shell_input::Input,
    },
    snix::build::v1::{BuildResponse, build_response},
};
use cofferdam_protocol::{Sample, Usage, WindowSize};
use futures::{Stream, StreamExt as _, stream};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming, transport::Channel};

use super::{CliError, progress::Progress, quantity::show_size, state_dir, transport};
use crate::{
    build::failure::{Failure, FailureKind, causes},
    build::{Built, Observer, Phase, Terminal, TerminalInput, Times},
    frontend::{self, failure_of},
    machine::jail::one_line,
    network::{Connection, Verdict},
    request::{BuildOutput, BuildRequest, BuildResult},
};

/// Bytes of the largest message that is accepted: a result with the most outputs and needles that a request can have.
const MAX_MESSAGE_BYTES: usize = 256 * 1024 * 1024;

/// A line before the second build of a check.
pub(super) const AGAIN: &str = "building again, to compare the outputs";

/// What became of a build on a daemon.
pub(super) enum Submitted {
    /// It has ended.
    Built(Box<Built>),
    /// It goes on without a client, and its id has been told.
    Detached,
}

/// What Nix speaks.
#[derive(Debug, Clone, Copy)]
pub(super) enum Protocol {
    /// With `nix-daemon --stdio`.
    Worker,
    /// With `nix-store --serve`.
    Serve,
}

/// A daemon.
pub(super) struct Daemon {
    addr: String,
    channel: Channel,
    client: BuildServiceClient<Channel>,
}

impl Daemon {
    pub(super) fn at(addr: &str) -> Result<Self, CliError> {
        let peer = Peer::from_addr(addr, &PeerOptions::default())
            .map_err(|error| CliError::wrong_because("the daemon's address is wrong", error))?;
        let channel = peer.raw_channel();
        let client = BuildServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { addr: addr.to_owned(), channel, client })
    }

    /// The daemon at this address, or the one at `daemon.sock` in the state directory.
    pub(super) fn at_or_own(addr: Option<&str>) -> Result<Self, CliError> {
        match addr {
            Some(addr) => Self::at(addr),
            None => Self::at(&format!("grpc+unix://{}", state_dir()?.join("daemon.sock").display())),
        }
    }

    /// A connection of Nix.
    pub(super) async fn nix(
        &self,
        protocol: Protocol,
        client_name: Option<&str>,
        pieces: impl Stream<Item = NixBytes> + Send + 'static,
    ) -> Result<Streaming<NixBytes>, CliError> {
        let mut client = NixServiceClient::new(self.channel.clone());
        let mut request = Request::new(pieces);
        if let Some(name) = client_name {
            let name = name.parse();
            let name = name.map_err(|_| CliError::wrong("the client's name must consist of visible characters"))?;
            request.metadata_mut().insert(frontend::CLIENT_NAME, name);
        }
        let answers = match protocol {
            Protocol::Worker => client.daemon(request).await,
            Protocol::Serve => client.store(request).await,
        };
        Ok(answers.map_err(|status| self.refused(&status))?.into_inner())
    }

    /// A client for requests.
    pub(super) fn client(&self) -> BuildServiceClient<Channel> {
        self.client.clone()
    }

    /// What the daemon answers to a call, unless that is interrupted.
    pub(super) async fn answer<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
        cancel: &CancellationToken,
    ) -> Result<T, CliError> {
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(CliError::interrupted()),
            answer = call => answer.map(Response::into_inner).map_err(|status| self.refused(&status)),
        }
    }

    /// Submits a build and shows its progress. `accepted` is called with the build's id as soon as that is known; a detached
    /// build is left then.
    ///
    /// An earlier result of another client's build has no id that this client may use, so that a detached build is like any other.
    pub(super) async fn build(
        &self,
        message: wire::BuildRequest,
        request: &BuildRequest,
        progress: &Progress,
        accepted: impl Fn(&str) -> Result<(), CliError>,
        cancel: &CancellationToken,
    ) -> Result<Submitted, CliError> {
        let detached = message.detached;
        // Dropping the stream cancels the build, unless it is detached.
        let built = async {
            let mut events = self.client().build(message).await.map_err(|status| self.refused(&status))?.into_inner();
            let mut id = String::new();
            while let Some(event) = events.message().await.map_err(|status| self.left(&status, &id))? {
                match &event.event {
                    Some(Said::Accepted(told)) => {
                        id.clone_from(&told.id);
                        if !id.is_empty() {
                            accepted(&id)?;
                            if detached {
                                return Ok(Submitted::Detached);
                            }
                        }
                    }
                    Some(Said::Shell(offer)) => {
                        let failure = Some(&offer.reason).filter(|reason| !reason.is_empty());
                        if let Some(terminal) = progress.lend(failure.map(|reason| reason as _)) {
                            tokio::spawn(shell(self.client(), id.clone(), terminal));
                        }
                    }
                    _ => {}
                }
                if let Some(outcome) = tell(event, progress) {
                    let built = self.outcome(outcome, request)?;
                    return Ok(Submitted::Built(Box::new(built)));
                }
            }
            Err(self.broken("the stream of events ended before the build"))
        };
        let built = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(CliError::interrupted()),
            built = built => built,
        };
        progress.terminal_returned().await;
        built
    }

    /// Builds unless the daemon has built the same before. Returns the id of a build that the client may see.
    pub(super) async fn build_before(
        &self,
        message: &wire::BuildRequest,
        request: &BuildRequest,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<String, CliError> {
        let id = RefCell::default();
        let note_id = |told: &str| {
            told.clone_into(&mut id.borrow_mut());
            Ok(())
        };
        self.build(message.clone(), request, progress, &note_id, cancel).await?;
        if id.borrow().is_empty() {
            let message = wire::BuildRequest { rebuild: true, ..message.clone() };
            self.build(message, request, progress, &note_id, cancel).await?;
        }
        progress.note(AGAIN);
        Ok(id.into_inner())
    }

    fn outcome(&self, outcome: Outcome, request: &BuildRequest) -> Result<Built, CliError> {
        match outcome {
            Outcome::Failure(failure) => Err(self.error(failed(failure))),
            Outcome::Success(Success { response, usage, times }) => {
                let result = result(response.unwrap_or_default(), request).map_err(|what| self.broken(&what))?;
                Ok(Built {
                    result,
                    usage: usage.map(used).unwrap_or_default(),
                    times: times.map(spent).unwrap_or_default(),
                })
            }
        }
    }

    /// The failure of a request.
    pub(super) fn refused(&self, status: &Status) -> CliError {
        if let Some(failure) = transport::failure(&self.addr, status) {
            return self.error(failure);
        }
        let mut failure = failure_of(status);
        if failure.reason == "daemon" {
            failure.message = format!("the daemon at {} refused the request", self.addr);
            failure.causes.insert(0, status.code().description().to_owned());
            failure.causes.extend(causes(status).map(ToString::to_string));
            if matches!(status.code(), Code::InvalidArgument | Code::NotFound | Code::OutOfRange) {
                failure.kind = FailureKind::RequestWrong;
            }
        }
        self.error(failure)
    }

    /// The failure of a stream about a build. If the daemon went away, it says how to follow the build.
    pub(super) fn left(&self, status: &Status, id: &str) -> CliError {
        // Only an error of the connection has a source.
        if status.source().is_none() || id.is_empty() {
            return self.refused(status);
        }
        let message = format!("the daemon at {} went away while build {} ran", self.addr, one_line(id));
        let mut failure = Failure::executor("daemon", message).advised(format!(
            "when it is there again, `cofferdam builds --daemon {} log -f {id}`, and `show {id}` for its end; a build whose \
             daemon was killed is lost",
            self.addr
        ));
        failure.causes.extend(causes(status).map(ToString::to_string));
        failure.fields.insert("cause".to_owned(), "went_away".into());
        failure.fields.insert("build_id".to_owned(), id.into());
        self.error(failure)
    }

    fn error(&self, failure: Failure) -> CliError {
        CliError::Daemon { failure: Box::new(failure), addr: self.addr.clone() }
    }

    fn broken(&self, what: &str) -> CliError {
        let mut failure = Failure::executor("daemon", format!("the daemon at {} broke the protocol", self.addr));
        failure.causes.push(what.to_owned());
        self.error(failure)
    }
}

/// Connects the terminal with a build's command, or with its shell. An error ends the shell; the build's own end is reported anyway.
async fn shell(mut client: BuildServiceClient<Channel>, id: String, terminal: Terminal) {
    let Terminal { kind, size: size_at_first, input, output } = terminal;
    let size = |size: WindowSize| TerminalSize { rows: size.rows.into(), columns: size.columns.into() };
    let start = Input::Start(ShellStart { id, kind, size: Some(size(size_at_first)) });
    let typed = stream::unfold(input, move |mut input| async move {
        let typed = match input.recv().await? {
            TerminalInput::Bytes(bytes) => Input::Typed(bytes),
            TerminalInput::Resize(to) => Input::Resize(size(to)),
        };
        Some((typed, input))
    });
    let inputs = stream::iter([start]).chain(typed).map(|input| ShellInput { input: Some(input) });
    let Ok(shown) = client.shell(inputs).await else { return };
    let mut shown = shown.into_inner();
    while let Ok(Some(message)) = shown.message().await {
        if output.send(message.data).await.is_err() {
            return;
        }
    }
}

/// Checks a daemon's result: the daemon is not trusted.
fn result(response: BuildResponse, request: &BuildRequest) -> Result<BuildResult, String> {
    let (count, needles) = (request.outputs.len(), request.refscan_needles.len() as u64);
    if response.outputs.len() != count {
        return Err(format!("it has {} outputs, and {count} were asked for", response.outputs.len()));
    }
    let output = |output: build_response::Output| {
        let node = output.output.unwrap_or_default().try_into_unnamed().map_err(|error| error.to_string())?;
        match output.needles.iter().find(|&&needle| needle >= needles) {
            Some(needle) => Err(format!("it names needle {needle} of {needles}")),
            None => Ok(BuildOutput { node, needles: output.needles.into_iter().collect() }),
        }
    };
    Ok(BuildResult { outputs: response.outputs.into_iter().map(output).collect::<Result<_, _>>()? })
}

/// Shows an event, or returns the outcome if it is the last one.
fn tell(event: Event, progress: &Progress) -> Option<Outcome> {
    match event.event? {
        Said::Accepted(accepted) => {
            tracing::info!(id = accepted.id, accepted.joined, accepted.from_record, "accepted");
            let id = one_line(&accepted.id);
            match (accepted.from_record, accepted.joined) {
                (true, _) if id.is_empty() => {
                    progress.note("built before, by another client; --rebuild builds it again");
                }
                (true, _) => progress.note(&format!("built before, as build {id}; --rebuild builds it again")),
                (false, true) => progress.note(&format!("build {id}, started by an equal request")),
                (false, false) => progress.note(&format!("build {id}")),
            }
        }
        Said::Queued(queued) => progress.update(&waiting(&queued)),
        Said::Phase(phase) => match wire::Phase::try_from(phase) {
            Ok(wire::Phase::Resolving) => progress.phase(Phase::Resolving),
            Ok(wire::Phase::Booting) => progress.phase(Phase::Booting),
            Ok(wire::Phase::Running) => progress.phase(Phase::Running),
            Ok(wire::Phase::Ingesting) => progress.phase(Phase::Ingesting),
            Ok(wire::Phase::Keeping) => progress.phase(Phase::Keeping),
            Ok(wire::Phase::Shell) => progress.phase(Phase::Shell),
            Ok(wire::Phase::Unspecified) | Err(_) => {}
        },
        Said::Log(chunk) => progress.log(&chunk.data),
        Said::Sample(sample) => progress.sample(&sampled(&sample)),
        Said::Connection(connection) => progress.connection(&connected(&connection)),
        Said::Shell(_) => {}
        Said::Done(done) => return done.outcome,
    }
    None
}

/// The failure in a daemon's message.
pub(super) fn failed(failure: wire::Failure) -> Failure {
    let kind = match failure.kind() {
        wire::failure::Kind::BuildFailed => FailureKind::BuildFailed,
        wire::failure::Kind::RequestWrong => FailureKind::RequestWrong,
        wire::failure::Kind::ExecutorFailed | wire::failure::Kind::Unspecified => FailureKind::ExecutorFailed,
    };
    // A value that is not JSON counts as text.
    let fields = failure.fields.into_iter().map(|(key, text)| {
        let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        (key, value)
    });
    Failure {
        kind,
        reason: failure.reason,
        message: failure.message,
        causes: failure.causes,
        advice: Some(failure.advice.into_boxed_str()).filter(|advice| !advice.is_empty()),
        fields: fields.collect(),
    }
}

pub(super) fn used(usage: wire::Usage) -> Usage {
    Usage {
        wall_us: usage.wall_us,
        user_us: usage.user_us,
        system_us: usage.system_us,
        peak_memory_bytes: usage.peak_memory_bytes,
        scratch_bytes: usage.scratch_bytes,
    }
}

fn connected(connection: &wire::Connection) -> Connection {
    let wire::Connection { name, address, sent, received, verdict } = connection;
    let why = |word: &str| verdict.strip_prefix(word)?.strip_prefix(" (")?.strip_suffix(')');
    let (denied, failed) = (why("denied"), why("failed"));
    Connection {
        name: Some(one_line(name)).filter(|name| !name.is_empty()),
        address: address.parse().ok(),
        sent: *sent,
        received: *received,
        verdict: match (denied, failed, &**verdict) {
            (Some(why), ..) => Verdict::Denied(one_line(why)),
            (_, Some(why), _) => Verdict::Failed(one_line(why)),
            (.., "allowed") => Verdict::Allowed,
            (.., "refused") => Verdict::Refused,
            (.., "unreachable") => Verdict::Unreachable,
            _ => Verdict::Abandoned,
        },
        ..Connection::default()
    }
}

fn sampled(sample: &wire::Sample) -> Sample {
    let wire::Sample { wall_us, user_us, system_us, memory_bytes, scratch_bytes, processes } = *sample;
    let usage = Usage { wall_us, user_us, system_us, scratch_bytes, ..Usage::default() };
    Sample { usage, memory_bytes, processes: u32::try_from(processes).unwrap_or(u32::MAX) }
}

fn spent(times: wire::Times) -> Times {
    Times {
        resolve: Duration::from_micros(times.resolve_us),
        boot: Duration::from_micros(times.boot_us),
        run: Duration::from_micros(times.run_us),
        ingest: Duration::from_micros(times.ingest_us),
    }
}

/// Why a build waits.
pub(super) fn waiting(queued: &wire::Queued) -> String {
    let what = match queued.waiting_for.as_str() {
        "memory" => "waiting for memory".to_owned(),
        "cpus" => "waiting for processors".to_owned(),
        "builds" => "waiting for other builds to end".to_owned(),
        "disk" => "waiting for free disk space on the daemon's host".to_owned(),
        "tenant" => format!("waiting: its tenant has {0} of {0} builds running", queued.running),
        "quota" => format!(
            "waiting: its tenant's running builds may grow to {} on the disk, of {} that they may have",
            show_size(queued.disk_bytes),
            show_size(queued.disk_limit_bytes)
        ),
        _ => "waiting for its turn".to_owned(),
    };
    match queued.position {
        0 => what,
        1 => format!("{what}, behind 1 build"),
        builds => format!("{what}, behind {builds} builds"),
    }
}

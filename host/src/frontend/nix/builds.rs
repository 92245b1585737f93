//! Builds for a thread that may block.

use std::{mem, sync::Arc, time::Duration};

use bytes::Bytes;
use cofferdam_proto::snix::build::v1 as wire;
use cofferdam_rpc::{Client, MemoryPermit};
use opentelemetry::Context;
use tokio::{runtime::Handle, sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

use super::session::Stop;
use crate::{
    build::failure::Failure,
    frontend::Shared,
    records::{LogReader, Record},
    request::BuildRequest,
    scheduler::{State, Submission, Submitted, Subscription, queue::Waiting},
};

/// What becomes known of a build before its end.
pub(super) enum News {
    /// It waits.
    Queued {
        /// Builds before it.
        position: u64,
        /// What for.
        waiting_for: Waiting,
    },
    /// More of its log.
    Log(Bytes),
    /// There was no news for a while.
    Quiet,
}

/// Who hears it.
pub(super) type Tell<'a> = &'a mut dyn FnMut(News) -> Result<(), Stop>;

/// What builds.
pub(super) trait Builds: Sync {
    /// CPUs of a build's machine.
    fn cpus(&self) -> u32;

    /// Builds a request to its end. The failure of a build is in its record.
    fn build(&self, request: wire::BuildRequest, tell: Tell<'_>) -> Result<Result<Arc<Record>, Failure>, Stop>;
}

/// The scheduler, for one client.
pub(super) struct Scheduled {
    pub(super) shared: Arc<Shared>,
    pub(super) client: Client,
    pub(super) context: Context,
    pub(super) handle: Handle,
    /// Whether builds go on when the client has gone.
    pub(super) detached: bool,
    /// How long a client hears nothing at most.
    pub(super) keep_alive: Duration,
    /// Cancelled when the client has gone.
    pub(super) gone: CancellationToken,
}

impl Builds for Scheduled {
    fn cpus(&self) -> u32 {
        self.shared.allowed.options.limits.cpus
    }

    fn build(&self, request: wire::BuildRequest, tell: Tell<'_>) -> Result<Result<Arc<Record>, Failure>, Stop> {
        let request = match BuildRequest::try_from(request) {
            Ok(request) => request,
            Err(error) => return Ok(Err(self.shared.refused(&self.client, error))),
        };
        let submission = Submission {
            client: self.client.clone(),
            digest: request.digest(),
            request,
            options: self.shared.allowed.options(&self.client),
            detached: self.detached,
            rebuild: false,
            compare_with: None,
            context: self.context.clone(),
            memory: MemoryPermit::default(),
        };
        let scheduler = &self.shared.scheduler;
        let submitted = match self.handle.block_on(scheduler.submit(submission)) {
            Ok(submitted) => submitted,
            Err(failure) => return Ok(Err(failure)),
        };
        let subscription = match submitted {
            Submitted::Earlier { record, .. } => return Ok(Ok(Arc::from(record))),
            Submitted::Active(subscription) => subscription,
        };
        let id = subscription.build.id();
        let log = self.handle.block_on(scheduler.read_log(&self.client, id, 0)).ok();
        let mut watch = Watch { state: subscription.build.state(), log, subscription, queued: None };
        loop {
            let step = self.handle.block_on(async {
                tokio::select! {
                    () = self.gone.cancelled() => Err(Stop::Gone),
                    step = timeout(self.keep_alive, watch.step()) => Ok(step),
                }
            });
            match step? {
                Err(_) => tell(News::Quiet)?,
                Ok(Ok(Step::News(news))) => tell(news)?,
                Ok(Ok(Step::Done(record))) => return Ok(Ok(record)),
                Ok(Err(failure)) => return Ok(Err(failure)),
            }
        }
    }
}

struct Watch {
    subscription: Subscription,
    state: watch::Receiver<State>,
    /// `None` after its end.
    log: Option<LogReader>,
    /// The place in the queue that was told.
    queued: Option<(u64, Waiting)>,
}

enum Step {
    News(News),
    Done(Arc<Record>),
}

impl Watch {
    /// Waits for the next news, or for the end, which comes after the whole log.
    async fn step(&mut self) -> Result<Step, Failure> {
        loop {
            let state = self.state.borrow_and_update().clone();
            match state {
                State::Queued { position, waiting_for }
                    if self.queued.replace((position, waiting_for)) != Some((position, waiting_for)) =>
                {
                    return Ok(Step::News(News::Queued { position, waiting_for }));
                }
                State::Done(record) => {
                    return match self.more_log().await {
                        Some(log) => Ok(Step::News(log)),
                        None => Ok(Step::Done(self.subscription.arranged(&record))),
                    };
                }
                State::Queued { .. } | State::Running { .. } => {}
            }
            tokio::select! {
                changed = self.state.changed() => {
                    changed.map_err(|_| Failure::executor("host", "the build's task panicked"))?;
                }
                record = self.subscription.left() => return Ok(Step::Done(record)),
                log = more(&mut self.log) => match log {
                    Some(log) => return Ok(Step::News(log)),
                    None => self.log = None,
                },
            }
        }
    }

    async fn more_log(&mut self) -> Option<News> {
        self.log.as_ref()?;
        let more = more(&mut self.log).await;
        if more.is_none() {
            self.log = None;
        }
        more
    }
}

/// More of a log. `None` at its end, or when it can't be read: the build's end is told all the same.
async fn more(log: &mut Option<LogReader>) -> Option<News> {
    match log {
        Some(log) => log.next().await.ok().flatten().map(News::Log),
        None => std::future::pending().await,
    }
}

/// Bytes of the longest line that is kept together.
const MAX_LINE_BYTES: usize = 64 * 1024;

/// A log as lines.
#[derive(Debug, Default)]
pub(super) struct Lines(Vec<u8>);

impl Lines {
    /// Takes more of the log, and returns the lines that are whole.
    pub(super) fn add(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut lines = Vec::new();
        for &byte in bytes {
            if byte == b'\n' || self.0.len() >= MAX_LINE_BYTES {
                lines.push(mem::take(&mut self.0));
            }
            if byte != b'\n' {
                self.0.push(byte);
            }
        }
        lines
    }

    /// What follows the last line's end.
    pub(super) fn rest(self) -> Option<Vec<u8>> {
        Some(self.0).filter(|rest| !rest.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_told_when_they_are_whole() {
        let mut lines = Lines::default();
        assert_eq!(lines.add(b"a"), [b""; 0]);
        assert_eq!(lines.add(b"b\n\nc\nd"), [&b"ab"[..], b"", b"c"]);
        assert_eq!(lines.rest().unwrap(), b"d");
        let mut lines = Lines::default();
        let long = lines.add(&vec![b'x'; 2 * MAX_LINE_BYTES + 1]);
        assert_eq!(long.iter().map(Vec::len).collect::<Vec<_>>(), [MAX_LINE_BYTES; 2]);
        assert_eq!(lines.rest().unwrap(), b"x");
    }
}

//! Standby machines: booted before there is a request, and bound to one later.
//!
//! ```text
//!   start ──▶ boots ──hello──▶ waits ──take──▶ Ping, Pong ──▶ Booted, for one build
//!               │                │  └── end ───────────────▶ killed
//!               └────────────────┴── died, or spoke unasked ─▶ killed, and `Lost`
//! ```
//!
//! Until it is taken a machine belongs to nobody: it has no inputs, no paths of the host and no connections, and has been told
//! nothing. A guest has nothing to say before it is asked, to the host or to its network device. One that speaks all the same is
//! broken or has been taken over.

use std::{
    io,
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use cofferdam_castore::B3Digest;
use cofferdam_protocol::{
    FromGuest, FromHost,
    frame::{FrameError, FrameReader, FrameWriter, MAX_FROM_GUEST_BYTES, MAX_FROM_HOST_BYTES},
};
use serde::{Deserialize, Serialize};
use tokio::{sync::oneshot, task::spawn_blocking, time::timeout};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    builder::Builder,
    error::{BuildError, ExecutorError},
    exchange::{frame, out_of_place},
    failure::Failure,
    guest::{Booted, Shape, end},
    interruption::Interruptions,
    session::check_hello,
};
use crate::network::RuleMaker;

/// A guest that doesn't answer within this time has hung. The build boots a machine of its own then.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A build whose preparation took longer than this asks its machine again.
const ANSWER_AGE: Duration = Duration::from_secs(1);

/// Whether a build had a standby machine, and if it hadn't, why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StandbyUse {
    /// It had one.
    Used,
    /// Its request has a network, whose device no standby machine had. Only in older records.
    Network,
    /// Its request showed paths of the host, whose device no standby machine had. Only in older records.
    Paths,
    /// No machine of its shape was in stock.
    NoneInStock,
    /// The one that it was to have had died, or didn't answer.
    Broken,
}

impl StandbyUse {
    /// A word for machines, stable across versions.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Used => "used",
            Self::Network => "network",
            Self::Paths => "paths",
            Self::NoneInStock => "none_in_stock",
            Self::Broken => "broken",
        }
    }
}

/// What becomes of a standby machine before it is taken.
#[derive(Debug)]
pub(crate) enum News {
    /// It waits for a request.
    Ready,
    /// It is gone, for this reason.
    Lost(String),
}

/// A standby machine, in a task of its own. Dropping it ends the machine.
#[derive(Debug)]
pub(crate) struct Standby {
    taken: oneshot::Sender<()>,
    ended: CancellationToken,
    task: AbortOnDropHandle<Option<Booted>>,
}

impl Standby {
    /// Boots a machine of this shape once there is room for it. `environment` is that of the builds that may take it.
    pub(crate) fn start(
        builder: Arc<Builder>,
        (shape, environment): (Shape, B3Digest),
        room: impl Future<Output = ()> + Send + 'static,
        news: impl Fn(News) + Send + 'static,
    ) -> Self {
        let ended = CancellationToken::new();
        let (taken, is_taken) = oneshot::channel();
        let cancel = ended.clone();
        let task = tokio::spawn(async move {
            room.await;
            let mut booted = match boot(&builder, shape, environment, &cancel).await {
                Ok(booted) => booted,
                Err(_) if cancel.is_cancelled() => return None,
                Err(error) => {
                    news(News::Lost(Failure::of(&error, RuleMaker::Operator).chain()));
                    return None;
                }
            };
            news(News::Ready);
            tokio::select! {
                biased;
                () = cancel.cancelled() => {}
                _ = is_taken => return Some(booted),
                why = booted.spoiled() => news(News::Lost(why)),
            }
            booted.kill().await;
            None
        });
        Self { taken, ended, task: AbortOnDropHandle::new(task) }
    }

    /// Takes the machine for one build.
    pub(crate) fn take(self) -> Taken {
        let asked = Instant::now();
        let answer = async {
            // A task that has ended hears nothing, and its machine is gone.
            let _ = self.taken.send(());
            self.task.await.ok().flatten()?.answering().await
        };
        Taken { asked, answer: AbortOnDropHandle::new(tokio::spawn(answer)) }
    }

    /// Ends the machine, and waits until it is gone.
    pub(crate) async fn end(self) {
        self.ended.cancel();
        let _ = self.task.await;
    }
}

/// A standby machine that is asked whether it is well. Dropping it ends the machine.
#[derive(Debug)]
pub(crate) struct Taken {
    asked: Instant,
    answer: AbortOnDropHandle<Option<Booted>>,
}

impl Taken {
    /// The machine, once it has booted and answered. `None` if it has died, or doesn't answer.
    pub(super) async fn answered(self) -> Option<Booted> {
        let booted = self.answer.await.ok().flatten()?;
        if self.asked.elapsed() < ANSWER_AGE { Some(booted) } else { booted.answering().await }
    }
}

async fn boot(
    builder: &Builder,
    shape: Shape,
    environment: B3Digest,
    cancel: &CancellationToken,
) -> Result<Booted, BuildError> {
    let interruptions = Interruptions { cancel, progress: None };
    let limit = builder.machines.settings.connect_timeout;
    let booted = builder.machines.boot(&shape, &interruptions).await?;
    let greeting = converse(&booted.stream, limit, |stream| greet(stream).and_then(|()| ping(stream)));
    if let Err(error) = interruptions.before(greeting).await.flatten() {
        return Err(end(booted.machine, error).await);
    }
    match builder.environment() {
        Ok(now) if now == environment => Ok(booted),
        // It may have booted one image or the other.
        _ => Err(end(booted.machine, BuildError::Executor(ExecutorError::Interrupted)).await),
    }
}

fn greet(stream: &UnixStream) -> Result<(), BuildError> {
    check_hello(&FrameReader::new(stream, MAX_FROM_GUEST_BYTES).read().map_err(frame)?)
}

fn ping(stream: &UnixStream) -> Result<(), BuildError> {
    FrameWriter::new(stream, MAX_FROM_HOST_BYTES).write(&FromHost::Ping).map_err(frame)?;
    match FrameReader::new(stream, MAX_FROM_GUEST_BYTES).read().map_err(frame)? {
        FromGuest::Pong => Ok(()),
        other => Err(out_of_place(&other, "instead of an answer to a ping")),
    }
}

/// Talks to a guest on a thread of its own, for a limited time.
async fn converse(
    stream: &UnixStream,
    limit: Duration,
    exchange: fn(&UnixStream) -> Result<(), BuildError>,
) -> Result<(), BuildError> {
    let failed = |error| BuildError::Executor(ExecutorError::Thread(error));
    stream.set_nonblocking(false).map_err(failed)?;
    let theirs = stream.try_clone().map_err(failed)?;
    let talking = spawn_blocking(move || exchange(&theirs));
    match timeout(limit, talking).await {
        Ok(done) => done.map_err(|error| failed(error.into()))?,
        Err(_) => {
            // This ends the thread, too.
            let _ = stream.shutdown(Shutdown::Both);
            Err(frame(FrameError::Io(io::ErrorKind::TimedOut.into())))
        }
    }
}

impl Booted {
    /// Waits until the machine is of no use, and tells why.
    async fn spoiled(&mut self) -> String {
        let Self { machine, stream, .. } = self;
        let speaks = async {
            let watched = stream.try_clone().and_then(|stream| {
                stream.set_nonblocking(true)?;
                tokio::net::UnixStream::from_std(stream)
            });
            match watched {
                Ok(stream) => drop(stream.readable().await),
                Err(error) => return format!("its connection can't be watched: {error}"),
            }
            "its guest spoke without being asked, or hung up".to_owned()
        };
        tokio::select! {
            biased;
            death = machine.died() => death.to_string(),
            why = speaks => why,
        }
    }

    /// The machine, if it answers.
    async fn answering(self) -> Option<Self> {
        let Err(error) = converse(&self.stream, ANSWER_TIMEOUT, ping).await else { return Some(self) };
        let why = Failure::of(&error, RuleMaker::Operator).chain();
        tracing::warn!(why, "a standby machine does not answer; the build boots another");
        self.kill().await;
        None
    }

    async fn kill(self) {
        self.machine.kill().await;
    }
}

#[cfg(test)]
mod tests {
    use super::StandbyUse;

    #[test]
    fn the_words_of_older_records_are_still_read() {
        for word in ["used", "network", "paths", "none_in_stock", "broken"] {
            let read: StandbyUse = serde_json::from_value(word.into()).unwrap();
            assert_eq!(read.word(), word);
        }
    }
}

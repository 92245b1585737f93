use std::time::Duration;

use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use prost::Message;
use tokio::{
    runtime::Handle,
    sync::AcquireError,
    task::spawn_blocking,
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Response, Status, Streaming};

use super::{
    super::queue,
    ServeOptions,
    share::{Client, Shares},
};

/// Requests that are worked on at a time, each on a thread of its own; more wait for their turn.
const MAX_REQUESTS: usize = 256;

/// Of which one client has half at most.
const CLIENT_REQUESTS: usize = MAX_REQUESTS / 2;

/// Bytes a second that a request may take its time for, beyond its timeout.
const LEAST_RATE: u32 = 64 * 1024;

pub(super) type Answers<T> = BoxStream<'static, Result<T, Status>>;

/// Where requests are worked on: on threads that may block, since stores do their I/O in place.
#[derive(Debug, Clone)]
pub(super) struct Work {
    turns: Shares<Client>,
    patience: Patience,
    stop: CancellationToken,
}

/// How long a request waits for its client.
#[derive(Debug, Clone)]
struct Patience {
    idle_timeout: Duration,
    request_timeout: Duration,
    /// From when the client is waited for first.
    deadline: Option<Instant>,
}

impl Patience {
    async fn wait<T>(&mut self, client: impl Future<Output = T>) -> Result<T, Status> {
        let now = Instant::now();
        let deadline = *self.deadline.get_or_insert(now + self.request_timeout);
        let idle = now + self.idle_timeout;
        timeout_at(idle.min(deadline), client).await.map_err(|_| match idle < deadline {
            true => silent(self.idle_timeout),
            false => slow(self.request_timeout),
        })
    }

    /// The client has sent or taken so many bytes.
    fn extend(&mut self, bytes: usize) {
        if let Some(deadline) = &mut self.deadline {
            *deadline += Duration::from_secs(bytes as u64) / LEAST_RATE;
        }
    }
}

/// Where a request's messages come from.
pub(super) struct Inlet<T> {
    messages: Streaming<T>,
    patience: Patience,
}

impl<T: Message> Inlet<T> {
    /// The next message of a client that is neither silent nor slow for too long.
    pub(super) async fn next(&mut self) -> Result<Option<T>, Status> {
        let message = self.patience.wait(self.messages.message()).await??;
        self.patience.extend(message.as_ref().map_or(0, Message::encoded_len));
        Ok(message)
    }
}

/// Where a request's answers go.
pub(super) struct Outlet<T> {
    sender: queue::Sender<Result<T, Status>>,
    patience: Patience,
}

impl<T: Message> Outlet<T> {
    /// Hands over a message when the client has room for it.
    pub(super) async fn send(&mut self, message: T) -> Result<(), Status> {
        let bytes = message.encoded_len();
        let sent = self.patience.wait(self.sender.send(Ok(message), bytes)).await?;
        self.patience.extend(bytes);
        sent.map_err(|_| Status::cancelled("the client is gone"))
    }
}

impl Work {
    pub(super) fn new(options: &ServeOptions, stop: CancellationToken) -> Self {
        let &ServeOptions { idle_timeout, request_timeout, .. } = options;
        let patience = Patience { idle_timeout, request_timeout, deadline: None };
        Self { turns: Shares::new(MAX_REQUESTS, CLIENT_REQUESTS), patience, stop }
    }

    /// Does what a request wants when it is its turn, and also one of `others` if there are any.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        client: Client,
        others: Option<&Shares<Client>>,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        let stopping = || Status::unavailable("the server is shutting down");
        let turns = async {
            let other = match others {
                Some(others) => Some(others.take(client).await?),
                None => None,
            };
            Ok::<_, AcquireError>((other, self.turns.take(client).await?))
        };
        let turns = tokio::select! {
            turns = turns => turns.map_err(|_| stopping())?,
            () = self.stop.cancelled() => return Err(stopping()),
        };
        let (runtime, stop) = (Handle::current(), self.stop.clone());
        let worked = spawn_blocking(move || {
            let _turns = turns;
            runtime.block_on(async {
                tokio::select! {
                    done = work => done,
                    () = stop.cancelled() => Err(stopping()),
                }
            })
        });
        worked.await.unwrap_or_else(|_| Err(Status::internal("the server failed at this request")))
    }

    /// Does what a request wants that is answered with a stream. Who fails before the first message fails at once, and who
    /// goes away before it is his turn gives it up.
    pub(super) async fn stream<T, F>(
        &self,
        client: Client,
        others: Option<Shares<Client>>,
        work: impl FnOnce(Outlet<T>) -> F,
    ) -> Result<Response<Answers<T>>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<(), Status>> + Send + 'static,
    {
        let (mut sender, mut receiver) = queue::queue();
        let working = work(Outlet { sender: sender.clone(), patience: self.patience.clone() });
        let this = self.clone();
        let task = AbortOnDropHandle::new(tokio::spawn(async move {
            if let Err(status) = this.run(client, others.as_ref(), working).await {
                // Of no interest to a client that is gone.
                let _ = sender.send(Err(status), 0).await;
            }
        }));
        let first = match receiver.next().await {
            Some(Err(status)) => return Err(status),
            first => stream::iter(first),
        };
        let rest = stream::unfold((receiver, task), |(mut receiver, task)| async {
            Some((receiver.next().await?, (receiver, task)))
        });
        Ok(Response::new(first.chain(rest).boxed()))
    }

    /// What a request's client sends.
    pub(super) fn inlet<T>(&self, messages: Streaming<T>) -> Inlet<T> {
        Inlet { messages, patience: self.patience.clone() }
    }
}

fn slow(request_timeout: Duration) -> Status {
    Status::deadline_exceeded(format!(
        "the client has been slow: its request took longer than {request_timeout:?}, and had less than {LEAST_RATE} bytes \
         for each further second"
    ))
}

fn silent(idle_timeout: Duration) -> Status {
    Status::deadline_exceeded(format!("the client has been silent for {idle_timeout:?}"))
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use futures::poll;
    use tokio::{sync::oneshot, time::timeout};

    use super::*;
    use crate::proto::BlobChunk;

    /// Longer than any test takes.
    const LONG: Duration = Duration::from_secs(60);

    const ONE: Client = Client::User(1);

    fn work(turns: Shares<Client>) -> Work {
        Work { turns, ..Work::new(&ServeOptions::default(), CancellationToken::new()) }
    }

    #[tokio::test]
    async fn one_client_leaves_turns_to_others() {
        let trees = Shares::new(2, 1);
        for others in [None, Some(&trees)] {
            let work = work(Shares::new(4, 2));
            let _end = work.stop.clone().drop_guard();
            let mut held: Vec<_> = (0..4).map(|_| Box::pin(work.run::<()>(ONE, others, pending()))).collect();
            for held in &mut held {
                assert!(poll!(held).is_pending());
            }
            let other = work.run(Client::User(2), others, async { Ok(()) });
            timeout(LONG, other).await.unwrap().unwrap();
            if others.is_some() {
                // What waits for its turn at a tree has none that others wait for.
                let no_tree = work.run(ONE, None, async { Ok(()) });
                timeout(LONG, no_tree).await.unwrap().unwrap();
            }
        }
    }

    #[tokio::test]
    async fn a_client_has_more_time_the_more_it_moves() {
        let mut patience = Patience { idle_timeout: LONG, request_timeout: Duration::ZERO, deadline: None };
        assert!(patience.wait(pending::<()>()).await.unwrap_err().message().contains("slow"));
        let first = patience.deadline.unwrap();
        patience.extend(10 * LEAST_RATE as usize);
        assert_eq!(patience.deadline.unwrap() - first, Duration::from_secs(10));
    }

    #[tokio::test]
    async fn a_client_that_goes_away_waits_no_longer() {
        let work = work(Shares::new(1, 1));
        let turn = work.turns.take(ONE).await.unwrap();
        let (waiting, gone) = oneshot::channel::<()>();
        let mut asked = Box::pin(work.stream(ONE, None, |_: Outlet<BlobChunk>| async move {
            drop(waiting);
            Ok(())
        }));
        assert!(poll!(&mut asked).is_pending());
        drop(asked);
        timeout(LONG, gone).await.unwrap().unwrap_err();
        drop(turn);
    }
}

use std::time::Duration;

use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use prost::Message;
use tokio::{
    runtime::Handle,
    task::spawn_blocking,
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Response, Status, Streaming};

use crate::{Client, ServeOptions, Turns, queue};

/// Most requests in progress, each on a thread of its own. More wait for their turn.
const MAX_REQUESTS: usize = 256;

/// Bytes a second that a client must send or take after its request's timeout.
const LEAST_RATE: u32 = 64 * 1024;

/// What a request is answered with.
pub type Answers<T> = BoxStream<'static, Result<T, Status>>;

/// Works on requests, on threads that may block.
#[derive(Debug, Clone)]
pub struct Work {
    requests: Turns,
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

/// The messages of a request.
pub struct Inlet<T> {
    messages: Streaming<T>,
    patience: Patience,
}

impl<T: Message> Inlet<T> {
    /// The next message.
    ///
    /// # Errors
    ///
    /// The client has been silent or slow for too long, or its request is refused.
    pub async fn next(&mut self) -> Result<Option<T>, Status> {
        let message = self.patience.wait(self.messages.message()).await??;
        self.patience.extend(message.as_ref().map_or(0, Message::encoded_len));
        Ok(message)
    }
}

/// The client of a request, for answers.
pub struct Outlet<T> {
    sender: queue::Sender<Result<T, Status>>,
    patience: Patience,
}

impl<T: Message> Outlet<T> {
    /// Hands over a message when the client has room for it.
    ///
    /// # Errors
    ///
    /// The client has been silent or slow for too long, or is gone.
    pub async fn send(&mut self, message: T) -> Result<(), Status> {
        let bytes = message.encoded_len();
        let sent = self.patience.wait(self.sender.send(Ok(message), bytes)).await?;
        self.patience.extend(bytes);
        sent.map_err(|_| Status::cancelled("the client is gone"))
    }
}

impl Work {
    /// Work that is given up when `stop` is cancelled.
    pub fn new(options: &ServeOptions, stop: CancellationToken) -> Self {
        let ServeOptions { idle_timeout, request_timeout, .. } = *options;
        let patience = Patience { idle_timeout, request_timeout, deadline: None };
        Self { requests: Turns::new(MAX_REQUESTS, &options.clients), patience, stop }
    }

    /// Does the work of a request when it is its client's turn. `scarce` are the turns at something scarcer that the work needs,
    /// too.
    ///
    /// # Errors
    ///
    /// The work's, or the server is shutting down.
    pub async fn run<T: Send + 'static>(
        &self,
        client: &Client,
        scarce: Option<&Turns>,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        let stopping = || Status::unavailable("the server is shutting down");
        let turns = async {
            let other = match scarce {
                Some(scarce) => Some(scarce.line(client).turn().await),
                None => None,
            };
            (other, self.requests.line(client).turn().await)
        };
        let turns = tokio::select! {
            turns = turns => turns,
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

    /// As [`run`](Self::run), for a request that is answered with a stream. A client that goes away gives its request up.
    ///
    /// # Errors
    ///
    /// The work's if it fails before the first message, or the server is shutting down.
    pub async fn stream<T, F>(
        &self,
        client: Client,
        scarce: Option<Turns>,
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
            if let Err(status) = this.run(&client, scarce.as_ref(), working).await {
                // If the client is gone, nothing needs this.
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

    /// The messages of a request, with the deadlines of its client.
    pub fn inlet<T>(&self, messages: Streaming<T>) -> Inlet<T> {
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
    use crate::Clients;
    use tonic_health::pb::HealthCheckResponse;

    /// Longer than any test takes.
    const LONG: Duration = Duration::from_secs(60);

    const ONE: Client = Client::User(1);

    fn work(requests: usize) -> Work {
        let requests = Turns::new(requests, &Clients::default());
        Work { requests, ..Work::new(&ServeOptions::default(), CancellationToken::new()) }
    }

    #[tokio::test]
    async fn one_client_leaves_room_for_others() {
        let trees = Turns::new(2, &Clients::default());
        for scarce in [None, Some(&trees)] {
            let work = work(4);
            let _end = work.stop.clone().drop_guard();
            let mut held: Vec<_> = (0..4).map(|_| Box::pin(work.run::<()>(&ONE, scarce, pending()))).collect();
            for held in &mut held {
                assert!(poll!(held).is_pending());
            }
            let two = Client::User(2);
            let other = work.run(&two, scarce, async { Ok(()) });
            timeout(LONG, other).await.unwrap().unwrap();
            if scarce.is_some() {
                // What waits for its turn at a tree takes nothing that others wait for.
                let no_tree = work.run(&ONE, None, async { Ok(()) });
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
        let work = work(1);
        let turn = work.requests.line(&ONE).turn().await;
        let (waiting, gone) = oneshot::channel::<()>();
        let mut asked = Box::pin(work.stream(ONE, None, |_: Outlet<HealthCheckResponse>| async move {
            drop(waiting);
            Ok(())
        }));
        assert!(poll!(&mut asked).is_pending());
        drop(asked);
        timeout(LONG, gone).await.unwrap().unwrap_err();
        drop(turn);
    }
}

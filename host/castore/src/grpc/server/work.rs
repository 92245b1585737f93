use std::{sync::Arc, time::Duration};

use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use prost::Message;
use tokio::{runtime::Handle, sync::Semaphore, task::spawn_blocking, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status, Streaming};

use super::super::queue;

/// Requests that are worked on at a time, each on a thread of its own; more wait for their turn.
const MAX_REQUESTS: usize = 256;

pub(super) type Answers<T> = BoxStream<'static, Result<T, Status>>;

/// Where requests are worked on: on threads that may block, since stores do their I/O in place.
#[derive(Debug, Clone)]
pub(super) struct Work {
    turns: Arc<Semaphore>,
    idle_timeout: Duration,
    stop: CancellationToken,
}

/// Where a request's answers go.
pub(super) struct Outlet<T> {
    sender: queue::Sender<Result<T, Status>>,
    idle_timeout: Duration,
}

impl<T: Message> Outlet<T> {
    /// Hands over a message when the client has room for it.
    pub(super) async fn send(&mut self, message: T) -> Result<(), Status> {
        let bytes = message.encoded_len();
        match timeout(self.idle_timeout, self.sender.send(Ok(message), bytes)).await {
            Ok(sent) => sent.map_err(|_| Status::cancelled("the client is gone")),
            Err(_) => Err(silent(self.idle_timeout)),
        }
    }
}

impl Work {
    pub(super) fn new(idle_timeout: Duration, stop: CancellationToken) -> Self {
        Self { turns: Arc::new(Semaphore::new(MAX_REQUESTS)), idle_timeout, stop }
    }

    /// Does what a request wants when it is its turn.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        let stopping = || Status::unavailable("the server is shutting down");
        let turn = tokio::select! {
            turn = self.turns.clone().acquire_owned() => turn.map_err(|_| stopping())?,
            () = self.stop.cancelled() => return Err(stopping()),
        };
        let (runtime, stop) = (Handle::current(), self.stop.clone());
        let worked = spawn_blocking(move || {
            let _turn = turn;
            runtime.block_on(async {
                tokio::select! {
                    done = work => done,
                    () = stop.cancelled() => Err(stopping()),
                }
            })
        });
        worked.await.unwrap_or_else(|_| Err(Status::internal("the server failed at this request")))
    }

    /// Does what a request wants that is answered with a stream. Who fails before the first message fails at once.
    pub(super) async fn stream<T, F>(&self, work: impl FnOnce(Outlet<T>) -> F) -> Result<Response<Answers<T>>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<(), Status>> + Send + 'static,
    {
        let (mut sender, mut receiver) = queue::queue();
        let working = work(Outlet { sender: sender.clone(), idle_timeout: self.idle_timeout });
        let this = self.clone();
        tokio::spawn(async move {
            if let Err(status) = this.run(working).await {
                // Of no interest to a client that is gone.
                let _ = sender.send(Err(status), 0).await;
            }
        });
        match receiver.next().await {
            Some(Err(status)) => Err(status),
            first => Ok(Response::new(stream::iter(first).chain(receiver).boxed())),
        }
    }

    /// The next message of a client that is not silent for too long.
    pub(super) async fn next<T>(&self, messages: &mut Streaming<T>) -> Result<Option<T>, Status> {
        timeout(self.idle_timeout, messages.message()).await.unwrap_or_else(|_| Err(silent(self.idle_timeout)))
    }
}

pub(super) fn silent(idle_timeout: Duration) -> Status {
    Status::deadline_exceeded(format!("the client has been silent for {idle_timeout:?}"))
}

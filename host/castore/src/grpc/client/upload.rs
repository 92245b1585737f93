use std::{
    future::poll_fn,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{Stream, StreamExt as _, channel::mpsc, future::BoxFuture};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::peer::Peer;
use crate::runtime::spawn;

/// Messages that wait for the peer, in addition to one of the sender.
const BUFFER_MESSAGES: usize = 1;

/// A stream of messages that a task sends to a peer. Only [`Upload::finish`] ends it. When it is dropped, the peer sees an
/// aborted request.
pub(super) struct Upload<M> {
    sender: mpsc::Sender<Option<M>>,
    turn: watch::Sender<Turn>,
    answer: BoxFuture<'static, io::Result<Vec<u8>>>,
}

/// Whether it is the peer's turn to act: while messages wait for it, and after the last one.
#[derive(Debug, Clone, Copy)]
struct Turn {
    waiting: usize,
    ended: bool,
    since: Instant,
}

impl Turn {
    /// Counts a message that waits for the peer.
    fn sent(&mut self) {
        if self.waiting == 0 {
            self.since = Instant::now();
        }
        self.waiting += 1;
    }

    /// Counts a message that the peer has taken.
    fn taken(&mut self, last: bool) {
        *self = Self { waiting: self.waiting.saturating_sub(1), ended: self.ended || last, since: Instant::now() };
    }

    fn overdue_at(&self, idle_timeout: Duration) -> Option<Instant> {
        (self.waiting > 0 || self.ended).then(|| self.since + idle_timeout)
    }
}

/// The messages on their way to the transport.
pub(super) struct Outgoing<M> {
    receiver: mpsc::Receiver<Option<M>>,
    turn: watch::Sender<Turn>,
}

impl<M> Stream for Outgoing<M> {
    type Item = M;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<M>> {
        match self.receiver.poll_next_unpin(context) {
            Poll::Ready(Some(next)) => {
                self.turn.send_modify(|turn| turn.taken(next.is_none()));
                Poll::Ready(next)
            }
            // The sender was dropped before the end, so the task is about to be aborted.
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }
}

impl<M> Drop for Outgoing<M> {
    /// The peer takes no more messages, so it is its turn to answer.
    fn drop(&mut self) {
        self.turn.send_modify(|turn| turn.taken(true));
    }
}

impl<M: Send + 'static> Upload<M> {
    /// Starts `call`, which sends the stream that it is given and returns the digest that the peer answers.
    pub(super) fn start<F>(peer: &Peer, call: impl FnOnce(Outgoing<M>) -> F) -> Self
    where
        F: Future<Output = io::Result<Vec<u8>>> + Send + 'static,
    {
        let (sender, receiver) = mpsc::channel(BUFFER_MESSAGES);
        let (turn, watched) = watch::channel(Turn { waiting: 0, ended: false, since: Instant::now() });
        let call = call(Outgoing { receiver, turn: turn.clone() });
        let peer = peer.clone();
        let answer = spawn(async move {
            let answered = until_overdue(call, watched, peer.idle_timeout).await;
            answered.unwrap_or_else(|| Err(peer.silent()))
        });
        Self { sender, turn, answer: Box::pin(answer) }
    }

    /// Waits until there is room for a message.
    pub(super) fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(self.sender.poll_ready(context)) {
            Ok(()) => Poll::Ready(Ok(())),
            // The request is over, and the answer says why.
            Err(_) => Poll::Ready(match ready!(self.answer.as_mut().poll(context)) {
                Err(refused) => Err(refused),
                Ok(_) => Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the peer answered before it had received everything",
                )),
            }),
        }
    }

    /// Sends a message for which there is room.
    pub(super) fn send(&mut self, message: M) {
        self.send_or_end(Some(message));
    }

    fn send_or_end(&mut self, message: Option<M>) {
        self.turn.send_modify(Turn::sent);
        // If the request is over, `poll_ready` or `finish` reports why.
        let _ = self.sender.start_send(message);
    }

    /// Ends the stream and returns the digest that the peer answers.
    pub(super) async fn finish(mut self) -> io::Result<Vec<u8>> {
        poll_fn(|context| self.poll_ready(context)).await?;
        self.send_or_end(None);
        self.answer.await
    }
}

/// The outcome of `call`; `None` when the peer takes too long over its turn.
async fn until_overdue<T>(
    call: impl Future<Output = T>,
    mut turn: watch::Receiver<Turn>,
    idle_timeout: Duration,
) -> Option<T> {
    let mut call = pin!(call);
    loop {
        let overdue_at = turn.borrow_and_update().overdue_at(idle_timeout);
        tokio::select! {
            answered = &mut call => return Some(answered),
            Ok(()) = turn.changed() => {}
            () = sleep_until(overdue_at.unwrap_or_else(Instant::now)), if overdue_at.is_some() => return None,
        }
    }
}

use std::{
    io,
    task::{Context, Poll, ready},
};

use cofferdam_rpc::queue::{self, queue};
use futures::{StreamExt as _, future::BoxFuture, stream::BoxStream};

use crate::runtime::spawn;

/// What a task gets from a peer. The end is said in so many words, so a task that was lost is not taken for one.
pub(super) struct Download<T> {
    receiver: BoxStream<'static, io::Result<Option<T>>>,
    ended: bool,
    _task: BoxFuture<'static, io::Result<()>>,
}

/// Where the task puts it.
pub(super) struct Outlet<T>(queue::Sender<io::Result<Option<T>>>);

impl<T> Outlet<T> {
    /// Hands over an item when there is room for so many bytes; an error when nobody wants it any more.
    pub(super) async fn send(&mut self, item: T, bytes: usize) -> io::Result<()> {
        self.0.send(Ok(Some(item)), bytes).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl<T: Send + 'static> Download<T> {
    /// Starts `work`, whose `Ok` is the end.
    pub(super) fn start<F>(work: impl FnOnce(Outlet<T>) -> F) -> Self
    where
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let (mut sender, receiver) = queue();
        let work = work(Outlet(sender.clone()));
        let task = spawn(async move {
            // The reader may be gone, and then the outcome is of no interest.
            let _ = sender.send(work.await.map(|()| None), 0).await;
            Ok(())
        });
        Self { receiver: receiver.boxed(), ended: false, _task: Box::pin(task) }
    }

    /// The next item, or `None` at the end and ever after.
    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Option<T>>> {
        if self.ended {
            return Poll::Ready(Ok(None));
        }
        let item = ready!(self.receiver.poll_next_unpin(context))
            .unwrap_or_else(|| Err(io::Error::other("the transfer has failed before, or its task was lost")));
        self.ended = matches!(item, Ok(None));
        Poll::Ready(item)
    }

    pub(super) async fn next(&mut self) -> io::Result<Option<T>> {
        futures::future::poll_fn(|context| self.poll_next(context)).await
    }
}

use std::{
    io,
    task::{Context, Poll, ready},
};

use cofferdam_rpc::queue::{self, queue};
use futures::{StreamExt as _, future::BoxFuture, stream::BoxStream};

use crate::runtime::spawn;

/// Items that a task receives from a peer. The end is an item of its own, so that a lost task does not look like the end.
pub(super) struct Download<T> {
    receiver: BoxStream<'static, io::Result<Option<T>>>,
    ended: bool,
    _task: BoxFuture<'static, io::Result<()>>,
}

/// Takes the items from the task.
pub(super) struct Outlet<T>(queue::Sender<io::Result<Option<T>>>);

impl<T> Outlet<T> {
    /// Waits until there is room for so many bytes, and hands the item over. Fails when the reader is gone.
    pub(super) async fn send(&mut self, item: T, bytes: usize) -> io::Result<()> {
        self.0.send(Ok(Some(item)), bytes).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl<T: Send + 'static> Download<T> {
    /// Starts `work`; the download ends when it returns `Ok`.
    pub(super) fn start<F>(work: impl FnOnce(Outlet<T>) -> F) -> Self
    where
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let (mut sender, receiver) = queue();
        let work = work(Outlet(sender.clone()));
        let task = spawn(async move {
            // Fails when the reader is gone, who then needs no outcome.
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
            .unwrap_or_else(|| Err(io::Error::other("the transfer failed before, or its task was lost")));
        self.ended = matches!(item, Ok(None));
        Poll::Ready(item)
    }

    pub(super) async fn next(&mut self) -> io::Result<Option<T>> {
        futures::future::poll_fn(|context| self.poll_next(context)).await
    }
}

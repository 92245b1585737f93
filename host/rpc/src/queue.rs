//! A queue between the two ends of a stream.

use std::sync::Arc;

use futures::{
    SinkExt as _, Stream, StreamExt as _,
    channel::mpsc::{self, SendError},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that may wait, or one item with more.
const MAX_BYTES: usize = crate::STREAM_WINDOW_BYTES as usize;

/// Items that may wait; each sender adds one.
const MAX_ITEMS: usize = 128;

/// An item, and the room that it takes up until it is taken out.
type Waiting<T> = (T, Option<OwnedSemaphorePermit>);

/// Puts items into a queue. Small ones are many at a time, so that who takes them need not be woken for each.
pub struct Sender<T> {
    items: mpsc::Sender<Waiting<T>>,
    room: Arc<Semaphore>,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { items: self.items.clone(), room: self.room.clone() }
    }
}

impl<T> Sender<T> {
    /// Waits until there is room for so many bytes. Fails if the receiver is gone. Needs tokio.
    pub async fn send(&mut self, item: T, bytes: usize) -> Result<(), SendError> {
        let bytes = u32::try_from(bytes.min(MAX_BYTES)).unwrap_or(u32::MAX);
        // It is never closed.
        let room = self.room.clone().acquire_many_owned(bytes).await.ok();
        self.items.send((item, room)).await
    }
}

/// A queue for one stream, bounded by the bytes in it.
pub fn queue<T>() -> (Sender<T>, impl Stream<Item = T> + Unpin) {
    let (items, taken) = mpsc::channel::<Waiting<T>>(MAX_ITEMS);
    (Sender { items, room: Arc::new(Semaphore::new(MAX_BYTES)) }, taken.map(|(item, _room)| item))
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn items_wait_for_room_and_one_that_is_too_large_for_all_of_it() {
        let (mut sender, mut taken) = queue();
        for item in 0..3 {
            sender.send(item, MAX_BYTES / 3).await.unwrap();
        }
        assert!(sender.send(3, MAX_BYTES / 3).now_or_never().is_none());
        assert_eq!(taken.next().await, Some(0));
        sender.send(3, MAX_BYTES / 3).await.unwrap();
        let mut large = Box::pin(sender.send(4, 100 * MAX_BYTES));
        for item in 1..4 {
            assert!(futures::poll!(&mut large).is_pending());
            assert_eq!(taken.next().await, Some(item));
        }
        large.await.unwrap();
        assert_eq!(taken.next().await, Some(4));
        drop(taken);
        assert!(sender.send(5, 0).await.is_err());
    }
}

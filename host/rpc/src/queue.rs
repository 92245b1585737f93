//! A queue between the producer of a stream and its consumer, limited in bytes and items.

use std::sync::Arc;

use futures::{
    SinkExt as _, Stream, StreamExt as _,
    channel::mpsc::{self, SendError},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Limit of bytes in the queue. A single larger item may enter an empty queue.
const MAX_BYTES: usize = crate::STREAM_WINDOW_BYTES as usize;

/// Limit of items in the queue. Each sender adds one to it.
const MAX_ITEMS: usize = 128;

/// An item, with the permit for its bytes, which is released when the item leaves the queue.
type Waiting<T> = (T, Option<OwnedSemaphorePermit>);

/// The producer's end of a queue. The queue holds many small items at a time, so that the consumer isn't woken for each.
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
    /// Waits for room, and adds an item that counts as `bytes`. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// The consumer is gone.
    pub async fn send(&mut self, item: T, bytes: usize) -> Result<(), SendError> {
        let bytes = u32::try_from(bytes.min(MAX_BYTES)).unwrap_or(u32::MAX);
        // Acquiring fails only for a closed semaphore, and this one is never closed.
        let room = self.room.clone().acquire_many_owned(bytes).await.ok();
        self.items.send((item, room)).await
    }
}

/// Makes a queue. Returns its two ends.
pub fn queue<T>() -> (Sender<T>, impl Stream<Item = T> + Unpin) {
    let (items, taken) = mpsc::channel::<Waiting<T>>(MAX_ITEMS);
    (Sender { items, room: Arc::new(Semaphore::new(MAX_BYTES)) }, taken.map(|(item, _room)| item))
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn items_wait_for_room_and_an_oversized_one_for_an_empty_queue() {
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

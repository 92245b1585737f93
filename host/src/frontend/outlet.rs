use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures::{Stream, StreamExt as _, future, stream};
use tokio::{sync::mpsc, time::timeout};
use tonic::Status;

/// Messages that wait for a client to take them.
pub(super) const BUFFERED_MESSAGES: usize = 4;

/// How long a client may take for one of them.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(600);

/// The client is gone, or has been told an error.
#[derive(Debug)]
pub(super) struct Gone;

/// Where the messages of a stream go.
pub(super) struct Outlet<T> {
    messages: mpsc::Sender<T>,
    idle_timeout: Duration,
    /// After the last message.
    error: Arc<OnceLock<Status>>,
}

/// A stream, and where its messages go.
pub(super) fn outlet<T>(idle_timeout: Duration) -> (Outlet<T>, impl Stream<Item = Result<T, Status>>) {
    let (messages, inlet) = mpsc::channel(BUFFERED_MESSAGES);
    let error = Arc::new(OnceLock::new());
    let outlet = Outlet { messages, idle_timeout, error: Arc::clone(&error) };
    let taken = stream::unfold(inlet, |mut inlet| async { Some((Ok(inlet.recv().await?), inlet)) });
    let end = stream::once(async move { error.get().cloned().map(Err) });
    (outlet, taken.chain(end.filter_map(future::ready)))
}

impl<T> Outlet<T> {
    /// Waits until the client is gone.
    pub(super) async fn closed(&self) {
        self.messages.closed().await;
    }

    /// Hands over a message when the client has room for it. One that takes none for too long is told so when it does.
    pub(super) async fn say(&self, message: T) -> Result<(), Gone> {
        match timeout(self.idle_timeout, self.messages.send(message)).await {
            Ok(said) => said.map_err(|_| Gone),
            Err(_) => self.refuse(Status::deadline_exceeded(format!(
                "the client took no message for {:?}; what it lacks of a log it can ask for by the offset",
                self.idle_timeout
            ))),
        }
    }

    /// Ends the stream with an error.
    pub(super) fn refuse(&self, status: Status) -> Result<(), Gone> {
        // The first counts.
        let _ = self.error.set(status);
        Err(Gone)
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[tokio::test]
    async fn a_client_that_stops_reading_gets_an_error() {
        let (outlet, stream) = outlet(Duration::ZERO);
        let told = async {
            for number in 0.. {
                if outlet.say(number).await.is_err() {
                    return number;
                }
            }
            unreachable!("there is no room for all")
        };
        let told = told.await;
        drop(outlet);
        let taken: Vec<_> = stream.collect().await;
        let (last, taken) = taken.split_last().unwrap();
        assert_eq!(
            taken.iter().map(|number| *number.as_ref().unwrap()).collect::<Vec<_>>(),
            (0..told).collect::<Vec<_>>()
        );
        assert_eq!(last.as_ref().unwrap_err().code(), Code::DeadlineExceeded);
    }
}

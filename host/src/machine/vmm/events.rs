//! The output of cloud-hypervisor's event monitor: JSON objects with an empty line after each.
//!
//! ```text
//!   guest / panic      the guest's kernel has written to the panic device       ──▶ Cause::Panic
//!   vm / rebooting     the guest has reset itself, and is about to boot again   ──▶ Cause::Reset
//! ```
//!
//! All other events (devices, booting, shutting down) are only logged. A guest that powers off has no event here: it ends
//! the process.

use std::os::fd::OwnedFd;

use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::machine::death::Cause;

/// Longest event that is parsed, in bytes. Usual ones have some hundred.
const MAX_EVENT_BYTES: usize = 16 * 1024;

/// The empty line between two events. No event contains one.
const SEPARATOR: &[u8] = b"\n\n";

#[derive(Debug, Deserialize)]
struct Event {
    source: String,
    event: String,
}

/// The events of one process.
#[derive(Debug)]
pub(super) struct Events {
    cause: watch::Receiver<Option<Cause>>,
    reader: JoinHandle<()>,
}

impl Events {
    /// Reads a pipe on a task of its own, to its end, so that the writer never has to wait.
    pub(super) fn read(pipe: OwnedFd) -> std::io::Result<Self> {
        let pipe = pipe::Receiver::from_owned_fd(pipe)?;
        let (sender, cause) = watch::channel(None);
        Ok(Self { cause, reader: tokio::spawn(follow(pipe, sender)) })
    }

    /// Waits for the event that says how the guest ended. `None` if there is no such event. Cancel safe, and can be called
    /// again.
    pub(super) async fn ended(&mut self) -> Option<Cause> {
        *self.cause.wait_for(Option::is_some).await.ok()?
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// How the guest ended, by all events of a stream.
pub(crate) async fn told(events: impl AsyncRead + Unpin) -> Option<Cause> {
    let (sender, cause) = watch::channel(None);
    follow(events, sender).await;
    *cause.borrow()
}

async fn follow(mut events: impl AsyncRead + Unpin, cause: watch::Sender<Option<Cause>>) {
    let mut pending: Vec<u8> = vec![];
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = events.read(&mut buffer).await {
        pending.extend(&buffer[..length]);
        while let Some(end) = pending.windows(SEPARATOR.len()).position(|part| part == SEPARATOR) {
            let event: Vec<u8> = pending.drain(..end + SEPARATOR.len()).collect();
            if let Some(told) = judge(&event) {
                // The first one counts: a reset after a panic is the panic's consequence.
                cause.send_if_modified(|cause| cause.is_none() && cause.replace(told).is_none());
            }
        }
        if pending.len() > MAX_EVENT_BYTES {
            pending.clear();
        }
    }
}

fn judge(event: &[u8]) -> Option<Cause> {
    let Event { source, event } = serde_json::from_slice(event).ok()?;
    tracing::trace!(source, event, "an event of cloud-hypervisor");
    match (source.as_str(), event.as_str()) {
        ("guest", "panic") => Some(Cause::Panic),
        ("vm", "rebooting") => Some(Cause::Reset),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeWriter, Write};
    use std::time::Duration;

    use super::*;

    fn event(source: &str, event: &str) -> String {
        // As version 53 writes it.
        format!(
            "{{\n  \"timestamp\": {{\n    \"secs\": 0,\n    \"nanos\": 88120\n  }},\n  \"source\": \"{source}\",\n  \
             \"event\": \"{event}\",\n  \"properties\": null\n}}\n\n"
        )
    }

    fn events() -> (Events, PipeWriter) {
        let (reader, writer) = std::io::pipe().unwrap();
        (Events::read(reader.into()).unwrap(), writer)
    }

    #[tokio::test]
    async fn resets_and_panics_are_distinguished() {
        for (name, source, cause) in [("rebooting", "vm", Cause::Reset), ("panic", "guest", Cause::Panic)] {
            let (mut events, mut writer) = events();
            writer.write_all(event("vmm", "starting").as_bytes()).unwrap();
            writer.write_all(event("virtio-device", "reset").as_bytes()).unwrap();
            let told = event(source, name);
            let (before, after) = told.split_at(told.find(name).unwrap() + 3);
            writer.write_all(before.as_bytes()).unwrap();
            assert!(tokio::time::timeout(Duration::from_millis(50), events.ended()).await.is_err());
            writer.write_all(after.as_bytes()).unwrap();
            assert_eq!(events.ended().await, Some(cause));
            assert_eq!(events.ended().await, Some(cause));
        }
    }

    #[tokio::test]
    async fn the_reset_after_a_panic_does_not_hide_it() {
        let (mut events, mut writer) = events();
        writer.write_all((event("guest", "panic") + &event("vm", "rebooting")).as_bytes()).unwrap();
        drop(writer);
        assert_eq!(events.ended().await, Some(Cause::Panic));
    }

    #[tokio::test]
    async fn events_without_a_panic_or_reset_give_no_cause() {
        let (mut events, mut writer) = events();
        writer.write_all(event("vm", "shutdown").as_bytes()).unwrap();
        drop(writer);
        assert_eq!(events.ended().await, None);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn malformed_events_are_skipped_in_bounded_memory() {
        let (mut events, mut writer) = events();
        for _ in 0..64 {
            writer.write_all(&[b'x'; 4096]).unwrap();
        }
        writer.write_all(b"\n\nnull\n\n{\"source\":\"vm\"}\n\n\xff\n\n").unwrap();
        writer.write_all(event("vm", "rebooting").as_bytes()).unwrap();
        assert_eq!(events.ended().await, Some(Cause::Reset));
    }
}

use cofferdam_rpc::Client;

use super::status::MAX_LOG_TAIL_BYTES;
use crate::{records::Record, scheduler::Scheduler};

/// The end of a build's log. It is empty if the log can't be read: the build's failure is reported all the same.
pub(super) async fn read(scheduler: &Scheduler, client: &Client, record: &Record) -> Vec<u8> {
    let mut tail = Vec::new();
    let offset = record.log.bytes.saturating_sub(MAX_LOG_TAIL_BYTES as u64);
    if let Ok(mut reader) = scheduler.read_log(client, record.id, offset).await {
        while let Ok(Some(bytes)) = reader.available().await {
            tail.extend_from_slice(&bytes);
        }
    }
    tail
}

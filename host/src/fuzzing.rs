//! Doors for fuzzers, to decoders that others reach through a whole build only. No part of the API.

use tokio::io::AsyncRead;

use crate::{
    cli::plain_text::PlainText,
    devices::inputs::Request,
    machine::{Cause, vmm},
};

/// A packet of the device that serves inputs, encoded again.
pub fn input_request(packet: &[u8]) -> Option<Vec<u8>> {
    Request::decode(packet).ok().map(|request| request.encode())
}

/// What the events of a VMM tell.
pub async fn vmm_events(events: impl AsyncRead + Unpin) -> Option<Cause> {
    vmm::told(events).await
}

/// What of a build's log comes to a terminal.
pub fn plain_text<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut plain = PlainText::default();
    pieces.into_iter().map(|piece| plain.filter(piece)).collect()
}

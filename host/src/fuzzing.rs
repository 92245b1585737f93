//! Access for fuzz targets to decoders that only a whole build reaches otherwise. Not part of the API.

use tokio::io::AsyncRead;

pub use crate::outputs::Receiver;

use crate::{
    cli::plain_text::PlainText,
    devices::inputs::Request,
    machine::{Cause, vmm},
};

/// Decodes and encodes a packet of the inputs device.
pub fn input_request(packet: &[u8]) -> Option<Vec<u8>> {
    Request::decode(packet).ok().map(|request| request.encode())
}

/// The cause of a machine's end in a VMM's events.
pub async fn vmm_events(events: impl AsyncRead + Unpin) -> Option<Cause> {
    vmm::told(events).await
}

/// The part of a build's log that is shown on a terminal.
pub fn plain_text<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut plain = PlainText::default();
    pieces.into_iter().map(|piece| plain.filter(piece)).collect()
}

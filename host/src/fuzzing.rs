//! Access for fuzz targets to decoders that only a whole build reaches otherwise. Not part of the API.

use tokio::{io::AsyncRead, runtime::Handle};

pub use crate::{
    devices::rehearsal::{Device, Queue, Rings, Stage},
    outputs::Receiver,
};

use crate::{
    build::{Options, ends_a_build},
    cli::plain_text::PlainText,
    devices::inputs::Request,
    limits::Limits,
    machine::{Cause, vmm},
};

/// Decodes and encodes a packet of the inputs device.
pub fn input_request(packet: &[u8]) -> Option<Vec<u8>> {
    Request::decode(packet).ok().map(|request| request.encode())
}

/// Whether a guest that says this comes to the end of a build, within small limits.
pub fn conversation(runtime: &Handle, wire: &[u8]) -> bool {
    let limits = Limits { log_bytes: 1 << 10, output_bytes: 1 << 16, output_entries: 100, ..Limits::default() };
    ends_a_build(runtime, &Options { limits, ..Options::default() }, wire)
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

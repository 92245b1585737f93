//! Access for fuzz targets to decoders that only a whole build reaches otherwise. Not part of the API.

use tokio::{io::AsyncRead, runtime::Handle};

pub use crate::{
    devices::rehearsal::{Device, Queue, Rings, Stage},
    outputs::Receiver,
};

use crate::{
    build::{Options, ends_a_build},
    cli::plain_text::PlainText,
    devices::{inputs::Request, net, rehearsal::opens_only_what_is_shown},
    frontend,
    limits::Limits,
    machine::{Cause, vmm},
    network, oci,
};

/// Decodes and encodes a packet of the inputs device.
pub fn input_request(packet: &[u8]) -> Option<Vec<u8>> {
    Request::decode(packet).ok().map(|request| request.encode())
}

/// Whether a packet is a request of the device for paths of the host. One that is survives encoding, and opens nothing that isn't
/// shown.
pub fn paths_request(packet: &[u8]) -> bool {
    opens_only_what_is_shown(packet)
}

/// Whether a packet is a request of the network device. One that is survives encoding.
pub fn network_request(packet: &[u8]) -> bool {
    net::survives(packet)
}

/// Whether a guest's packets, each behind its length in two bytes, mean anything to the network device.
pub fn network_packets(packets: &[u8]) -> bool {
    net::receive_all(packets)
}

/// Whether a network device goes on with a guest that has this memory and these queues, the first for frames to it.
pub fn network_queues(regions: &[(u64, &[u8])], queues: [Rings; 2]) -> bool {
    net::serves(regions, queues)
}

/// Whether a message is a guest's DNS query that has an answer.
pub fn dns_query(message: &[u8]) -> bool {
    net::answers(message)
}

/// Whether a message answers the query for the IPv4 addresses of `a.example`. The query's id is the message's.
pub fn dns_answer(message: &[u8]) -> bool {
    network::is_answer(message, "a.example")
}

/// Whether the beginning of a connection, over TLS or HTTP, asks for `a.example`. It comes in pieces of so many bytes.
pub fn server_name(tls: bool, beginning: &[u8], piece: usize) -> bool {
    network::asks_for("a.example", tls, beginning, piece)
}

/// Whether bytes are a document of an image, or a registry's challenge.
pub fn image_document(bytes: &[u8]) -> bool {
    oci::means_something(bytes)
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

/// A build's log as the page shows it.
pub fn log_as_html<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
    frontend::log_as_html(pieces)
}

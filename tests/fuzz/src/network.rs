//! Targets for the network of builds.

use cofferdam::fuzzing;

/// What the network device asks of the host.
pub fn request(bytes: &[u8]) -> bool {
    fuzzing::network_request(bytes)
}

pub(crate) fn request_seeds() -> Vec<Vec<u8>> {
    let address = [93, 184, 215, 14];
    vec![
        // Connect: an id, IPv4, a port of two bytes.
        [&[0, 1, 0][..], &address, &[0xbb, 3]].concat(),
        // Head, Resolve, Close.
        vec![1, 1, 3, b'G', b'E', b'T'],
        [&[2, 0xff, 0xff, 0xff, 0xff, 0xf, 9][..], b"a.example", &[1]].concat(),
        vec![3, 1, 1],
    ]
}

/// A guest's packets.
pub fn packets(bytes: &[u8]) -> bool {
    fuzzing::network_packets(bytes)
}

pub(crate) fn packets_seeds() -> Vec<Vec<u8>> {
    let ipv4 = |protocol: u8, to: [u8; 4], payload: &[u8]| {
        let length = 20 + payload.len() as u8;
        let header = [0x45, 0, 0, length, 0, 0, 0, 0, 64, protocol, 0, 0, 192, 0, 0, 2];
        [&[0, length][..], &header, &to, payload].concat()
    };
    let tcp = |flags| [0x9c, 0x40, 1, 0xbb, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 4, 0, 0, 0, 0, 0];
    let query = [&[0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 7][..], b"example", &[0, 0, 1, 0, 1]].concat();
    let udp = [&[0x9c, 0x40, 0, 53, 0, 8 + query.len() as u8, 0, 0][..], &query].concat();
    let good = [93, 184, 215, 14];
    vec![
        [ipv4(6, good, &tcp(2)), ipv4(6, good, &tcp(0x10)), ipv4(6, good, &tcp(0x11))].concat(),
        ipv4(17, [192, 0, 0, 1], &udp),
        ipv4(17, good, &udp),
        ipv4(1, [192, 0, 0, 1], &[8, 0, 0, 0, 0, 1, 0, 1]),
    ]
}

/// The beginning of a connection; the first byte says how it comes.
pub fn server_name(bytes: &[u8]) -> bool {
    let Some((how, beginning)) = bytes.split_first() else { return false };
    fuzzing::server_name(how & 1 == 1, beginning, usize::from(how >> 1))
}

pub(crate) fn server_name_seeds() -> Vec<Vec<u8>> {
    // A handshake record with a ClientHello: a random number, one suite, and the extensions for a server's name, groups and
    // signatures.
    let name = [&[0, 0, 0, 14, 0, 12, 0, 0, 9][..], b"a.example"].concat();
    let extensions = [&name[..], &[0, 10, 0, 4, 0, 2, 0, 29], &[0, 13, 0, 4, 0, 2, 4, 3]].concat();
    let body = [&[3, 3][..], &[7; 32], &[0, 0, 2, 0xc0, 0x2b, 1, 0, 0, extensions.len() as u8], &extensions].concat();
    let message = [&[1, 0, 0, body.len() as u8][..], &body].concat();
    let hello = [&[22, 3, 1, 0, message.len() as u8][..], &message].concat();
    let http = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n";
    vec![[&[0xff], &hello[..]].concat(), [&[0x11], &hello[..]].concat(), [&[0xfe], &http[..]].concat()]
}

//! Targets for the network of builds.

use cofferdam::fuzzing::{self, Rings};

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
    let behind_lengths = |packets: Vec<Vec<u8>>| {
        packets.iter().flat_map(|packet| [&(packet.len() as u16).to_be_bytes()[..], packet].concat()).collect()
    };
    some_packets().map(behind_lengths).to_vec()
}

/// What a guest may send, alone or one after the other.
fn some_packets() -> [Vec<Vec<u8>>; 4] {
    let ipv4 = |protocol: u8, to: [u8; 4], payload: &[u8]| {
        let length = 20 + payload.len() as u8;
        let header = [0x45, 0, 0, length, 0, 0, 0, 0, 64, protocol, 0, 0, 192, 0, 0, 2];
        [&header[..], &to, payload].concat()
    };
    let tcp = |flags| [0x9c, 0x40, 1, 0xbb, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 4, 0, 0, 0, 0, 0];
    let query = query();
    let udp = [&[0x9c, 0x40, 0, 53, 0, 8 + query.len() as u8, 0, 0][..], &query].concat();
    let good = [93, 184, 215, 14];
    [
        vec![ipv4(6, good, &tcp(2)), ipv4(6, good, &tcp(0x10)), ipv4(6, good, &tcp(0x11))],
        vec![ipv4(17, [192, 0, 0, 1], &udp)],
        vec![ipv4(17, good, &udp)],
        vec![ipv4(1, [192, 0, 0, 1], &[8, 0, 0, 0, 0, 1, 0, 1])],
    ]
}

/// A DNS query for the IPv4 addresses of `a.example`.
fn query() -> Vec<u8> {
    [&[0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 7][..], b"example", &[0, 0, 1, 0, 1]].concat()
}

/// A guest's query, or a server's answer, as the first byte says.
pub fn dns_message(bytes: &[u8]) -> bool {
    match bytes.split_first() {
        Some((0, message)) => fuzzing::dns_query(message),
        Some((_, message)) => fuzzing::dns_answer(message),
        None => false,
    }
}

pub(crate) fn dns_message_seeds() -> Vec<Vec<u8>> {
    // A response with recursion; an alias, an address of it.
    let mut answer = query();
    answer[2..8].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 2]);
    answer.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 4, 1, b'b', 0xc0, 14]);
    answer.extend([1, b'b', 0xc0, 14, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 93, 184, 215, 14]);
    // A query with EDNS for up to 4096 bytes.
    let mut extended = query();
    extended[11] = 1;
    extended.extend([0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 0]);
    [(0, query()), (0, extended), (1, answer)].map(|(way, message)| [&[way][..], &message].concat()).to_vec()
}

/// Bytes before the memory of a guest with a network: for each queue its size and the addresses of its rings.
const QUEUES_BYTES: usize = 15;

/// The guest's memory: two regions, with nothing between.
const REGION_BYTES: usize = 0x4000;
const SECOND_REGION: u64 = 0x8000;

/// A guest's memory and its two queues for frames, all of it made up. Accepted ones don't end the device.
///
/// ```text
///   event index:u8  twice: queue size:u8  descriptors:u16·16  available:u16·2  used:u16·4   memory
/// ```
pub fn queues(bytes: &[u8]) -> bool {
    let Some((queues, contents)) = bytes.split_at_checked(QUEUES_BYTES) else { return false };
    let mut memory = contents[..contents.len().min(2 * REGION_BYTES)].to_vec();
    memory.resize(2 * REGION_BYTES, 0);
    let (first, second) = memory.split_at(REGION_BYTES);
    let address = |at: usize, alignment| u64::from(u16::from_le_bytes([queues[at], queues[at + 1]])) * alignment;
    let rings = [1, 8].map(|at| Rings {
        size: 1 << (queues[at] % 11),
        descriptors: address(at + 1, 16),
        available: address(at + 3, 2),
        used: address(at + 5, 4),
        next_available: 0,
        event_index: queues[0] & 1 == 1,
    });
    fuzzing::network_queues(&[(0, first), (SECOND_REGION, second)], rings)
}

pub(crate) fn queues_seeds() -> Vec<Vec<u8>> {
    some_packets().map(|packets| queues_with(&packets)).to_vec()
}

/// A guest that sends these packets and has room for the answers.
fn queues_with(packets: &[Vec<u8>]) -> Vec<u8> {
    const SIZE: u8 = 4;
    /// The rings of each queue, and where its buffers begin.
    const PLACES: [[u16; 4]; 2] = [[0, 0x100, 0x180, 0x1000], [0x200, 0x300, 0x380, 0x400]];
    // The rest is 0, too.
    let mut memory = vec![0; 0x800];
    let mut put = |at: u16, bytes: &[u8]| memory[usize::from(at)..][..bytes.len()].copy_from_slice(bytes);
    let mut describe = |place: usize, number: u16, (at, length, flags): (u16, u16, u16)| {
        let [descriptors, available, ..] = PLACES[place];
        let words = [at, 0, 0, 0, length, 0, flags, 0].map(u16::to_le_bytes).concat();
        put(descriptors + 16 * number, &words);
        put(available + 4 + 2 * number, &number.to_le_bytes());
        put(available + 2, &(number + 1).to_le_bytes());
        if place == 1 {
            // Headers of virtio and Ethernet.
            put(at + 26, &packets[usize::from(number)]);
        }
    };
    for number in 0..u16::from(SIZE) {
        describe(0, number, (PLACES[0][3] + 0x200 * number, 0x200, 2));
    }
    for (number, packet) in (0..).zip(packets) {
        describe(1, number, (PLACES[1][3] + 0x100 * number, 26 + packet.len() as u16, 0));
    }
    let queue = |[descriptors, available, used, _]: [u16; 4]| {
        let places = [descriptors / 16, available / 2, used / 4].map(u16::to_le_bytes);
        [&[SIZE.ilog2() as u8][..], &places.concat()].concat()
    };
    [&[1][..], &queue(PLACES[0]), &queue(PLACES[1]), &memory].concat()
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

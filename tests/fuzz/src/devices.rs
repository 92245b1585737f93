//! Targets for the devices that serve files to a guest: its requests, its queues, and what a device for paths of the host asks.

use std::sync::LazyLock;

use cofferdam::fuzzing::{self, Device, Queue, Rings, Stage};

use crate::host::RUNTIME;

static STAGE: LazyLock<Stage> = LazyLock::new(|| Stage::new(RUNTIME.handle()));

/// Most requests of one guest.
const MAX_REQUESTS: usize = 64;

/// Most times that a guest notifies the device of its queue.
const MAX_KICKS: usize = 8;

/// Bytes before each request: its length and the room for its answer, 16 bits each.
const LENGTHS_BYTES: usize = 4;

/// Bytes of a request's header, and of an answer's.
const REQUEST_HEADER_BYTES: usize = 40;
const ANSWER_HEADER_BYTES: usize = 16;

/// FUSE's numbers.
const GETATTR: u32 = 3;
const ROOT: u64 = 1;

/// An honest guest's memory: the rings, a request and room for its answer.
const RINGS: Rings =
    Rings { size: 4, descriptors: 0, available: 0x100, used: 0x200, next_available: 0, event_index: true };
const REQUEST: u64 = 0x1000;
const ANSWER: u64 = 0x1_2000;
const MEMORY_BYTES: usize = 0x2_4000;

/// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Fills the room for an answer and what follows it.
const UNTOUCHED: u8 = 0xa5;

/// A guest with honest queues, which says anything in them.
struct Guest<'a> {
    device: &'a Device,
    queue: Queue<'a>,
    requests: u16,
}

impl<'a> Guest<'a> {
    /// The device has such a guest from now on.
    fn new(device: &'a Device) -> Self {
        device.replace(&[(0, &[0; MEMORY_BYTES])]);
        Self { device, queue: device.queue(RINGS), requests: 0 }
    }

    /// The answer to a request, which is empty if it gets none. `None` if the device ends.
    fn ask(&mut self, request: &[u8], room: u16) -> Option<Vec<u8>> {
        let length = u32::try_from(request.len()).expect("it is short");
        self.device.write(&[UNTOUCHED; 0x1_1000], ANSWER);
        self.device.write(request, REQUEST);
        self.device.write(&descriptor(REQUEST, length, NEXT, 1), 0);
        self.device.write(&descriptor(ANSWER, room.into(), WRITE, 0), 16);
        self.requests += 1;
        self.device.write(&self.requests.to_le_bytes(), RINGS.available + 2);
        self.queue.kick()?;
        let mut used = [0; 4];
        let entry = u64::from((self.requests - 1) % RINGS.size);
        self.device.read(&mut used, RINGS.used + 4 + 8 * entry + 4);
        let mut answer = vec![0; usize::from(room) + 64];
        self.device.read(&mut answer, ANSWER);
        assert_eq!(answer.split_off(room.into()), [UNTOUCHED; 64], "the answer goes on after its buffer");
        answer.truncate(u32::from_le_bytes(used) as usize);
        Some(answer)
    }

    /// Whether the device still gives the root's attributes.
    fn is_served(&mut self) -> bool {
        let answer = self.ask(&request(GETATTR, ROOT, 0xfeed, &[0; 16]), 120);
        answer.is_some_and(|answer| {
            answer.len() == 120 && answer[4..16] == [&[0; 4][..], &0xfeed_u64.to_le_bytes()].concat()
        })
    }
}

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> Vec<u8> {
    [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}

/// A request of FUSE.
fn request(opcode: u32, node: u64, unique: u64, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(REQUEST_HEADER_BYTES + body.len()).expect("it is short");
    let numbers = [length.to_le_bytes(), opcode.to_le_bytes()].concat();
    [&numbers, &unique.to_le_bytes()[..], &node.to_le_bytes(), &[0; 16], body].concat()
}

fn device(stage: &Stage, byte: u8) -> Device {
    if byte & 1 == 0 { stage.inputs() } else { stage.paths() }
}

/// Requests in honest queues. Accepted ones get an answer, and an honest guest is served after those that don't end the device.
pub fn fuse_request(bytes: &[u8]) -> bool {
    let Some((first, mut rest)) = bytes.split_first() else { return false };
    let device = device(&STAGE, *first);
    let mut guest = Guest::new(&device);
    let mut answered = 0;
    for _ in 0..MAX_REQUESTS {
        let Some((lengths, more)) = rest.split_at_checked(LENGTHS_BYTES) else { break };
        let length = usize::from(u16::from_le_bytes([lengths[0], lengths[1]]));
        let (request, more) = more.split_at(length.min(more.len()));
        rest = more;
        let Some(answer) = guest.ask(request, u16::from_le_bytes([lengths[2], lengths[3]])) else { return false };
        if answer.is_empty() {
            continue;
        }
        assert!(answer.len() >= ANSWER_HEADER_BYTES, "an answer has {} bytes", answer.len());
        assert_eq!(answer[..4], u32::try_from(answer.len()).expect("it is short").to_le_bytes());
        assert_eq!(answer[8..16], request[8..16], "it answers another request");
        answered += 1;
    }
    assert!(guest.is_served());
    answered > 0
}

pub(crate) fn fuse_request_seeds() -> Vec<Vec<u8>> {
    let seed = |kind: u8, requests: &[(u32, u64, &[u8])]| {
        let mut seed = vec![kind];
        for (unique, (opcode, node, body)) in (1..).zip(requests) {
            let request = request(*opcode, *node, unique, body);
            seed.extend(u16::try_from(request.len()).expect("it is short").to_le_bytes());
            seed.extend(4096_u16.to_le_bytes());
            seed.extend(request);
        }
        seed
    };
    // FUSE's structures, as long as they are: READ and READDIR at offset 0, and INIT of version 7.38.
    let read = [&[0; 16][..], &4000_u32.to_le_bytes(), &[0; 20]].concat();
    let init = [7, 38, 0, 0xff_ffff].map(u32::to_le_bytes).concat();
    let inputs: &[(u32, u64, &[u8])] = &[
        (26, 0, &[&init[..], &[0; 48]].concat()),
        (GETATTR, ROOT, &[0; 16]),
        (1, ROOT, b"directory\0"),
        (1, 2, b"file\0"),
        (15, 3, &read),
        (5, 4, &[]),
        (44, ROOT, &read),
        (28, 2, &read),
        (17, ROOT, &[]),
    ];
    let changes: &[(u32, u64, &[u8])] = &[
        (14, 5, &[0; 8]),
        (27, ROOT, &[0; 8]),
        (34, 5, &[0; 8]),
        (4, 5, &[0; 88]),
        (6, ROOT, b"new\0target\0"),
        (9, ROOT, &[&[0; 8][..], b"new\0"].concat()),
        (35, ROOT, &[&[0; 16][..], b"new\0"].concat()),
        (45, ROOT, &[&[0; 16][..], b"old\0new\0"].concat()),
        (16, 5, &[&[0; 40][..], b"x"].concat()),
        (21, 5, &[&1_u32.to_le_bytes()[..], &[0; 4], b"user.a\0v"].concat()),
        (22, 5, &[&[0; 8][..], b"user.a\0"].concat()),
        (46, 5, &[0; 24]),
        (42, 0, &[&2_u32.to_le_bytes()[..], &[0; 4], &[1; 32]].concat()),
        (48, 0, &[0; 32]),
        (10, ROOT, b"program\0"),
        (4096, ROOT, &[]),
    ];
    let paths: &[(u32, u64, &[u8])] = &[
        (1, ROOT, b"0\0"),
        (1, 2, b"file\0"),
        (1, 2, b"link\0"),
        (1, ROOT, b"1\0"),
        (14, 3, &[0; 8]),
        (15, 3, &[&1_u64.to_le_bytes()[..], &[0; 8], &100_u32.to_le_bytes(), &[0; 20]].concat()),
        (18, 3, &[&1_u64.to_le_bytes()[..], &[0; 16]].concat()),
        (5, 4, &[]),
        (27, 2, &[0; 8]),
        (44, 2, &[&2_u64.to_le_bytes()[..], &read[8..]].concat()),
        (29, 2, &[&2_u64.to_le_bytes()[..], &[0; 16]].concat()),
        (2, 3, &1_u64.to_le_bytes()),
    ];
    vec![seed(0, inputs), seed(0, changes), seed(1, paths)]
}

/// Bytes before the memory of a guest with a hostile queue, see `descriptor_chain`.
const QUEUE_BYTES: usize = 10;

/// The hostile guest's memory: two regions, with nothing between.
const REGION_BYTES: usize = 0x1800;
const SECOND_REGION: u64 = 0x2000;

/// A guest's memory and queue, all of it made up. Accepted ones don't end the device, which serves an honest guest then.
///
/// ```text
///   device:u8  queue size:u8  event index:u8  descriptors:u16·16  available:u16·2  used:u16·4  next available:u8  memory
/// ```
pub fn descriptor_chain(bytes: &[u8]) -> bool {
    let Some((queue, contents)) = bytes.split_at_checked(QUEUE_BYTES) else { return false };
    let mut memory = contents[..contents.len().min(2 * REGION_BYTES)].to_vec();
    memory.resize(2 * REGION_BYTES, 0);
    let (first, second) = memory.split_at(REGION_BYTES);
    let device = device(&STAGE, queue[0]);
    device.replace(&[(0, first), (SECOND_REGION, second)]);
    let address = |at: usize, alignment| u64::from(u16::from_le_bytes([queue[at], queue[at + 1]])) * alignment;
    let hostile = device.queue(Rings {
        size: 1 << (queue[1] % 10),
        descriptors: address(3, 16),
        available: address(5, 2),
        used: address(7, 4),
        next_available: queue[9].into(),
        event_index: queue[2] & 1 == 1,
    });
    for _ in 0..MAX_KICKS {
        match hostile.kick() {
            None => return false,
            Some(true) => {}
            Some(false) => break,
        }
    }
    let served = Guest::new(&device).is_served();
    assert!(served);
    served
}

pub(crate) fn descriptor_chain_seeds() -> Vec<Vec<u8>> {
    let lookup = request(1, ROOT, 7, b"directory\0");
    let length = u32::try_from(lookup.len()).expect("it is short");
    let request_at: usize = 0x180;
    let seed = |table: &[Vec<u8>], available: u16, size: u8, event_index: u8| {
        let mut memory = vec![0; request_at + lookup.len()];
        let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &table.concat());
        put(0x82, &available.to_le_bytes());
        put(request_at, &lookup);
        let queue =
            [&[0, size, event_index, 0, 0][..], &0x40_u16.to_le_bytes(), &0x30_u16.to_le_bytes(), &[0]].concat();
        [queue, memory].concat()
    };
    let request_at = request_at as u64;
    let simple = [descriptor(request_at, length, NEXT, 1), descriptor(SECOND_REGION, 200, WRITE, 0)];
    let pieces = [
        descriptor(request_at, 8, NEXT, 3),
        descriptor(SECOND_REGION + 100, 100, WRITE, 0),
        descriptor(SECOND_REGION, 100, NEXT | WRITE, 1),
        descriptor(request_at + 8, length - 8, NEXT, 2),
    ];
    let indirect = [
        descriptor(16, 32, INDIRECT, 0),
        descriptor(request_at, length, NEXT, 1),
        descriptor(SECOND_REGION, 200, WRITE, 0),
    ];
    vec![seed(&simple, 1, 4, 0), seed(&pieces, 1, 2, 1), seed(&indirect, 3, 4, 1)]
}

/// What the device for paths of the host asks its opener.
pub fn paths_request(bytes: &[u8]) -> bool {
    fuzzing::paths_request(bytes)
}

pub(crate) fn paths_request_seeds() -> Vec<Vec<u8>> {
    let request = |root: u8, path: &str, want: u8| {
        let length = u8::try_from(path.len()).expect("it is short");
        [&[root, length][..], path.as_bytes(), &[want]].concat()
    };
    let [attributes, target, file, directory] = [0, 1, 2, 3];
    vec![
        request(0, "", attributes),
        request(0, "link", target),
        request(0, "file", file),
        request(0, "", directory),
        request(1, "", file),
        request(0, "private", file),
        request(0, "../secret", file),
        request(0, "..", directory),
        request(0, "/etc/passwd", file),
        request(0, "link/../..", directory),
    ]
}

//! Requests of FUSE that no guest's kernel makes.

use cofferdam_tests::front_end::{ANSWER, FrontEnd, NEXT, REQUEST, RINGS, WRITE, words};

use super::{CONTENTS, Case, End::*};

/// FUSE's numbers of requests.
pub(crate) const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
pub(crate) const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const UNLINK: u32 = 10;
const OPEN: u32 = 14;
pub(crate) const READ: u32 = 15;
const WRITE_TO: u32 = 16;
const SETXATTR: u32 = 21;
const INIT: u32 = 26;
const READDIR: u32 = 28;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;
const IOCTL: u32 = 39;
const BATCH_FORGET: u32 = 42;
const READDIRPLUS: u32 = 44;
const SETUP_MAPPING: u32 = 48;
const REMOVE_MAPPING: u32 = 49;

/// Nodes: the root, and `file` behind `directory` and what is in it. One number is unused.
pub(crate) const ROOT: u64 = 1;
pub(crate) const FILE: u64 = 5;
const NOBODY: u64 = 1 << 40;

const HEADER_BYTES: usize = 40;

/// A request with its header.
pub(crate) fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER_BYTES + body.len()).expect("it is short");
    [&length.to_le_bytes()[..], &opcode.to_le_bytes(), &words(&[77, node]), &[0; 16], body].concat()
}

/// The body of READ, READDIR and the like.
fn range(offset: u64, size: u32) -> Vec<u8> {
    [&words(&[0, offset])[..], &size.to_le_bytes(), &[0; 20]].concat()
}

/// Whether the device answers an honest guest: with the right attributes and contents. Nothing else is accepted as long as it
/// has not hung up.
pub(crate) fn honest(front: &mut FrontEnd) -> bool {
    if front.has_hung_up() {
        return false;
    }
    front.request(&request(LOOKUP, ROOT, b"file\0"), 1000);
    let Some(entry) = front.answer() else { return false };
    assert_eq!((entry.len(), &entry[4..8]), (16 + 128, &[0; 4][..]), "an honest LOOKUP");
    assert_eq!(entry[16..24], FILE.to_le_bytes());
    front.request(&request(READ, FILE, &range(0, 4096)), 4096 + 16);
    let contents = front.answer().expect("it has just answered");
    assert_eq!(&contents[16..], CONTENTS, "an honest READ");
    true
}

/// Makes a request, which must get this error.
#[track_caller]
fn fails(front: &mut FrontEnd, request: &[u8], errno: i32) {
    front.start();
    front.request(request, 4096);
    let answer = front.answer().expect("it goes on");
    assert_eq!((answer.len(), &answer[4..8]), (16, &(-errno).to_le_bytes()[..]));
}

/// Makes a request, which must get an answer of this length.
#[track_caller]
fn succeeds(front: &mut FrontEnd, request: &[u8], room: u32, length: usize) -> Vec<u8> {
    front.start();
    front.request(request, room);
    let answer = front.answer().expect("it goes on");
    assert_eq!((answer.len(), &answer[4..8]), (length, &[0; 4][..]));
    answer
}

/// Makes a request that can end the device.
fn sends(front: &mut FrontEnd, request: &[u8], room: u32) {
    front.start();
    front.request(request, room);
    let _ = front.answer();
}

/// Looks a name up, which must not be there.
#[track_caller]
fn is_absent(front: &mut FrontEnd, name: &[u8]) {
    let answer = succeeds(front, &request(LOOKUP, ROOT, &[name, b"\0"].concat()), 4096, 16 + 128);
    assert_eq!(answer[16..24], [0; 8], "there is such a file");
}

/// A request whose header has another length than it.
fn of_length(length: u32, opcode: u32, body: &[u8]) -> Vec<u8> {
    let mut request = request(opcode, ROOT, body);
    request[..4].copy_from_slice(&length.to_le_bytes());
    request
}

/// Makes a request that gets no answer.
fn forgets(front: &mut FrontEnd, request: &[u8]) {
    front.start();
    front.request(request, 0);
    assert_eq!(front.answer(), Some(vec![]));
}

pub(crate) const CASES: &[Case] = &[
    ("a name with a slash", |front| is_absent(front, b"directory/file"), Lives),
    ("an absolute name", |front| is_absent(front, b"/etc/passwd"), Lives),
    ("the parent", |front| is_absent(front, b".."), Lives),
    ("a way up", |front| is_absent(front, b"../../../../etc/passwd"), Lives),
    ("an empty name", |front| is_absent(front, b""), Lives),
    ("a name of 64 KiB", |front| is_absent(front, &[b'n'; 65_535]), Lives),
    ("a name with a NUL", |front| sends(front, &request(LOOKUP, ROOT, b"fi\0le\0"), 4096), Ends("can't be answered")),
    ("a name without an end", |front| sends(front, &request(LOOKUP, ROOT, b"file"), 4096), Ends("can't be answered")),
    ("a name below a file", |front| fails(front, &request(LOOKUP, FILE, b"x\0"), libc::ENOTDIR), Lives),
    ("a node that isn't there", |front| fails(front, &request(GETATTR, NOBODY, &[0; 16]), libc::ENOENT), Lives),
    ("node 0", |front| fails(front, &request(GETATTR, 0, &[0; 16]), libc::ENOENT), Lives),
    ("the last node", |front| fails(front, &request(READ, u64::MAX, &range(0, 1)), libc::ENOENT), Lives),
    (
        "READ at the end of all offsets",
        |front| {
            succeeds(front, &request(READ, FILE, &range(u64::MAX, 4000)), 4096, 16);
        },
        Lives,
    ),
    (
        "READ of 4 GiB",
        |front| {
            let answer = succeeds(front, &request(READ, FILE, &range(0, u32::MAX)), 4096, 16 + CONTENTS.len());
            assert_eq!(&answer[16..], CONTENTS);
        },
        Lives,
    ),
    ("READ of a directory", |front| fails(front, &request(READ, ROOT, &range(0, 1)), libc::EISDIR), Lives),
    (
        "READ without room for its answer",
        |front| {
            sends(front, &request(READ, FILE, &range(0, 1)), 15);
        },
        Ends("leaves 15 bytes"),
    ),
    (
        "READ with no buffer for its answer",
        |front| {
            sends(front, &request(READ, FILE, &range(0, 1)), 0);
        },
        Ends("leaves 0 bytes"),
    ),
    (
        "READ with little room",
        |front| {
            let answer = succeeds(front, &request(READ, FILE, &range(0, 18)), 20, 20);
            assert_eq!(&answer[16..], &CONTENTS[..4]);
        },
        Lives,
    ),
    (
        "READDIR of more than its room",
        |front| {
            fails(front, &request(READDIR, ROOT, &range(0, u32::MAX)), libc::ENOMEM);
        },
        Lives,
    ),
    ("READDIR of nothing", |front| drop(succeeds(front, &request(READDIR, ROOT, &range(0, 0)), 4096, 16)), Lives),
    (
        "READDIR without room",
        |front| {
            sends(front, &request(READDIR, ROOT, &range(0, 0)), 8);
        },
        Ends("leaves 8 bytes"),
    ),
    (
        "READDIRPLUS far behind the last entry",
        |front| {
            succeeds(front, &request(READDIRPLUS, ROOT, &range(u64::MAX, 4000)), 4096, 16);
        },
        Lives,
    ),
    ("READDIRPLUS of a file", |front| fails(front, &request(READDIRPLUS, FILE, &range(0, 4000)), libc::ENOTDIR), Lives),
    ("READLINK of a file", |front| fails(front, &request(READLINK, FILE, &[]), libc::EINVAL), Lives),
    ("a kind of request that isn't there", |front| fails(front, &request(4097, ROOT, &[]), libc::ENOSYS), Lives),
    ("the last kind of request", |front| fails(front, &request(u32::MAX, ROOT, &[]), libc::ENOSYS), Lives),
    ("SETUPMAPPING", |front| fails(front, &request(SETUP_MAPPING, FILE, &[0xff; 40]), libc::ENOSYS), Lives),
    ("REMOVEMAPPING", |front| fails(front, &request(REMOVE_MAPPING, FILE, &[0xff; 20]), libc::ENOSYS), Lives),
    ("IOCTL", |front| fails(front, &request(IOCTL, FILE, &[0xff; 32]), libc::ENOSYS), Lives),
    ("SETATTR", |front| fails(front, &request(SETATTR, FILE, &[0xff; 88]), libc::EROFS), Lives),
    ("OPEN to write", |front| fails(front, &request(OPEN, FILE, &words(&[1])), libc::EROFS), Lives),
    ("CREATE", |front| fails(front, &request(CREATE, ROOT, &[&[0; 16][..], b"new\0"].concat()), libc::EROFS), Lives),
    ("UNLINK", |front| fails(front, &request(UNLINK, ROOT, b"file\0"), libc::EROFS), Lives),
    (
        "WRITE of 4 GiB",
        |front| {
            let body = [&words(&[0, 0])[..], &u32::MAX.to_le_bytes(), &[0; 20], b"x"].concat();
            fails(front, &request(WRITE_TO, FILE, &body), libc::EROFS);
        },
        Lives,
    ),
    (
        "SETXATTR whose value is shorter than it says",
        |front| {
            sends(front, &request(SETXATTR, FILE, &[&words(&[1000])[..], b"user.a\0v"].concat()), 4096);
        },
        Ends("can't be answered"),
    ),
    ("FORGET of more than was looked up", |front| forgets(front, &request(FORGET, FILE, &words(&[u64::MAX]))), Lives),
    (
        "BATCH_FORGET that counts too many",
        |front| {
            sends(front, &request(BATCH_FORGET, 0, &words(&[1000, FILE, 1])), 4096);
        },
        Ends("can't be answered"),
    ),
    (
        "BATCH_FORGET of 4 billion",
        |front| {
            fails(front, &request(BATCH_FORGET, 0, &words(&[u32::MAX.into()])), libc::ENOMEM);
        },
        Lives,
    ),
    ("DESTROY", |front| forgets(front, &request(DESTROY, 0, &[])), Lives),
    (
        "INIT of another protocol",
        |front| {
            fails(front, &request(INIT, 0, &[6_u32, 0, 0, 0].map(u32::to_le_bytes).concat()), libc::EPROTO);
        },
        Lives,
    ),
    (
        "INIT with every feature",
        |front| {
            let body =
                [&[7_u32, 38, u32::MAX, u32::MAX, u32::MAX].map(u32::to_le_bytes).concat()[..], &[0xff; 44]].concat();
            succeeds(front, &request(INIT, 0, &body), 4096, 16 + 64);
        },
        Lives,
    ),
    ("INIT cut short", |front| sends(front, &request(INIT, 0, &[7, 0, 0, 0]), 4096), Ends("can't be answered")),
    ("a header cut short", |front| sends(front, &[40, 0, 0, 0, 1], 4096), Ends("can't be answered")),
    ("an empty request", |front| sends(front, &[], 4096), Ends("can't be answered")),
    (
        "a header that says less than itself",
        |front| sends(front, &of_length(3, LOOKUP, b"file\0"), 4096),
        Ends("can't be"),
    ),
    (
        "a header that says more than there is",
        |front| {
            sends(front, &of_length(4000, LOOKUP, b"file\0"), 4096);
        },
        Ends("can't be answered"),
    ),
    ("a header that says 4 GiB", |front| fails(front, &of_length(u32::MAX, LOOKUP, b"file\0"), libc::ENOMEM), Lives),
    (
        "an answer over its own request",
        |front| {
            front.start();
            front.write(REQUEST, &request(LOOKUP, ROOT, b"file\0"));
            front.write_table(RINGS[0], &[(REQUEST, 45, NEXT, 1), (REQUEST, 1000, WRITE, 0)]);
            front.offer(0);
            front.kick();
            front.answer();
            front.write(ANSWER, &[0; 16]);
        },
        Lives,
    ),
];

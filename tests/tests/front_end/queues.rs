//! Queues that no guest's kernel makes.

use cofferdam_tests::front_end::{
    ANSWER, Descriptor, FrontEnd, INDIRECT, MEMORY_BYTES, NEXT, QUEUE_SIZE, REQUEST, RINGS, WRITE,
};

use super::{
    Case,
    End::*,
    requests::{FILE, LOOKUP, READ, ROOT, request},
};

/// Length of the LOOKUP that each case begins with.
const LENGTH: u32 = 45;

/// Where indirect descriptors are, few or many.
const TABLE: u64 = 0x6000;
const LONG_TABLE: u64 = 0x2_0000;

/// An address without memory.
const NOWHERE: u64 = 1 << 40;

fn start(front: &mut FrontEnd) {
    front.start();
    front.write(REQUEST, &request(LOOKUP, ROOT, b"file\0"));
}

/// Offers a chain that begins with the first descriptor.
fn offers(front: &mut FrontEnd, table: &[Descriptor]) {
    start(front);
    front.write_table(RINGS[0], table);
    front.offer(0);
    front.kick();
    let _ = front.answer();
}

/// As [`offers`], with a table of indirect descriptors.
fn offers_indirect(front: &mut FrontEnd, table: &[Descriptor], length: u32) {
    start(front);
    front.write_table(TABLE, table);
    front.write_table(RINGS[0], &[(TABLE, length, INDIRECT, 0)]);
    front.offer(0);
    front.kick();
    let _ = front.answer();
}

/// Offers an honest chain by a lying count.
fn announces(front: &mut FrontEnd, count: u16) {
    start(front);
    front.write_table(RINGS[0], &[(REQUEST, LENGTH, NEXT, 1), (ANSWER, 4096, WRITE, 0)]);
    front.announce(count);
    front.requests = count;
    front.kick();
    let _ = front.answer();
}

/// Has rings at other addresses, and makes a request.
fn with_rings(front: &mut FrontEnd, rings: [u64; 3]) {
    front.agree();
    front.show_memory();
    front.set_queues_up(rings);
    front.enable();
    front.write(REQUEST, &request(LOOKUP, ROOT, b"file\0"));
    front.write_table(rings[0], &[(REQUEST, LENGTH, NEXT, 1), (ANSWER, 4096, WRITE, 0)]);
    front.write(rings[1] + 2, &[1, 0]);
    front.requests = 1;
    front.kick();
    let _ = front.answer();
}

pub(crate) const CASES: &[Case] = &[
    ("a chain that returns to itself", |front| offers(front, &[(REQUEST, LENGTH, NEXT, 0)]), Ends("can't be answered")),
    (
        "a chain that loops",
        |front| {
            offers(front, &[(REQUEST, LENGTH, NEXT, 1), (ANSWER, 4096, NEXT | WRITE, 0)]);
        },
        Lives,
    ),
    (
        "a request outside of memory",
        |front| {
            offers(front, &[(NOWHERE, LENGTH, NEXT, 1), (ANSWER, 4096, WRITE, 0)]);
        },
        Ends("do not lie in the guest's memory"),
    ),
    (
        "an answer outside of memory",
        |front| {
            offers(front, &[(REQUEST, LENGTH, NEXT, 1), (NOWHERE, 4096, WRITE, 0)]);
        },
        Ends("do not lie in the guest's memory"),
    ),
    (
        "a buffer over the end of memory",
        |front| {
            offers(front, &[(REQUEST, LENGTH, NEXT, 1), (MEMORY_BYTES - 8, 4096, WRITE, 0)]);
        },
        Ends("do not lie in the guest's memory"),
    ),
    (
        "a buffer over the end of all addresses",
        |front| {
            offers(front, &[(REQUEST, LENGTH, NEXT, 1), (u64::MAX - 8, 4096, WRITE, 0)]);
        },
        Ends("do not lie in the guest's memory"),
    ),
    (
        "a request of 4 GiB",
        |front| {
            offers(front, &[(REQUEST, u32::MAX, NEXT, 1), (ANSWER, 4096, WRITE, 0)]);
        },
        Ends("do not lie in the guest's memory"),
    ),
    (
        "an answer of 4 GiB",
        |front| {
            offers(front, &[(REQUEST, LENGTH, NEXT, 1), (ANSWER, u32::MAX, WRITE, 0)]);
        },
        Ends("can't be answered"),
    ),
    ("buffers of no length", |front| offers(front, &[(REQUEST, 0, NEXT, 1), (ANSWER, 0, WRITE, 0)]), Ends("can't be")),
    (
        "an answer before its request",
        |front| {
            offers(front, &[(ANSWER, 4096, NEXT | WRITE, 1), (REQUEST, LENGTH, 0, 0)]);
        },
        Lives,
    ),
    (
        "a request in single bytes",
        |front| {
            let bytes = (0..8).map(|at| (REQUEST + u64::from(at), 1, NEXT, at + 1));
            let rest = [(REQUEST + 8, LENGTH - 8, NEXT, 9), (ANSWER, 4096, WRITE, 0)];
            offers(front, &bytes.chain(rest).collect::<Vec<_>>());
        },
        Lives,
    ),
    (
        "a chain from behind the table",
        |front| {
            start(front);
            front.offer(QUEUE_SIZE);
            front.kick();
            front.answer();
        },
        Ends("can't be answered"),
    ),
    (
        "a chain that leads behind the table",
        |front| {
            offers(front, &[(REQUEST, LENGTH, NEXT, QUEUE_SIZE)]);
        },
        Ends("can't be answered"),
    ),
    (
        "a chain to the last number",
        |front| {
            offers(front, &[(REQUEST, LENGTH, NEXT, u16::MAX)]);
        },
        Ends("can't be answered"),
    ),
    (
        "a LOOKUP without room for its answer",
        |front| {
            offers(front, &[(REQUEST, LENGTH, 0, 0)]);
        },
        Ends("can't be answered"),
    ),
    (
        "an indirect chain",
        |front| {
            offers_indirect(front, &[(REQUEST, LENGTH, NEXT, 1), (ANSWER, 4096, WRITE, 0)], 32);
        },
        Lives,
    ),
    (
        "an indirect table outside of memory",
        |front| {
            offers(front, &[(NOWHERE, 32, INDIRECT, 0)]);
        },
        Ends("can't be answered"),
    ),
    ("an indirect table of 4 GiB", |front| offers(front, &[(TABLE, u32::MAX - 15, INDIRECT, 0)]), Ends("can't be")),
    (
        "an indirect table in pieces",
        |front| {
            offers_indirect(front, &[(REQUEST, LENGTH, 0, 0)], 17);
        },
        Ends("can't be answered"),
    ),
    ("an indirect table without entries", |front| offers_indirect(front, &[], 0), Ends("can't be answered")),
    (
        "indirect tables in one another",
        |front| {
            offers_indirect(front, &[(TABLE, 16, INDIRECT, 0)], 16);
        },
        Ends("can't be answered"),
    ),
    (
        "an indirect chain that loops",
        |front| {
            offers_indirect(front, &[(REQUEST, LENGTH, NEXT, 1), (ANSWER, 4096, NEXT | WRITE, 0)], 32);
        },
        Lives,
    ),
    (
        "an indirect chain of 20,000 empty buffers",
        |front| {
            let empty = (0..20_000).map(|at| (REQUEST, 0, NEXT, at + 1));
            let rest = [(REQUEST, LENGTH, NEXT, 20_001), (ANSWER, 4096, WRITE, 0)];
            start(front);
            front.write_table(LONG_TABLE, &empty.chain(rest).collect::<Vec<_>>());
            front.write_table(RINGS[0], &[(LONG_TABLE, 20_002 * 16, INDIRECT, 0)]);
            front.offer(0);
            front.kick();
            let _ = front.answer();
        },
        Lives,
    ),
    ("more requests than there are descriptors", |front| announces(front, QUEUE_SIZE + 1), Ends("rings make no sense")),
    ("the greatest number of requests", |front| announces(front, u16::MAX), Ends("rings make no sense")),
    ("the same request as often as there are descriptors", |front| announces(front, QUEUE_SIZE), Lives),
    (
        "requests that are taken back",
        |front| {
            offers(front, &[(REQUEST, LENGTH, NEXT, 1), (ANSWER, 4096, WRITE, 0)]);
            front.announce(0);
            front.kick();
            front.wait_for_the_end();
        },
        Ends("rings make no sense"),
    ),
    (
        "a ring of available chains over the end of memory",
        |front| {
            with_rings(front, [RINGS[0], MEMORY_BYTES - 4, RINGS[2]]);
        },
        Ends("a queue lacks a request"),
    ),
    (
        "a ring of used chains over the end of memory",
        |front| {
            with_rings(front, [RINGS[0], RINGS[1], MEMORY_BYTES - 4]);
        },
        Ends("rings make no sense"),
    ),
    (
        "a table of descriptors over the end of memory",
        |front| {
            with_rings(front, [MEMORY_BYTES - 32, RINGS[1], RINGS[2]]);
            front.offer(2);
            front.kick();
            front.wait_for_the_end();
        },
        Ends("can't be answered"),
    ),
    (
        "an answer over the queue itself",
        |front| {
            offers(front, &[(REQUEST, LENGTH, NEXT, 1), (RINGS[1], 4096, WRITE, 0)]);
            front.kick();
            front.wait_for_the_end();
        },
        Ends("rings make no sense"),
    ),
    (
        "kicks without requests",
        |front| {
            start(front);
            for _ in 0..10_000 {
                front.kick();
            }
        },
        Lives,
    ),
    (
        "requests faster than answers",
        |front| {
            start(front);
            front.write(REQUEST, &request(READ, FILE, &[&[0; 16][..], &[0xff; 4], &[0; 20]].concat()));
            front.write_table(RINGS[0], &[(REQUEST, 80, NEXT, 1), (ANSWER, 4096, WRITE, 0)]);
            for _ in 0..10_000 {
                front.offer(0);
            }
            front.kick();
            let _ = front.answer();
        },
        Ends("rings make no sense"),
    ),
];

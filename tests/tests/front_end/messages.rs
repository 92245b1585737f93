//! Messages of vhost-user that no honest VMM sends.

use std::{
    fs::File,
    os::{fd::AsFd as _, unix::fs::FileExt as _},
    thread,
    time::Duration,
};

use cofferdam_tests::front_end::{
    FEATURES, FrontEnd, MEMORY_BYTES, QUEUE_SIZE, REQUESTS, RINGS, USER_ADDRESS, VERSION, addresses, region, state,
    words,
};
use vhost::vhost_user::message::FrontendReq::{self, *};

use super::{Case, End::*, requests};

/// Sends a message that must not be accepted.
fn refused(front: &mut FrontEnd, request: FrontendReq, body: &[u8]) {
    front.agree();
    assert_ne!(front.ask(request, body, &[]), Some(0), "it is accepted");
    front.wait_for_the_end();
}

/// As [`refused`], to a device whose queues work.
fn refused_later(front: &mut FrontEnd, request: FrontendReq, body: &[u8]) {
    front.start();
    assert_ne!(front.ask(request, body, &[]), Some(0), "it is accepted");
    front.wait_for_the_end();
}

/// As [`refused`], with the guest's memory so many times.
fn refused_with(front: &mut FrontEnd, request: FrontendReq, body: &[u8], files: usize) {
    front.agree();
    let files = vec![front.memory.as_fd(); files];
    assert_ne!(front.ask(request, body, &files), Some(0), "it is accepted");
    front.wait_for_the_end();
}

/// Sends a header that isn't right.
fn sends(front: &mut FrontEnd, request: u32, flags: u32, length: u32) {
    front.agree();
    front.send_bytes(&[request, flags, length].map(u32::to_le_bytes).concat(), &[]);
}

/// The body of a table of memory.
fn table(count: u32, regions: &[Vec<u8>]) -> Vec<u8> {
    [words(&[count.into()]), regions.concat()].concat()
}

fn whole() -> Vec<u8> {
    region(0, MEMORY_BYTES, USER_ADDRESS, 0)
}

/// Shows this memory.
fn shows(front: &mut FrontEnd, regions: &[Vec<u8>]) {
    let count = u32::try_from(regions.len()).expect("they are few");
    refused_with(front, SET_MEM_TABLE, &table(count, regions), regions.len());
}

pub(crate) const CASES: &[Case] = &[
    ("nothing that is wrong", |front| front.start(), Lives),
    ("a message that isn't there", |front| sends(front, 99, VERSION, 0), Ends("connection to the VMM")),
    ("message 0", |front| sends(front, 0, VERSION, 0), Ends("connection to the VMM")),
    ("an answer that nobody asked for", |front| sends(front, 3, VERSION | 4, 0), Ends("connection to the VMM")),
    ("another version", |front| sends(front, 3, 2, 0), Ends("connection to the VMM")),
    ("a message of 4 GiB", |front| sends(front, 5, VERSION, u32::MAX), Ends("connection to the VMM")),
    ("a message of 4,097 bytes", |front| sends(front, 5, VERSION, 4097), Ends("connection to the VMM")),
    (
        "a header cut short",
        |front| {
            front.send_bytes(&[1, 0, 0, 0, 1], &[]);
            front.hang_up();
        },
        Goes,
    ),
    (
        "a body cut short",
        |front| {
            sends(front, 8, VERSION, 8);
            front.send_bytes(&[0], &[]);
            front.hang_up();
        },
        Ends("connection to the VMM"),
    ),
    ("nothing at all", |front| front.hang_up(), Goes),
    ("a body that is too short", |front| refused(front, SET_VRING_NUM, &[0; 4]), Ends("connection to the VMM")),
    ("a body that is too long", |front| refused(front, SET_OWNER, &[0; 8]), Ends("connection to the VMM")),
    ("another owner", |front| refused(front, SET_OWNER, &[]), Ends("already claimed")),
    (
        "features that weren't offered",
        |front| {
            refused(front, SET_FEATURES, &words(&[u64::MAX]));
        },
        Ends("connection to the VMM"),
    ),
    (
        "a descriptor that belongs to nothing",
        |front| {
            refused_with(front, GET_FEATURES, &[], 1);
        },
        Ends("connection to the VMM"),
    ),
    (
        "more descriptors than a message may have",
        |front| {
            refused_with(front, SET_MEM_TABLE, &table(1, &[whole()]), 33);
        },
        Ends("connection to the VMM"),
    ),
    (
        "memory without a descriptor",
        |front| {
            refused(front, SET_MEM_TABLE, &table(1, &[whole()]));
        },
        Ends("connection to the VMM"),
    ),
    (
        "fewer descriptors than regions",
        |front| {
            refused_with(front, SET_MEM_TABLE, &table(2, &[region(0, 4096, 0, 0), region(8192, 4096, 8192, 0)]), 1);
        },
        Ends("connection to the VMM"),
    ),
    (
        "more descriptors than regions",
        |front| {
            refused_with(front, SET_MEM_TABLE, &table(1, &[whole()]), 2);
        },
        Ends("connection to the VMM"),
    ),
    ("no memory", |front| refused(front, SET_MEM_TABLE, &table(0, &[])), Ends("connection to the VMM")),
    (
        "a count of regions that lies",
        |front| {
            refused_with(front, SET_MEM_TABLE, &table(8, &[whole()]), 8);
        },
        Ends("connection to the VMM"),
    ),
    ("regions that overlap", |front| shows(front, &[whole(), region(4096, 8192, 0, 0)]), Ends("connection to the VMM")),
    (
        "a region that is longer than its file",
        |front| {
            front.agree();
            let body = table(1, &[region(0, 2 * MEMORY_BYTES, USER_ADDRESS, 0)]);
            assert_eq!(front.ask(SET_MEM_TABLE, &body, &[front.memory.as_fd()]), Some(0));
            front.set_queues_up(RINGS);
            front.enable();
            front.write_table(RINGS[0], &[(MEMORY_BYTES, 80, 0, 0)]);
            front.offer(0);
            front.kick();
            front.wait_for_the_end();
        },
        Dies(libc::SIGBUS),
    ),
    (
        "a region behind the end of its file",
        |front| {
            front.agree();
            let body = table(1, &[region(0, MEMORY_BYTES, USER_ADDRESS, 1 << 40)]);
            assert_eq!(front.ask(SET_MEM_TABLE, &body, &[front.memory.as_fd()]), Some(0));
            front.ask(SET_VRING_ADDR, &addresses(REQUESTS, RINGS), &[]);
            front.wait_for_the_end();
        },
        Dies(libc::SIGBUS),
    ),
    ("a region of no length", |front| shows(front, &[region(0, 0, USER_ADDRESS, 0)]), Ends("connection to the VMM")),
    (
        "a region over the end of all addresses",
        |front| {
            shows(front, &[region(u64::MAX - 4095, 8192, USER_ADDRESS, 0)]);
        },
        Ends("connection to the VMM"),
    ),
    (
        "a region that can't be mapped",
        |front| {
            front.agree();
            let null = File::open("/dev/null").expect("every host has it");
            assert_ne!(front.ask(SET_MEM_TABLE, &table(1, &[whole()]), &[null.as_fd()]), Some(0));
            front.wait_for_the_end();
        },
        Ends("connection to the VMM"),
    ),
    (
        "one more region over another",
        |front| {
            front.start();
            let body = [words(&[0]), region(4096, 4096, 0, 0)].concat();
            assert_ne!(front.ask(ADD_MEM_REG, &body, &[front.memory.as_fd()]), Some(0));
            front.wait_for_the_end();
        },
        Ends("connection to the VMM"),
    ),
    (
        "a region that isn't there",
        |front| {
            refused_later(front, REM_MEM_REG, &[words(&[0]), region(1 << 40, 4096, 0, 0)].concat());
        },
        Ends("connection to the VMM"),
    ),
    (
        "memory whose file is cut short",
        |front| {
            front.start();
            front.memory.set_len(0).expect("it is ours");
            front.kick();
            front.wait_for_the_end();
        },
        Dies(libc::SIGBUS),
    ),
    ("a queue of no size", |front| refused(front, SET_VRING_NUM, &state(REQUESTS, 0)), Ends("connection to the VMM")),
    (
        "a queue of 32,769",
        |front| {
            refused(front, SET_VRING_NUM, &state(REQUESTS, 32_769));
        },
        Ends("connection to the VMM"),
    ),
    (
        "a queue of 65,537",
        |front| {
            refused(front, SET_VRING_NUM, &state(REQUESTS, 65_537));
        },
        Ends("connection to the VMM"),
    ),
    (
        "a queue of 12, which stays as it is",
        |front| {
            front.start();
            front.ask(SET_VRING_NUM, &state(REQUESTS, 12), &[]);
        },
        Lives,
    ),
    ("queue 2", |front| refused(front, SET_VRING_NUM, &state(2, 16)), Ends("connection to the VMM")),
    ("the last queue", |front| refused(front, SET_VRING_BASE, &state(u32::MAX, 0)), Ends("connection to the VMM")),
    (
        "the state of a queue that isn't there",
        |front| {
            refused(front, GET_VRING_BASE, &state(7, 0));
        },
        Ends("connection to the VMM"),
    ),
    (
        "rings without memory",
        |front| refused(front, SET_VRING_ADDR, &addresses(1, RINGS)),
        Ends("connection to the VMM"),
    ),
    (
        "rings outside of memory",
        |front| {
            refused_later(front, SET_VRING_ADDR, &addresses(1, [MEMORY_BYTES, RINGS[1], RINGS[2]]));
        },
        Ends("connection to the VMM"),
    ),
    (
        "rings at the end of all addresses",
        |front| {
            refused_later(front, SET_VRING_ADDR, &addresses(1, [RINGS[0], u64::MAX - USER_ADDRESS, RINGS[2]]));
        },
        Ends("connection to the VMM"),
    ),
    (
        "rings that aren't aligned",
        |front| {
            refused_later(front, SET_VRING_ADDR, &addresses(1, [1, 3, 5]));
        },
        Ends("connection to the VMM"),
    ),
    (
        "an event of a queue that isn't there",
        |front| {
            refused_with(front, SET_VRING_KICK, &words(&[255]), 1);
        },
        Ends("connection to the VMM"),
    ),
    (
        "an event without a descriptor",
        |front| refused(front, SET_VRING_KICK, &words(&[1])),
        Ends("connection to the VMM"),
    ),
    (
        "an event that is a file",
        |front| {
            front.start();
            front.ask(SET_VRING_ENABLE, &state(REQUESTS, 0), &[]);
            front.ask(SET_VRING_KICK, &words(&[1]), &[front.memory.as_fd()]);
            assert_ne!(front.ask(SET_VRING_ENABLE, &state(REQUESTS, 1), &[]), Some(0));
            front.wait_for_the_end();
        },
        Ends("connection to the VMM"),
    ),
    (
        "a queue that is half enabled",
        |front| {
            refused(front, SET_VRING_ENABLE, &state(REQUESTS, 2));
        },
        Ends("connection to the VMM"),
    ),
    (
        "a queue that is enabled before features are agreed on",
        |front| {
            front.ask(SET_VRING_ENABLE, &state(REQUESTS, 1), &[]);
        },
        Ends("connection to the VMM"),
    ),
    (
        "a request before its queue is enabled",
        |front| {
            front.agree();
            front.show_memory();
            front.set_queues_up(RINGS);
            front.request(&requests::request(requests::GETATTR, requests::ROOT, &[0; 16]), 4096);
            thread::sleep(Duration::from_millis(50));
            let mut used = [0xff; 4];
            front.memory.read_exact_at(&mut used, RINGS[2]).expect("it is memory");
            assert_eq!(used[2..], [0; 2], "it is answered");
            front.enable();
            assert_eq!(front.answer().map(|answer| answer.len()), Some(16 + 104));
        },
        Lives,
    ),
    (
        "a request before its queue has rings",
        |front| {
            front.agree();
            front.show_memory();
            front.ask(SET_VRING_KICK, &words(&[1 | 0x100]), &[]);
            front.enable();
            front.kick();
            front.set_queues_up(RINGS);
        },
        Lives,
    ),
    (
        "a queue that stops and starts",
        |front| {
            front.start();
            assert!(requests::honest(front));
            let base = u64::from(front.requests) << 32 | u64::from(REQUESTS);
            assert_eq!(front.ask(GET_VRING_BASE, &state(REQUESTS, 0), &[]), Some(base));
            front.kick();
            front.requests = 0;
            front.write(RINGS[2], &[0; 0x100]);
            front.announce(0);
            front.set_queues_up(RINGS);
            front.enable();
        },
        Lives,
    ),
    (
        "a device that is reset",
        |front| {
            front.start();
            assert_eq!(front.ask(RESET_DEVICE, &[], &[]), Some(0));
            assert_eq!(front.ask(SET_FEATURES, &words(&[FEATURES]), &[]), Some(0));
            front.enable();
        },
        Lives,
    ),
    (
        "a configuration that isn't offered",
        |front| {
            refused(front, GET_CONFIG, &[words(&[u64::MAX >> 16, 0]), vec![0; 4]].concat());
        },
        Ends("connection to the VMM"),
    ),
    (
        "a log of what is written",
        |front| {
            refused_with(front, SET_LOG_BASE, &words(&[MEMORY_BYTES, 0]), 1);
        },
        Ends("connection to the VMM"),
    ),
    (
        "a migration",
        |front| {
            front.start();
            assert_eq!(front.ask(SET_DEVICE_STATE_FD, &state(0, 0), &[front.memory.as_fd()]), Some(0x101));
            assert_eq!(front.ask(CHECK_DEVICE_STATE, &[], &[]), Some(1));
        },
        Lives,
    ),
    (
        "a way back to the VMM",
        |front| {
            refused_with(front, SET_BACKEND_REQ_FD, &[], 1);
        },
        Ends("connection to the VMM"),
    ),
    (
        "memory for what is under way",
        |front| {
            refused(front, GET_INFLIGHT_FD, &[words(&[4096, 0]), vec![2, 0, 16, 0, 0, 0, 0, 0]].concat());
        },
        Ends("connection to the VMM"),
    ),
    ("a screen", |front| refused_with(front, GPU_SET_SOCKET, &[], 1), Ends("connection to the VMM")),
    (
        "a queue of another size than it had",
        |front| {
            front.start();
            assert_ne!(front.ask(SET_VRING_NUM, &state(REQUESTS, u32::from(QUEUE_SIZE) * 64), &[]), Some(0));
            front.wait_for_the_end();
        },
        Ends("connection to the VMM"),
    ),
];

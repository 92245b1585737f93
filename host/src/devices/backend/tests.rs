//! Queues that no guest's kernel makes. `tests/tests/front_end.rs` has more of them, for the whole process.

use std::io;
use std::time::Duration;

use virtiofsd::filesystem::Context;
use virtiofsd::fuse::Attr;
use virtiofsd::read_dir::ReadDir;
use vm_memory::{Bytes as _, GuestAddress};

use super::super::paths::{PathsFs, testing::paths_fs};
use super::*;

const MEMORY_BYTES: usize = 0x1_0000;
const RINGS: [u64; 3] = [0, 0x2000, 0x4000];
const REQUEST: u64 = 0x8000;
const ANSWER: u64 = 0x9000;

const GETATTR: u32 = 3;
const READ: u32 = 15;

/// A queue of a device, with one chain: a request of this kind for the root, and so much room for its answer.
fn queue<F>(fs: F, threads: usize, rings: [u64; 3], (opcode, room): (u32, u32)) -> (Backend<F>, SharedMemory, Vring)
where
    F: FileSystem + Send + Sync + 'static,
{
    let memory = SharedMemory::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap());
    let vring = Vring::new(memory.clone(), 512).unwrap();
    vring.set_queue_info(rings[0], rings[1], rings[2]).unwrap();
    vring.set_queue_event_idx(true);
    vring.set_queue_ready(true);
    vring.set_enabled(true);
    let header: [u32; 10] = [80, opcode, 0, 0, 1, 0, 0, 0, 0, 0];
    let write = |bytes: &[u8], at| memory.memory().write_slice(bytes, GuestAddress(at)).unwrap();
    write(&header.map(u32::to_le_bytes).concat(), REQUEST);
    let descriptor = |address: u64, length: u32, flags: u16, next: u16| {
        [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
    };
    write(&[descriptor(REQUEST, 80, 1, 1), descriptor(ANSWER, room, 2, 0)].concat(), rings[0]);
    (Backend::new(fs, memory.clone(), threads).unwrap(), memory, vring)
}

/// Says how many chains there are.
fn announce(memory: &SharedMemory, rings: [u64; 3], count: u16) {
    memory.memory().write_slice(&count.to_le_bytes(), GuestAddress(rings[1] + 2)).unwrap();
}

fn paths() -> PathsFs {
    paths_fs(Vec::new())
}

#[test]
fn an_honest_request_is_answered_and_given_back() {
    let (backend, memory, vring) = queue(paths(), 0, RINGS, (GETATTR, 120));
    assert!(!backend.answer_available(&vring).unwrap());
    announce(&memory, RINGS, 1);
    assert!(!backend.answer_available(&vring).unwrap());
    let mut used = [0; 12];
    memory.memory().read_slice(&mut used, GuestAddress(RINGS[2])).unwrap();
    assert_eq!(used, [0, 0, 1, 0, 0, 0, 0, 0, 120, 0, 0, 0]);
}

/// The event index makes a device look again as long as there is more.
#[test]
fn a_queue_that_makes_no_sense_is_not_looked_at_again() {
    for count in [513, u16::MAX] {
        let (backend, memory, vring) = queue(paths(), 0, RINGS, (GETATTR, 120));
        announce(&memory, RINGS, count);
        assert!(matches!(backend.answer_available(&vring), Err(QueueError::Rings(_))), "{count}");
    }
    let at_the_end = [RINGS[0], MEMORY_BYTES as u64 - 4, RINGS[2]];
    let (backend, memory, vring) = queue(paths(), 0, at_the_end, (GETATTR, 120));
    announce(&memory, at_the_end, 1);
    assert!(matches!(backend.answer_available(&vring), Err(QueueError::Announced)));
}

#[test]
fn a_request_without_room_for_its_answer_is_an_error() {
    for room in [0, 15] {
        let (backend, memory, vring) = queue(paths(), 0, RINGS, (READ, room));
        announce(&memory, RINGS, 1);
        let refused = backend.answer_available(&vring).unwrap_err();
        assert!(matches!(refused, QueueError::Request(RequestError::NoRoom { opcode: READ, .. })), "{refused}");
    }
}

#[test]
fn a_queue_that_the_vmm_has_stopped_is_left_alone() {
    let (backend, memory, vring) = queue(paths(), 0, RINGS, (GETATTR, 120));
    announce(&memory, RINGS, 513);
    vring.set_enabled(false);
    assert!(!backend.answer_available(&vring).unwrap());
}

/// A file system that waits.
struct Slow(Arc<Mutex<()>>);

impl FileSystem for Slow {
    type Inode = u64;
    type Handle = u64;
    type DirIter = ReadDir<Vec<u8>>;

    fn getattr(&self, _: Context, _: u64, _: Option<u64>) -> io::Result<(Attr, Duration)> {
        let _waited = self.0.lock();
        Ok((Attr::default(), Duration::ZERO))
    }
}

#[test]
fn only_so_many_requests_are_taken_while_nobody_answers() {
    let gate = Arc::new(Mutex::new(()));
    let closed = gate.lock();
    let threads = 2;
    let (backend, memory, vring) = queue(Slow(Arc::clone(&gate)), threads, RINGS, (GETATTR, 120));
    let most = QUEUES * FS_QUEUE_SIZE as usize;
    let mut taken = 0;
    while taken <= most + threads {
        announce(&memory, RINGS, u16::try_from(taken + 1).unwrap());
        match backend.answer_available(&vring) {
            Ok(_) => taken += 1,
            Err(QueueError::TooMany) => break,
            Err(error) => panic!("{error}"),
        }
    }
    assert!((most..=most + threads).contains(&taken), "{taken} were taken");
    drop(closed);
}

//! The VMM's side of a vhost-user device, which can send any bytes and hold any memory.
//!
//! The `vhost` crate has one, too, which refuses to send most of what a VMM that was taken over would.

use std::{
    fs::File,
    io::{self, IoSlice, Read as _, Write as _},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::{fs::FileExt as _, net::UnixStream},
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg},
    },
};
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::stretched;

/// Bytes of the guest's memory, which begins at address 0.
pub const MEMORY_BYTES: u64 = 1 << 20;

/// The address at which the front end says that it has the guest's memory.
pub const USER_ADDRESS: u64 = 0x7000_0000_0000;

/// Number of descriptors of a queue.
pub const QUEUE_SIZE: u16 = 16;

/// The queue for requests; queue 0 is for FORGET.
pub const REQUESTS: u32 = 1;

/// Where the rings of the queue for requests are: descriptors, available chains, used chains. Queue 0 has the same elsewhere.
pub const RINGS: [u64; 3] = [0, 0x1000, 0x2000];
const OTHER_RINGS: [u64; 3] = [0x3000, 0x4000, 0x5000];

/// Where a request and its answer are, with room for 256 KiB each.
pub const REQUEST: u64 = 0x1_0000;
/// See [`REQUEST`].
pub const ANSWER: u64 = 0x8_0000;

/// Flags of a descriptor.
pub const NEXT: u16 = 1;
/// The device writes to it.
pub const WRITE: u16 = 2;
/// It is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Of a message: version 1, and an answer is wanted.
pub const VERSION: u32 = 1;
const NEEDS_REPLY: u32 = 8;

/// Features: virtio 1, the event index, indirect descriptors, protocol features.
pub const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;

/// Protocol features: more queues, replies, memory slots, reset.
const PROTOCOL_FEATURES: u64 = 1 | 1 << 3 | 1 << 13 | 1 << 15;

const PATIENCE: Duration = Duration::from_secs(30);

/// A descriptor: address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

/// A connection to a device, and a guest's memory.
#[derive(Debug)]
pub struct FrontEnd {
    socket: UnixStream,
    /// The guest's memory.
    pub memory: File,
    kick: EventFd,
    call: EventFd,
    /// Requests that were made so far.
    pub requests: u16,
}

fn as_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Little-endian bytes of numbers.
pub fn words(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// The message body of an entry in a list of memory regions: guest's address, length, front end's address, offset in the file.
pub fn region(guest: u64, length: u64, user: u64, offset: u64) -> Vec<u8> {
    words(&[guest, length, user, offset])
}

/// The body of a message about a queue: its index, and a number.
pub fn state(index: u32, number: u32) -> Vec<u8> {
    [index.to_le_bytes(), number.to_le_bytes()].concat()
}

impl FrontEnd {
    /// Connects to a device.
    pub fn connect(socket: &Path) -> Self {
        let memory: File = memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).expect("the host has memory").into();
        memory.set_len(MEMORY_BYTES).expect("the host has memory");
        let event = || EventFd::new(EFD_NONBLOCK).expect("there are descriptors");
        let socket = UnixStream::connect(socket).expect("it listens");
        socket.set_read_timeout(Some(stretched(PATIENCE))).expect("it is a socket");
        Self { socket, memory, kick: event(), call: event(), requests: 0 }
    }

    /// Sends bytes, and descriptors with the first of them. The device may have hung up.
    pub fn send_bytes(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) {
        let files: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let control = if files.is_empty() { vec![] } else { vec![ControlMessage::ScmRights(&files)] };
        let _ = sendmsg::<UnixAddr>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            &control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
    }

    /// Sends a message.
    pub fn send(&self, request: FrontendReq, body: &[u8], files: &[BorrowedFd<'_>]) {
        let length = u32::try_from(body.len()).expect("it is short");
        let header = [u32::from(request), VERSION | NEEDS_REPLY, length].map(u32::to_le_bytes).concat();
        self.send_bytes(&[&header, body].concat(), files);
    }

    /// Sends a message, and gives the number in the answer: 0 if the device did it, or what was asked for. Nothing if it hangs up.
    #[track_caller]
    pub fn ask(&self, request: FrontendReq, body: &[u8], files: &[BorrowedFd<'_>]) -> Option<u64> {
        self.send(request, body, files);
        let mut answer = [0; 20];
        match (&self.socket).read_exact(&mut answer) {
            Ok(()) => Some(u64::from_le_bytes(answer[12..].try_into().expect("it has 8 bytes"))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => panic!("{request:?} is never answered"),
            Err(_) => None,
        }
    }

    #[track_caller]
    fn must(&self, request: FrontendReq, body: &[u8], files: &[BorrowedFd<'_>]) {
        assert_eq!(self.ask(request, body, files), Some(0), "{request:?}");
    }

    /// Agrees on features.
    #[track_caller]
    pub fn agree(&self) {
        assert_eq!(self.ask(FrontendReq::GET_FEATURES, &[], &[]).map(|offered| offered & FEATURES), Some(FEATURES));
        let offered = self.ask(FrontendReq::GET_PROTOCOL_FEATURES, &[], &[]);
        assert_eq!(offered.map(|offered| offered & PROTOCOL_FEATURES), Some(PROTOCOL_FEATURES));
        self.send(FrontendReq::SET_PROTOCOL_FEATURES, &words(&[PROTOCOL_FEATURES]), &[]);
        let mut answer = [0; 20];
        (&self.socket).read_exact(&mut answer).expect("it is answered");
        self.must(FrontendReq::SET_OWNER, &[], &[]);
        self.must(FrontendReq::SET_FEATURES, &words(&[FEATURES]), &[]);
    }

    /// Shows the guest's memory.
    #[track_caller]
    pub fn show_memory(&self) {
        let body = [&[1, 0, 0, 0, 0, 0, 0, 0][..], &region(0, MEMORY_BYTES, USER_ADDRESS, 0)].concat();
        self.must(FrontendReq::SET_MEM_TABLE, &body, &[self.memory.as_fd()]);
    }

    /// Sets both queues up, with the rings of the queue for requests at these addresses. They aren't enabled yet.
    #[track_caller]
    pub fn set_queues_up(&self, rings: [u64; 3]) {
        for (index, rings) in [(0, OTHER_RINGS), (REQUESTS, rings)] {
            self.must(FrontendReq::SET_VRING_NUM, &state(index, QUEUE_SIZE.into()), &[]);
            self.must(FrontendReq::SET_VRING_ADDR, &addresses(index, rings), &[]);
            self.must(FrontendReq::SET_VRING_BASE, &state(index, 0), &[]);
            self.must(FrontendReq::SET_VRING_CALL, &words(&[index.into()]), &[as_fd(&self.call)]);
            let other = EventFd::new(EFD_NONBLOCK).expect("there are descriptors");
            let kick = if index == REQUESTS { as_fd(&self.kick) } else { as_fd(&other) };
            self.must(FrontendReq::SET_VRING_KICK, &words(&[index.into()]), &[kick]);
        }
    }

    /// Enables the queue for requests.
    #[track_caller]
    pub fn enable(&self) {
        self.must(FrontendReq::SET_VRING_ENABLE, &state(REQUESTS, 1), &[]);
    }

    /// Does everything that an honest front end does.
    #[track_caller]
    pub fn start(&self) {
        self.agree();
        self.show_memory();
        self.set_queues_up(RINGS);
        self.enable();
    }

    /// Writes to the guest's memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, address).expect("the host has memory");
    }

    /// Writes descriptors to the guest's memory.
    pub fn write_table(&self, address: u64, table: &[Descriptor]) {
        let bytes = |(address, length, flags, next): &Descriptor| {
            [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
        };
        self.write(address, &table.iter().flat_map(bytes).collect::<Vec<_>>());
    }

    /// Makes the chain that begins with this descriptor available.
    pub fn offer(&mut self, head: u16) {
        self.write(RINGS[1] + 4 + 2 * u64::from(self.requests % QUEUE_SIZE), &head.to_le_bytes());
        self.requests = self.requests.wrapping_add(1);
        self.announce(self.requests);
    }

    /// Says how many chains have been made available, modulo 2^16.
    pub fn announce(&self, count: u16) {
        self.write(RINGS[1] + 2, &count.to_le_bytes());
    }

    /// Notifies the device of its requests.
    pub fn kick(&self) {
        self.kick.write(1).expect("it is an event");
    }

    /// Makes a request, in one buffer, with so much room for its answer.
    pub fn request(&mut self, request: &[u8], room: u32) {
        self.write(REQUEST, request);
        let length = u32::try_from(request.len()).expect("it is short");
        let table = [(REQUEST, length, if room > 0 { NEXT } else { 0 }, 1), (ANSWER, room, WRITE, 0)];
        self.write_table(RINGS[0], &table);
        self.offer(0);
        self.kick();
    }

    /// Waits until the latest request is answered, and gives the answer. Nothing if the device hangs up.
    #[track_caller]
    pub fn answer(&self) -> Option<Vec<u8>> {
        let deadline = Instant::now() + stretched(PATIENCE);
        let mut used = [0; 2];
        loop {
            self.memory.read_exact_at(&mut used, RINGS[2] + 2).expect("it is memory");
            if u16::from_le_bytes(used) == self.requests {
                break;
            }
            if self.has_hung_up() {
                return None;
            }
            assert!(Instant::now() < deadline, "it is never answered");
            let mut call = [PollFd::new(as_fd(&self.call), PollFlags::POLLIN)];
            if poll(&mut call, PollTimeout::from(20_u8)).expect("it is an event") > 0 {
                self.call.read().expect("it is an event");
            }
        }
        let entry = RINGS[2] + 4 + 8 * u64::from(self.requests.wrapping_sub(1) % QUEUE_SIZE);
        let mut length = [0; 4];
        self.memory.read_exact_at(&mut length, entry + 4).expect("it is memory");
        let mut answer = vec![0; u32::from_le_bytes(length) as usize];
        self.memory.read_exact_at(&mut answer, ANSWER).expect("the answer is in its room");
        Some(answer)
    }

    /// Whether the device has closed the connection. Unread answers are dropped.
    pub fn has_hung_up(&self) -> bool {
        let mut socket = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        while poll(&mut socket, PollTimeout::ZERO).expect("it is a socket") > 0 {
            match (&self.socket).read(&mut [0; 512]) {
                Ok(1..) => {}
                Ok(0) | Err(_) => return true,
            }
        }
        false
    }

    /// Waits until the device has closed the connection.
    #[track_caller]
    pub fn wait_for_the_end(&self) {
        let deadline = Instant::now() + stretched(PATIENCE);
        while !self.has_hung_up() {
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Hangs up.
    pub fn hang_up(&mut self) {
        let _ = self.socket.flush();
        self.socket.shutdown(std::net::Shutdown::Write).expect("it is a socket");
    }
}

/// The body of the message with the addresses of a queue's rings.
pub fn addresses(index: u32, [descriptors, available, used]: [u64; 3]) -> Vec<u8> {
    let user = |address: u64| USER_ADDRESS.wrapping_add(address);
    [&state(index, 0)[..], &words(&[user(descriptors), user(used), user(available), 0])].concat()
}

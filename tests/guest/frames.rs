//! Frames that no guest's kernel sends, straight to the network device.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, FromRawFd},
    thread,
    time::Duration,
};

unsafe extern "C" {
    fn socket(family: i32, kind: i32, protocol: i32) -> i32;
    fn bind(socket: i32, address: *const Link, length: u32) -> i32;
    fn ioctl(socket: i32, request: u64, argument: *mut Interface) -> i32;
}

const AF_PACKET: i32 = 17;
const SOCK_RAW: i32 = 3;
const ALL_PROTOCOLS: u16 = 3_u16.to_be();

/// Linux's numbers for an interface's index and flags, and two flags: it is up, and asks nobody for Ethernet addresses.
const GET_INDEX: u64 = 0x8933;
const SET_FLAGS: u64 = 0x8914;
const UP_WITHOUT_ARP: i32 = 0x81;

/// Linux's `struct sockaddr_ll`.
#[repr(C)]
struct Link {
    family: u16,
    protocol: u16,
    index: i32,
    rest: [u8; 12],
}

/// Linux's `struct ifreq`.
#[repr(C)]
struct Interface {
    name: [u8; 16],
    value: i32,
    rest: [u8; 20],
}

const GUEST: [u8; 4] = [192, 0, 0, 2];
const GATEWAY: [u8; 4] = [192, 0, 0, 1];

/// An address that is allowed at port 80 and 8080, and one that isn't allowed.
const GOOD: [u8; 4] = [93, 184, 215, 14];
const PRIVATE: [u8; 4] = [10, 0, 0, 5];

const TCP: u8 = 6;
const UDP: u8 = 17;
const SYN: u8 = 2;
const RST: u8 = 4;

/// The interface, with everything that goes over it; nothing if there is none.
fn interface() -> Option<File> {
    // SAFETY: numbers, and structures that outlive the calls; the new descriptor has no other owner.
    unsafe {
        let descriptor = socket(AF_PACKET, SOCK_RAW, ALL_PROTOCOLS.into());
        assert!(descriptor >= 0, "no packets: {}", io::Error::last_os_error());
        let file = File::from_raw_fd(descriptor);
        let mut request = Interface { name: *b"eth0\0\0\0\0\0\0\0\0\0\0\0\0", value: 0, rest: [0; 20] };
        if ioctl(descriptor, GET_INDEX, &raw mut request) != 0 {
            return None;
        }
        let index = request.value;
        request.value = UP_WITHOUT_ARP;
        assert_eq!(ioctl(descriptor, SET_FLAGS, &raw mut request), 0, "eth0: {}", io::Error::last_os_error());
        let link = Link { family: AF_PACKET as u16, protocol: ALL_PROTOCOLS, index, rest: [0; 12] };
        assert_eq!(bind(file.as_raw_fd(), &raw const link, 20), 0, "eth0: {}", io::Error::last_os_error());
        Some(file)
    }
}

fn ipv4(protocol: u8, to: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let length = (20 + payload.len() as u16).to_be_bytes();
    let ethernet = [&[2, 0x63, 0x6f, 0x66, 0, 1, 2, 0x63, 0x6f, 0x66, 0, 2][..], &[8, 0]].concat();
    let header = [0x45, 0, length[0], length[1], 0, 0, 0, 0, 64, protocol, 0, 0];
    [&ethernet[..], &header, &GUEST, &to, payload].concat()
}

fn tcp(to: [u8; 4], (from_port, to_port): (u16, u16), flags: u8) -> Vec<u8> {
    // A reset is the next after the beginning.
    let sequence = u8::from(flags == RST);
    let ports = [from_port, to_port].map(u16::to_be_bytes).concat();
    let rest = [0, 0, 0, sequence, 0, 0, 0, 0, 0x50, flags, 4, 0, 0, 0, 0, 0];
    ipv4(TCP, to, &[&ports[..], &rest].concat())
}

/// A DNS query over UDP for a name that is allowed, or that isn't.
fn query(from_port: u16, is_allowed: bool) -> Vec<u8> {
    let name: &[u8] = if is_allowed { b"\x04good\x07example\0" } else { b"\x04evil\x07example\0" };
    let message = [&from_port.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0], name, &[0, 1, 0, 1]].concat();
    let header = [from_port, 53, 8 + message.len() as u16, 0].map(u16::to_be_bytes).concat();
    ipv4(UDP, GATEWAY, &[header, message].concat())
}

/// A frame with anything in it, of which the beginning may be right.
fn noise(number: u32) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    let good = tcp(GOOD, (number as u16 | 1, 80), SYN);
    let length = 14 + next() as usize % 1500;
    let mut frame: Vec<u8> = (0..length).map(|_| next() as u8).collect();
    let right = (next() as usize % (good.len() + 1)).min(length);
    frame[..right].copy_from_slice(&good[..right]);
    frame
}

/// Sends a frame. The kernel has no room for more as long as the device doesn't take them.
fn send(link: &mut File, frame: &[u8]) {
    while link.write(frame).is_err() {
        thread::yield_now();
    }
}

/// Asks for a name and for a connection, both of which are allowed. Returns the number of bytes of the two answers, and nothing in
/// a machine without an interface.
pub fn ask() -> Option<usize> {
    let mut link = interface()?;
    send(&mut link, &query(1000, true));
    send(&mut link, &tcp(GOOD, (1000, 80), SYN));
    let (mut frame, mut bytes, mut protocols) = ([0; 2048], 0, [UDP, TCP].to_vec());
    while !protocols.is_empty() {
        let length = link.read(&mut frame).unwrap();
        // This is the protocol of IPv4.
        let protocol = frame[23];
        if protocols.contains(&protocol) {
            protocols.retain(|other| *other != protocol);
            bytes += length;
        }
    }
    Some(bytes)
}

/// Connections, queries and noise, none of which the guest goes on with; then requests for a connection as an honest guest sends
/// them.
pub fn flood() {
    let mut link = interface().expect("the build has a network");
    for number in 1..=50_000 {
        send(&mut link, &tcp(GOOD, (number, 80), SYN));
        send(&mut link, &tcp(PRIVATE, (number, 80), SYN));
    }
    for number in 1..=20_000 {
        send(&mut link, &query(number, number % 2 == 0));
        send(&mut link, &tcp(GATEWAY, (number, 53), SYN));
    }
    for number in 0..20_000 {
        send(&mut link, &noise(number));
    }
    for number in 1..=50_000 {
        send(&mut link, &tcp(GOOD, (number, 80), RST));
    }
    for number in 60_000..u16::MAX {
        send(&mut link, &tcp(GOOD, (number, 8080), SYN));
        thread::sleep(Duration::from_millis(100));
    }
}

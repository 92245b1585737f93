//! A static program that runs in guests, for tests that a shell can't do.

use std::{
    env, fs, io,
    os::{fd::AsRawFd, unix::net::UnixListener},
    process,
};

unsafe extern "C" {
    fn syscall(number: i64, ...) -> i64;
}

const MMAP: i64 = 9;
const IOCTL: i64 = 16;
const SOCKET: i64 = 41;
const IO_URING_SETUP: i64 = 425;

const AF_INET: i64 = 2;
const AF_VSOCK: i64 = 40;
const SOCK_STREAM: i64 = 1;
const SOCK_DGRAM: i64 = 2;
const SOCK_SEQPACKET: i64 = 5;

const ENOSYS: i32 = 38;
const EAFNOSUPPORT: i32 = 97;

/// The error of a system call with these arguments, if it fails.
fn refusal(number: i64, arguments: [i64; 3]) -> Option<i32> {
    let [first, second, third] = arguments;
    // SAFETY: every pointer among the arguments is null, which the kernel answers with EFAULT.
    let result = unsafe { syscall(number, first, second, third) };
    (result < 0).then(|| io::Error::last_os_error().raw_os_error().unwrap())
}

/// A system call that must succeed.
///
/// # Safety
///
/// As the call itself says.
unsafe fn call(number: i64, arguments: [i64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the caller's.
    let result = unsafe { syscall(number, a, b, c, d, e, f) };
    assert!(result >= 0, "system call {number}: {}", io::Error::last_os_error());
    result
}

const KVM_CREATE_VM: i64 = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: i64 = 0xae04;
const KVM_CREATE_VCPU: i64 = 0xae41;
const KVM_SET_USER_MEMORY_REGION: i64 = 0x4020_ae46;
const KVM_RUN: i64 = 0xae80;
const KVM_SET_REGS: i64 = 0x4090_ae82;
const KVM_GET_SREGS: i64 = 0x8138_ae83;
const KVM_SET_SREGS: i64 = 0x4138_ae84;
const KVM_EXIT_IO: u32 = 2;

/// `mov al, 42; out 16, al`
const GUEST: [u8; 4] = [0xb0, 42, 0xe6, 16];
const GUEST_AT: u64 = 0x1000;

/// Runs a VM with two instructions, and returns the byte that it writes to a port.
fn run_in_kvm() -> u8 {
    let map = |fd: i64, length: i64, flags: i64| {
        // SAFETY: a new mapping, at a place of the kernel's choice.
        unsafe { call(MMAP, [0, length, 3, flags, fd, 0]) as *mut u8 }
    };
    // SAFETY: `argument` is a number, or leads to as many bytes as the request's number says.
    let ioctl = |fd: i64, request: i64, argument: i64| unsafe { call(IOCTL, [fd, request, argument, 0, 0, 0]) };
    let device = fs::File::options().read(true).write(true).open("/dev/kvm").unwrap();
    let kvm = device.as_raw_fd().into();
    let machine = ioctl(kvm, KVM_CREATE_VM, 0);
    let memory = map(-1, 4096, 0x22);
    // SAFETY: the mapping has a page.
    unsafe { memory.copy_from_nonoverlapping(GUEST.as_ptr(), GUEST.len()) };
    let region: [u64; 4] = [0, GUEST_AT, 4096, memory as u64];
    ioctl(machine, KVM_SET_USER_MEMORY_REGION, region.as_ptr() as i64);
    let processor = ioctl(machine, KVM_CREATE_VCPU, 0);
    let run = map(processor, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), 1);
    let mut segments = [0_u64; 39];
    ioctl(processor, KVM_GET_SREGS, segments.as_mut_ptr() as i64);
    // The code segment: its base, and its selector beside its limit.
    segments[0] = 0;
    segments[1] &= 0xffff_0000_ffff_ffff;
    ioctl(processor, KVM_SET_SREGS, segments.as_ptr() as i64);
    let mut registers = [0_u64; 18];
    (registers[16], registers[17]) = (GUEST_AT, 2);
    ioctl(processor, KVM_SET_REGS, registers.as_ptr() as i64);
    ioctl(processor, KVM_RUN, 0);
    // SAFETY: the reason is there, and as aligned as this.
    let reason = unsafe { run.add(8).cast::<u32>().read() };
    assert_eq!(reason, KVM_EXIT_IO, "it ended for another reason");
    // SAFETY: where the data is, is there.
    let offset = unsafe { run.add(40).cast::<u64>().read() };
    // SAFETY: and so is the data.
    unsafe { run.add(offset as usize).read() }
}

fn main() {
    let arguments: Vec<String> = env::args().collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "copy", from, to] => fs::write(to, fs::read(from).unwrap()).unwrap(),
        [_, "socket", path] => drop(UnixListener::bind(path).unwrap()),
        // Neither the socket that reaches the host nor the way to open one past the filter.
        [_, "vsock"] => {
            assert_eq!(refusal(SOCKET, [AF_INET, SOCK_STREAM, 0]), None, "no sockets work here");
            for kind in [SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET] {
                assert_eq!(refusal(SOCKET, [AF_VSOCK, kind, 0]), Some(EAFNOSUPPORT), "a vsock socket of kind {kind}");
            }
            assert_eq!(refusal(IO_URING_SETUP, [1, 0, 0]), Some(ENOSYS), "io_uring");
        }
        [_, "kvm"] => assert_eq!(run_in_kvm(), 42),
        _ => {
            eprintln!("probe: {arguments:?} means nothing");
            process::exit(64);
        }
    }
}

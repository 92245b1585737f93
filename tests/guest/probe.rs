//! A static program for the inside of guests: does what their shell can't.

use std::{env, fs, io, os::unix::net::UnixListener, process};

unsafe extern "C" {
    fn syscall(number: i64, ...) -> i64;
}

const SOCKET: i64 = 41;
const IO_URING_SETUP: i64 = 425;

const AF_INET: i64 = 2;
const AF_VSOCK: i64 = 40;
const SOCK_STREAM: i64 = 1;
const SOCK_DGRAM: i64 = 2;
const SOCK_SEQPACKET: i64 = 5;

const ENOSYS: i32 = 38;
const EAFNOSUPPORT: i32 = 97;

/// The error that a system call with these arguments ends with, if it does.
fn refusal(number: i64, arguments: [i64; 3]) -> Option<i32> {
    let [first, second, third] = arguments;
    // SAFETY: every pointer among the arguments is null, which the kernel answers with EFAULT.
    let result = unsafe { syscall(number, first, second, third) };
    (result < 0).then(|| io::Error::last_os_error().raw_os_error().unwrap())
}

fn main() {
    let arguments: Vec<String> = env::args().collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "copy", from, to] => fs::write(to, fs::read(from).unwrap()).unwrap(),
        [_, "socket", path] => drop(UnixListener::bind(path).unwrap()),
        // Neither the socket that reaches the host nor the way to open one past the filter.
        [_, "vsock"] => {
            assert_eq!(refusal(SOCKET, [AF_INET, SOCK_STREAM, 0]), None, "no socket at all can be had here");
            for kind in [SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET] {
                assert_eq!(refusal(SOCKET, [AF_VSOCK, kind, 0]), Some(EAFNOSUPPORT), "a vsock socket of kind {kind}");
            }
            assert_eq!(refusal(IO_URING_SETUP, [1, 0, 0]), Some(ENOSYS), "io_uring");
        }
        _ => {
            eprintln!("probe: {arguments:?} means nothing");
            process::exit(64);
        }
    }
}

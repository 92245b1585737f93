//! Connections over vsock.

use std::{
    fs::File,
    io,
    mem::size_of,
    os::fd::{AsRawFd as _, FromRawFd as _},
};

/// Linux's `struct sockaddr_vm`.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    rest: u32,
}

unsafe extern "C" {
    fn socket(family: i32, kind: i32, protocol: i32) -> i32;
    fn connect(socket: i32, address: *const Address, length: u32) -> i32;
}

const AF_VSOCK: u16 = 40;
const SOCK_STREAM: i32 = 1;

/// The host's number.
pub const HOST: u32 = 2;

pub fn dial(cid: u32, port: u32) -> io::Result<File> {
    let address = Address { family: AF_VSOCK, reserved: 0, port, cid, rest: 0 };
    // SAFETY: three numbers; the returned descriptor is new and has no other owner.
    let stream = unsafe {
        let descriptor = socket(AF_VSOCK.into(), SOCK_STREAM, 0);
        assert!(descriptor >= 0, "no vsock: {}", io::Error::last_os_error());
        File::from_raw_fd(descriptor)
    };
    // SAFETY: an address that outlives the call, and its length.
    match unsafe { connect(stream.as_raw_fd(), &address, size_of::<Address>() as u32) } {
        0 => Ok(stream),
        _ => Err(io::Error::last_os_error()),
    }
}

//! The seccomp filter of the build's processes: it keeps them from connecting to the host.

use libc::{
    AF_VSOCK, BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, EAFNOSUPPORT, ENOSYS,
    SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SYS_io_uring_setup, SYS_socket, sock_filter,
};

// Offsets in struct seccomp_data.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;

// From linux/audit.h.
const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;

// System call numbers of i386.
const I386_SOCKETCALL: u32 = 102;
const I386_SOCKET: u32 = 359;

/// Set in the system call numbers of x32.
const X32_BIT: u32 = 0x4000_0000;

/// Refuses vsock sockets, because network namespaces don't confine them.
///
/// It also refuses io_uring, which can open sockets without a system call, and `socketcall` of i386, whose arguments
/// are in memory where a filter can't read them.
pub(crate) fn filter() -> Vec<sock_filter> {
    let io_uring_setup = SYS_io_uring_setup as u32;
    let socket = SYS_socket as u32;
    vec![
        /*  0 */ load(ARCHITECTURE),
        /*  1 */ equal(X86_64, 2, 0),
        /*  2 */ equal(I386, 5, 0),
        /*  3 */ refuse(ENOSYS),
        /*  4 */ load(NUMBER),
        /*  5 */ instruction(BPF_ALU | BPF_AND | BPF_K, 0, 0, !X32_BIT),
        /*  6 */ equal(socket, 5, 0),
        /*  7 */ equal(io_uring_setup, 7, 6),
        /*  8 */ load(NUMBER),
        /*  9 */ equal(I386_SOCKET, 2, 0),
        /* 10 */ equal(I386_SOCKETCALL, 4, 0),
        /* 11 */ equal(io_uring_setup, 3, 2),
        /* 12 */ load(FIRST_ARGUMENT),
        /* 13 */ equal(AF_VSOCK.cast_unsigned(), 2, 0),
        /* 14 */ instruction(BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW),
        /* 15 */ refuse(ENOSYS),
        /* 16 */ refuse(EAFNOSUPPORT),
    ]
}

fn load(offset: u32) -> sock_filter {
    instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, offset)
}

/// Skips `then` instructions if the accumulator equals `value`, or `otherwise` instructions if not.
fn equal(value: u32, then: u8, otherwise: u8) -> sock_filter {
    instruction(BPF_JMP | BPF_JEQ | BPF_K, then, otherwise, value)
}

fn refuse(errno: i32) -> sock_filter {
    instruction(BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ERRNO | errno.cast_unsigned())
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Interprets the filter as the kernel does.
    fn verdict(architecture: u32, number: u32, first_argument: u32) -> u32 {
        let program = filter();
        let (mut accumulator, mut at) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match u32::from(code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    accumulator = match k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        FIRST_ARGUMENT => first_argument,
                        _ => panic!("offset {k}"),
                    }
                }
                code if code == BPF_ALU | BPF_AND | BPF_K => accumulator &= k,
                code if code == BPF_JMP | BPF_JEQ | BPF_K => {
                    at += usize::from(if accumulator == k { jt } else { jf });
                }
                code if code == BPF_RET | BPF_K => return k,
                code => panic!("code {code}"),
            }
        }
    }

    fn errno(errno: i32) -> u32 {
        SECCOMP_RET_ERRNO | errno.cast_unsigned()
    }

    #[test]
    fn vsock_is_refused_in_every_calling_convention() {
        for (architecture, number) in [(X86_64, 41), (X86_64, 41 | X32_BIT), (I386, I386_SOCKET)] {
            assert_eq!(verdict(architecture, number, 40), errno(EAFNOSUPPORT));
            for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6] {
                assert_eq!(verdict(architecture, number, family.cast_unsigned()), SECCOMP_RET_ALLOW);
            }
        }
    }

    #[test]
    fn other_ways_to_open_a_socket_are_refused() {
        for (architecture, number) in
            [(X86_64, 425), (X86_64, 425 | X32_BIT), (I386, 425), (I386, I386_SOCKETCALL), (0xc000_00b7, 198)]
        {
            assert_eq!(verdict(architecture, number, 0), errno(ENOSYS));
        }
    }

    #[test]
    fn other_calls_are_allowed_with_any_arguments() {
        for number in (0..500).filter(|number| ![41, 425].contains(number)) {
            assert_eq!(verdict(X86_64, number, 40), SECCOMP_RET_ALLOW);
        }
    }
}

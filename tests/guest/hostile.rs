//! The first program of guests that misbehave, each in the way that `/job` names.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    mem::size_of,
    os::fd::FromRawFd,
    thread,
    time::Duration,
};

mod modules;

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
    fn reboot(how: i32) -> i32;
}

const AF_VSOCK: u16 = 40;
const SOCK_STREAM: i32 = 1;
const RESTART: i32 = 0x0123_4567;

/// Where the host listens.
const HOST: u32 = 2;
const PORT: u32 = 17_222;

/// The first byte of messages, and their parts that are numbers, as postcard writes small ones.
const HELLO: [u8; 3] = [0, 2, 0];
const SETUP_FAILED: u8 = 1;
const SCRATCH: u8 = 0;
const LOG_TO_STDOUT: [u8; 2] = [2, 0];
/// Status 1; no memory, disk or processes lacking; nothing used.
const EXITED_WITH_1: [u8; 11] = [3, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
const KEPT: [u8; 2] = [9, 0];
const OUTPUT: [u8; 3] = [10, 1, b'x'];
const SHELL_ENDED: [u8; 1] = [11];
const SAMPLE: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 0];

fn dial(cid: u32, port: u32) -> io::Result<File> {
    let address = Address { family: AF_VSOCK, reserved: 0, port, cid, rest: 0 };
    // SAFETY: three numbers; the descriptor that comes back is new and nobody else's.
    let stream = unsafe {
        let descriptor = socket(AF_VSOCK.into(), SOCK_STREAM, 0);
        assert!(descriptor >= 0, "no vsock: {}", io::Error::last_os_error());
        (File::from_raw_fd(descriptor), descriptor)
    };
    // SAFETY: an address that outlives the call, and its length.
    match unsafe { connect(stream.1, &address, size_of::<Address>() as u32) } {
        0 => Ok(stream.0),
        _ => Err(io::Error::last_os_error()),
    }
}

fn frame(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u32).to_le_bytes(), message].concat()
}

fn varint(mut number: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// The one connection that the host accepts, however busy it is.
fn connection() -> File {
    loop {
        match dial(HOST, PORT) {
            Ok(stream) => return stream,
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// A connection whose build has begun.
fn begun() -> File {
    let mut stream = connection();
    stream.write_all(&frame(&HELLO)).unwrap();
    // The specification's first byte.
    stream.read_exact(&mut [0]).unwrap();
    stream
}

/// The last message: the host shows its text.
fn setup_failed(stream: &mut File, text: &str) {
    let message = [&[SETUP_FAILED, SCRATCH][..], &varint(text.len()), text.as_bytes()].concat();
    stream.write_all(&frame(&message)).unwrap();
}

fn reset() {
    // SAFETY: a number.
    unsafe { reboot(RESTART) };
}

/// What became of dialling everything that isn't this build's.
fn trespass(stream: &mut File) {
    let mut reached = Vec::new();
    for (cid, port) in [(HOST, PORT + 1), (HOST, PORT - 1), (HOST, 1), (HOST, 22), (0, PORT), (4, PORT), (HOST, PORT)] {
        if dial(cid, port).is_ok() {
            reached.push(format!("{cid}:{port}"));
        }
    }
    setup_failed(stream, &format!("reached beside the host: {reached:?}"));
}

/// Many frames at a time, so that each write needs many packets.
fn write_much(stream: &mut File) {
    let contents = [b'x'; 20_000];
    let message = [&LOG_TO_STDOUT[..], &varint(contents.len()), &contents].concat();
    stream.write_all(&frame(&message).repeat(100)).unwrap();
    setup_failed(stream, "wrote much at a time");
}

/// A failed build, and then something that nobody has asked for.
fn failed_and(message: &[u8]) {
    let mut stream = begun();
    stream.write_all(&[frame(&EXITED_WITH_1), frame(message)].concat()).unwrap();
    // The host has it when it hangs up.
    let _ = io::copy(&mut stream, &mut io::sink());
}

fn flood_samples(stream: &mut File) {
    let samples = frame(&SAMPLE).repeat(1000);
    for _ in 0..500 {
        stream.write_all(&samples).unwrap();
    }
    setup_failed(stream, "half a million samples later");
}

fn flood_console() {
    let mut console = File::options().write(true).open("/dev/console").unwrap();
    loop {
        console.write_all(&[b'#'; 4096]).unwrap();
    }
}

fn main() {
    modules::load();
    match fs::read_to_string("/job").unwrap().as_str() {
        "never dial" => (),
        "reset" => reset(),
        "reset when begun" => {
            let _stream = begun();
            reset();
        }
        "hang up" => drop(connection()),
        "hang up when begun" => drop(begun()),
        "never stop" => {
            let _stream = begun();
            loop {
                thread::park();
            }
        }
        "trespass" => trespass(&mut begun()),
        "write much" => write_much(&mut begun()),
        "flood the console" => flood_console(),
        "flood samples" => flood_samples(&mut begun()),
        "sample at once" => connection().write_all(&frame(&SAMPLE)).unwrap(),
        "keep at once" => begun().write_all(&frame(&KEPT)).unwrap(),
        "output at once" => begun().write_all(&frame(&OUTPUT)).unwrap(),
        "end a shell at once" => begun().write_all(&frame(&SHELL_ENDED)).unwrap(),
        "fail and output" => failed_and(&OUTPUT),
        job => panic!("no such job: {job}"),
    }
    loop {
        thread::park();
    }
}

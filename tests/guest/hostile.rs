//! The init of hostile guests. The file `/job` names the misbehaviour.

use std::{
    ffi::{CString, c_char},
    fs::{self, File, Permissions},
    io::{self, Read, Write},
    os::{
        unix::{
            process::CommandExt as _,
            fs::{PermissionsExt, chown, symlink},
            net::UnixListener,
        },
    },
    process::Command,
    ptr, thread,
    time::{Duration, SystemTime},
};

mod frames;
mod modules;
mod vsock;

use vsock::{HOST, dial};

unsafe extern "C" {
    fn reboot(how: i32) -> i32;
    fn clock_settime(clock: i32, time: *const [i64; 2]) -> i32;
    fn mount(source: *const c_char, at: *const c_char, kind: *const c_char, flags: u64, data: *const c_char) -> i32;
    fn mknod(path: *const c_char, mode: u32, device: u64) -> i32;
    fn setxattr(path: *const c_char, name: *const c_char, value: *const u8, length: usize, flags: i32) -> i32;
}

const RESTART: i32 = 0x0123_4567;

/// The port on which the host listens.
const PORT: u32 = 17_222;

/// The first byte of each message. postcard writes small numbers as one byte.
const HELLO: [u8; 3] = [0, 5, 0];
const SETUP_FAILED: u8 = 1;
const SCRATCH: u8 = 0;
const LOG: [u8; 1] = [2];
/// A report: status 1, no lack of memory, disk or processes, and no resource usage.
const EXITED_WITH_1: [u8; 11] = [3, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
const KEPT: [u8; 2] = [9, 0];
const OUTPUT: [u8; 3] = [10, 1, b'x'];
const SHELL_ENDED: [u8; 1] = [11];
/// The host's message to a guest that has waited for its request.
const PING: u8 = 7;
/// The answer to it.
const PONG: [u8; 1] = [12];
const SAMPLE: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 0];

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

/// The one connection that the host accepts. Tries until the host is ready.
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

/// A connection on which the host has been greeted, and the first byte of what it says then.
fn greeted() -> (File, u8) {
    let mut stream = connection();
    stream.write_all(&frame(&HELLO)).unwrap();
    let mut begin = [0; 5];
    stream.read_exact(&mut begin).unwrap();
    (stream, begin[4])
}

/// Greets the host, and behaves well if it sends the specification. In a machine that boots for the stock, it misbehaves after
/// the first ping, or when it is pinged again.
fn in_stock(unasked: &[u8], answer: impl FnOnce(&mut File)) {
    let (mut stream, first) = greeted();
    if first != PING {
        return setup_failed(&mut stream, "booted for its request");
    }
    stream.write_all(&[frame(&PONG), unasked.to_vec()].concat()).unwrap();
    stream.read_exact(&mut [0; 5]).unwrap();
    answer(&mut stream);
}

/// Uses the network as soon as there is nothing else to do: in a machine that boots for the stock, before there is a build.
fn use_the_network() {
    let (mut stream, first) = greeted();
    let when = if first == PING {
        stream.write_all(&frame(&PONG)).unwrap();
        "in stock"
    } else {
        "in a build"
    };
    if let Some(bytes) = frames::ask() {
        setup_failed(&mut stream, &format!("{when} the network gave {bytes} bytes"));
    }
}

/// Has the machine's clock wrong, and goes on as the real init.
fn lose_the_clock() {
    // SAFETY: a clock, and two numbers that outlive the call.
    assert_eq!(unsafe { clock_settime(0, &[1_000_000_000, 0]) }, 0);
    panic!("the real init can't be run: {}", Command::new("/real-init").exec());
}

/// Sends a last message. The host shows its text.
fn setup_failed(stream: &mut File, text: &str) {
    let message = [&[SETUP_FAILED, SCRATCH][..], &varint(text.len()), text.as_bytes()].concat();
    stream.write_all(&frame(&message)).unwrap();
}

fn reset() {
    // SAFETY: a number.
    unsafe { reboot(RESTART) };
}

/// Dials all other ports and peers, and returns the results.
fn trespass(stream: &mut File) {
    let mut reached = Vec::new();
    for (cid, port) in [(HOST, PORT + 1), (HOST, PORT - 1), (HOST, 1), (HOST, 22), (0, PORT), (4, PORT), (HOST, PORT)] {
        if dial(cid, port).is_ok() {
            reached.push(format!("{cid}:{port}"));
        }
    }
    setup_failed(stream, &format!("reached beside the host: {reached:?}"));
}

fn zero(code: i32) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Mounts the device with the host's paths, which are shown by number.
fn mount_paths() {
    fs::create_dir("/paths").unwrap();
    // SAFETY: strings that outlive the call.
    let mounted = unsafe { mount(c"paths".as_ptr(), c"/paths".as_ptr(), c"virtiofs".as_ptr(), 0, ptr::null()) };
    zero(mounted).unwrap();
}

/// In a machine that boots for the stock, looks for paths of the host before there is a build, and says in the build what came of it.
fn look_at_paths_in_stock() {
    let (mut stream, first) = greeted();
    if first != PING {
        return setup_failed(&mut stream, "booted for its request");
    }
    let looking = thread::spawn(|| {
        mount_paths();
        [0, 1].map(|number| fs::read_to_string(format!("/paths/{number}")).unwrap_or_else(|error| error.to_string()))
    });
    stream.write_all(&frame(&PONG)).unwrap();
    stream.read_exact(&mut [0; 5]).unwrap();
    let was_answered = looking.is_finished();
    stream.write_all(&frame(&PONG)).unwrap();
    stream.read_exact(&mut [0]).unwrap();
    let [first, second] = looking.join().unwrap();
    setup_failed(&mut stream, &format!("answered in stock: {was_answered}; 0: {first}; 1: {second}"));
}

/// Tries each operation that the kernel can send to the device with the host's paths, and returns the results.
fn use_paths(stream: &mut File) {
    mount_paths();
    let path = |path: &str| CString::new(format!("/paths/0/{path}")).unwrap();
    let known = fs::read("/paths/0/sub/file").unwrap();
    let (old, new) = ("/paths/0/sub/file", "/paths/0/new");
    let tried: [(&str, io::Result<()>); 20] = [
        ("list the root", fs::read_dir("/paths").map(drop)),
        ("look up another number", fs::metadata("/paths/1").map(drop)),
        ("look up a name", fs::metadata("/paths/etc").map(drop)),
        ("read what is private", fs::read("/paths/0/private").map(drop)),
        ("write", fs::write(old, "changed")),
        ("append", File::options().append(true).open(old).map(drop)),
        ("truncate", File::options().write(true).truncate(true).open(old).map(drop)),
        ("create", fs::write(new, "new")),
        ("remove", fs::remove_file(old)),
        ("make a directory", fs::create_dir(new)),
        ("remove a directory", fs::remove_dir("/paths/0/sub")),
        ("rename", fs::rename(old, new)),
        ("link", fs::hard_link(old, new)),
        ("make a symlink", symlink("sub", new)),
        ("change permissions", fs::set_permissions(old, Permissions::from_mode(0o777))),
        ("change the owner", chown(old, Some(1), Some(1))),
        ("change times", File::open(old).and_then(|file| file.set_modified(SystemTime::UNIX_EPOCH))),
        ("make a device", zero(unsafe { mknod(path("new").as_ptr(), 0o020_666, 0x0103) })),
        ("make a socket", UnixListener::bind(new).map(drop)),
        ("set an attribute", {
            zero(unsafe { setxattr(path("sub/file").as_ptr(), c"user.a".as_ptr(), b"b".as_ptr(), 1, 0) })
        }),
    ];
    let succeeded: Vec<_> = tried.into_iter().filter_map(|(name, result)| result.ok().map(|()| name)).collect();
    setup_failed(stream, &format!("sub/file has {} bytes; succeeded beside: {succeeded:?}", known.len()));
}

/// Writes many frames at a time, so that each write needs many packets.
fn write_much(stream: &mut File) {
    let contents = [b'x'; 20_000];
    let message = [&LOG[..], &varint(contents.len()), &contents].concat();
    stream.write_all(&frame(&message).repeat(100)).unwrap();
    setup_failed(stream, "wrote much at a time");
}

/// Reports a failed build, and then sends an unrequested message.
fn failed_and(message: &[u8]) {
    let mut stream = begun();
    stream.write_all(&[frame(&EXITED_WITH_1), frame(message)].concat()).unwrap();
    // The host hangs up when it has read the message.
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
        "speak in stock" => in_stock(&frame(&SAMPLE), |_| ()),
        "hang in stock" => in_stock(&[], |_| ()),
        "lie in stock" => in_stock(&[], |stream| stream.write_all(&frame(&SAMPLE)).unwrap()),
        "look at paths in stock" => look_at_paths_in_stock(),
        "use the network in stock" => use_the_network(),
        "lose the clock" => lose_the_clock(),
        "trespass" => trespass(&mut begun()),
        "use paths" => use_paths(&mut begun()),
        "flood the network" => {
            let _stream = begun();
            frames::flood();
        },
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

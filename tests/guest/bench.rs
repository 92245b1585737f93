//! The init of the benchmarks' guests. The kernel's command line has its job:
//!
//! - `job=off`: power off at once.
//! - `job=echo:PORT`: send bytes to this port of the host, print the mean nanoseconds until they come back, power off.
//! - `job=read:A,B`: mount the virtiofs devices A and B, read all files of each, print the times, power off.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Read, Write as _},
    path::Path,
    time::Instant,
};

mod modules;
mod vsock;

unsafe extern "C" {
    fn mount(from: *const i8, to: *const i8, kind: *const i8, flags: u64, data: *const i8) -> i32;
    fn reboot(how: i32) -> i32;
}

const ROUNDS: u32 = 5;
const ECHOES: u32 = 1000;

const POWER_OFF: i32 = 0x4321_fedc;

fn attach(tag: &str, to: &str, kind: &str) {
    fs::create_dir_all(to).unwrap();
    let [from, at, kind] = [tag, to, kind].map(|text| CString::new(text).unwrap());
    // SAFETY: three strings that end with NUL and outlive the call.
    let done = unsafe { mount(from.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    assert_eq!(done, 0, "{to}: {}", io::Error::last_os_error());
}

fn read_all(directory: &Path, buffer: &mut [u8]) -> (u64, u64) {
    let (mut files, mut bytes) = (0, 0);
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            let below = read_all(&entry.path(), buffer);
            (files, bytes) = (files + below.0, bytes + below.1);
        } else {
            let mut file = File::open(entry.path()).unwrap();
            loop {
                match file.read(buffer).unwrap() {
                    0 => break,
                    read => bytes += read as u64,
                }
            }
            files += 1;
        }
    }
    (files, bytes)
}

fn echo(port: u32) {
    let mut host = vsock::dial(vsock::HOST, port).unwrap();
    for _ in 0..ROUNDS {
        // The clock may be too coarse for a single one.
        let start = Instant::now();
        for _ in 0..ECHOES {
            host.write_all(b"x").unwrap();
            host.read_exact(&mut [0]).unwrap();
        }
        println!("echo {}", (start.elapsed() / ECHOES).as_nanos());
    }
}

fn main() {
    attach("proc", "/proc", "proc");
    let command_line = fs::read_to_string("/proc/cmdline").unwrap();
    let job = command_line.split_whitespace().find_map(|word| word.strip_prefix("job=")).unwrap_or("off");
    if let Some(tags) = job.strip_prefix("read:") {
        modules::load();
        let mut buffer = vec![0; 128 * 1024];
        for tag in tags.split(',') {
            let directory = format!("/{tag}");
            attach(tag, &directory, "virtiofs");
            let start = Instant::now();
            let (files, bytes) = read_all(directory.as_ref(), &mut buffer);
            println!("read {tag} {files} {bytes} {}", start.elapsed().as_micros());
        }
    }
    if let Some(port) = job.strip_prefix("echo:") {
        modules::load();
        echo(port.parse().unwrap());
    }
    // SAFETY: a number.
    unsafe { reboot(POWER_OFF) };
}

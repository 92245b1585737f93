//! The store over gRPC, from one process to another.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::Duration,
};

use cofferdam_tests::{Cofferdam, Outcome, Running, castore, stretched};
use nix::sys::signal::Signal;

/// Most memory that a daemon may use while it serves its store, for transfers of any size.
const MAX_PEAK_BYTES: u64 = 150 * 1024 * 1024;

const LARGE_BYTES: usize = 512 * 1024 * 1024;

/// A daemon on a socket of that name, and the flags to use its store.
fn serve(cofferdam: &Cofferdam, socket: &str) -> (Running, [String; 4]) {
    let path = cofferdam.files().join(socket);
    let daemon = cofferdam.start_command(
        ["daemon", "--allow-emulation", "--listen"].map(OsStr::new).into_iter().chain([path.as_os_str()]),
    );
    while UnixStream::connect(&path).is_err() {
        assert!(daemon.age() < stretched(Duration::from_secs(60)), "it never listens: {}", daemon.stderr_so_far());
        thread::sleep(Duration::from_millis(10));
    }
    let addr = format!("grpc+unix://{}", path.display());
    (daemon, ["--blob-service-addr".to_owned(), addr.clone(), "--directory-service-addr".to_owned(), addr])
}

fn through(cofferdam: &Cofferdam, flags: &[String; 4], arguments: &[&OsStr]) -> Outcome {
    cofferdam.command(flags.iter().map(OsStr::new).chain(arguments.iter().copied())).succeeds()
}

fn write_large(path: &Path) {
    let mut file = File::create(path).expect("the test's directory can be written");
    let mut random = File::open("/dev/urandom").expect("there is one");
    let mut piece = vec![0; 1024 * 1024];
    random.read_exact(&mut piece).expect("it never ends");
    for number in 0..LARGE_BYTES / piece.len() {
        piece[..8].copy_from_slice(&number.to_le_bytes());
        file.write_all(&piece).expect("the test's directory has room");
    }
}

#[test]
fn large_transfers_through_a_daemon_need_bounded_memory() {
    let cofferdam = Cofferdam::new();
    let tree = cofferdam.files().join("tree");
    for number in 0..300 {
        cofferdam.file(&format!("tree/many/{number}"), number.to_string());
    }
    write_large(&tree.join("large"));
    let (daemon, flags) = serve(&cofferdam, "socket");
    let imported = through(&cofferdam, &flags, &[OsStr::new("import"), tree.as_os_str()]);
    let node = imported.stdout.split_whitespace().next().unwrap();
    assert_eq!(node, castore::node_of(&tree).as_str());
    let back = cofferdam.files().join("back");
    let exported = through(&cofferdam, &flags, &[OsStr::new("export"), OsStr::new(node), back.as_os_str()]);
    assert_eq!(castore::node_of(&back).as_str(), node);
    daemon.signal(Signal::SIGTERM);
    let served = daemon.end().succeeds();
    for outcome in [&imported, &exported, &served] {
        assert!(outcome.peak_bytes < MAX_PEAK_BYTES, "{} bytes\n{outcome}", outcome.peak_bytes);
    }
    // The blobs are durable in the daemon's own store, and the daemon has removed its socket.
    cofferdam.export(node);
    assert!(!cofferdam.files().join("socket").exists());
}

#[test]
fn only_the_socket_of_a_dead_daemon_is_replaced() {
    let cofferdam = Cofferdam::new();
    let (killed, _) = serve(&cofferdam, "socket");
    killed.signal(Signal::SIGKILL);
    killed.end();
    assert!(cofferdam.files().join("socket").exists());
    let (daemon, flags) = serve(&cofferdam, "socket");
    let path = cofferdam.files().join("socket");
    let second = cofferdam
        .command(["daemon", "--allow-emulation", "--listen"].map(OsStr::new).into_iter().chain([path.as_os_str()]));
    second.exits_with(3).says("is in use by process");
    through(&cofferdam, &flags, &[OsStr::new("import"), cofferdam.file("x", "x").as_os_str()]);
    daemon.signal(Signal::SIGINT);
    daemon.end().succeeds();
    let other = cofferdam.file("no-socket", "precious");
    cofferdam
        .command(["daemon", "--allow-emulation", "--listen"].map(OsStr::new).into_iter().chain([other.as_os_str()]))
        .exits_with(3);
    assert_eq!(fs::read(&other).unwrap(), b"precious");
}

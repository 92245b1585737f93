//! A host whose internet is made for tests, see `bin/network-lab`.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    thread,
};

use nix::sched::{CloneFlags, setns};
use tempfile::TempDir;

use crate::{Build, Cofferdam, Running, guest, processes::Process, program::network_lab};

/// The internet's DNS server.
pub const RESOLVER: &str = "10.0.0.53:53";

/// A build on a lab's host with these rules, and with a program that uses the network.
pub fn networked<'a>(cofferdam: &'a Cofferdam, allowed: &[&str]) -> Build<'a> {
    let build = cofferdam.build().switch("--network").flag("--resolver", RESOLVER);
    let build = build.input("client", guest::client());
    allowed.iter().fold(build, |build, rule| build.flag("--allow-host", *rule))
}

/// The processes of builds' network devices.
pub fn network_devices(cofferdam: &Cofferdam) -> Vec<Process> {
    let processes = cofferdam.processes().into_iter();
    processes.filter(|process| process.command_line.starts_with("cofferdam: network device in ")).collect()
}

/// The internet's record of a test.
#[derive(Debug)]
pub struct Lab {
    program: &'static Path,
    directory: TempDir,
}

impl Lab {
    /// An internet that nobody has seen, made by this program: `env!("CARGO_BIN_EXE_network-lab")`.
    pub fn new(program: &'static str) -> Self {
        Self::by(program.as_ref())
    }

    /// An internet that nobody has seen, for programs that are no tests.
    pub fn compiled() -> Self {
        Self::by(network_lab())
    }

    fn by(program: &'static Path) -> Self {
        Self { program, directory: tempfile::tempdir().expect("a temporary directory can be made") }
    }

    /// A state directory on a host with this internet. Each command has servers of its own.
    pub fn cofferdam(&self) -> Cofferdam {
        Cofferdam::new().by([self.program.into(), self.log().into()])
    }

    /// The same, with guests that boot from the image in this directory.
    pub fn cofferdam_with_image(&self, image: impl Into<PathBuf>) -> Cofferdam {
        Cofferdam::with_image(image).by([self.program.into(), self.log().into()])
    }

    /// Connections that servers have accepted, as `ADDRESS PORT`, queries, as `dns NAME TYPE`, and requests to the proxy, as
    /// `proxy NAME:PORT`, in order.
    pub fn seen(&self) -> Vec<String> {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }

    /// Connections that servers have accepted.
    pub fn connections(&self) -> Vec<String> {
        self.seen().into_iter().filter(|line| !line.starts_with("dns ") && !line.starts_with("proxy ")).collect()
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("log")
    }
}

/// Does something in the network of a process in a [`Lab`], such as listening at its loopback address.
pub fn in_network_of<T: Send>(process: &Running, work: impl FnOnce() -> T + Send) -> T {
    let network = File::open(format!("/proc/{}/ns/net", process.pid())).expect("this needs root");
    let work = || {
        setns(network, CloneFlags::CLONE_NEWNET).expect("this needs root");
        work()
    };
    // A thread of its own, since this one is to stay where it is.
    thread::scope(|scope| scope.spawn(work).join().expect("it doesn't panic"))
}

//! A daemon on a socket of its own.

use std::{
    env,
    ffi::{OsStr, OsString},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use cofferdam_castore::grpc::{Peer, PeerOptions};
use nix::sys::signal::Signal;

use crate::{
    Cofferdam, Outcome, Running,
    outcome::Expected,
    patience,
    slots::{self, Slots},
    stretched, vmm,
};

/// The usual configuration: one VM at a time, with little memory, however full the host's disk is.
const CONFIG: &str = "
    allow_emulation = true
    [budget]
    builds = 1
    [build]
    memory = \"256M\"
    [disk]
    min_free = 0
";

/// A running `cofferdam daemon`, and room for its VMs.
#[derive(Debug)]
pub struct Daemon {
    running: Running,
    socket: PathBuf,
    _slots: Slots,
}

impl Daemon {
    /// Starts a daemon on this state directory, and waits until it listens. `config` is added to the tests' usual
    /// configuration (top-level keys, then tables).
    #[track_caller]
    pub fn start(cofferdam: &Cofferdam, config: &str) -> Self {
        Self::start_with(cofferdam, config, &[])
    }

    /// Like [`start`](Self::start), with environment variables.
    #[track_caller]
    pub fn start_with(cofferdam: &Cofferdam, config: &str, variables: &[(&str, &OsStr)]) -> Self {
        let socket = cofferdam.files().join("daemon.sock");
        let config = merged(config, &socket);
        let builds = config["budget"]["builds"].as_integer().and_then(|builds| builds.try_into().ok());
        let slots = slots::take_some(builds.expect("it is a count"));
        let file = cofferdam.file("daemon.toml", config.to_string());
        let arguments: [OsString; 3] = ["daemon".into(), "--config".into(), file.into()];
        let mut command = cofferdam.prepare();
        command.args(arguments).envs(variables.iter().copied());
        let running = cofferdam.start(command, Expected::default(), None);
        while UnixStream::connect(&socket).is_err() {
            assert!(
                running.age() < stretched(Duration::from_secs(60)),
                "it never listens: {}",
                running.stderr_so_far()
            );
            thread::sleep(Duration::from_millis(10));
        }
        Self { running, socket, _slots: slots }
    }

    /// Its address.
    pub fn addr(&self) -> String {
        format!("grpc+unix://{}", self.socket.display())
    }

    /// The addresses that it has printed, as soon as there are so many.
    #[track_caller]
    pub fn addrs(&self, count: usize) -> Vec<String> {
        self.running.stdout_lines(count)
    }

    /// A connection to it, on the caller's runtime.
    pub fn peer(&self) -> Peer {
        Peer::from_addr(&self.addr(), &PeerOptions::default()).expect("the address is right")
    }

    /// Its process.
    pub fn running(&self) -> &Running {
        &self.running
    }

    /// Ends it with SIGTERM, and waits for its end.
    pub fn end(self) -> Outcome {
        self.running.signal(Signal::SIGTERM);
        self.end_of()
    }

    /// Waits for its end, which the test has caused in another way.
    pub fn end_of(self) -> Outcome {
        self.running.end()
    }
}

/// The usual configuration, with this socket and the settings for the tests' VMM, and the added one. Added lists and tables
/// extend the usual ones of the same name. With `COFFERDAM_TEST_STANDBY`, builds of the usual shape take standby machines.
fn merged(config: &str, socket: &Path) -> toml::Table {
    let mut both: toml::Table = toml::from_str(CONFIG).expect("it is a constant");
    let listen = socket.to_str().expect("temporary directories are UTF-8");
    both.insert("listen".to_owned(), vec![listen].into());
    let here = [("vmm", vmm::asked().map(str::to_owned)), ("connect_timeout", patience::connect_timeout())];
    both.extend(here.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?.into()))));
    if env::var_os("COFFERDAM_TEST_STANDBY").is_some() {
        both.insert("standby".to_owned(), toml::toml! { machines = 1 }.into());
    }
    let added: toml::Table = toml::from_str(config).expect("tests write TOML");
    for (key, value) in added {
        match (both.get_mut(&key), value) {
            (Some(toml::Value::Table(table)), toml::Value::Table(more)) => table.extend(more),
            (Some(toml::Value::Array(list)), toml::Value::Array(more)) => list.extend(more),
            (_, value) => drop(both.insert(key, value)),
        }
    }
    both
}

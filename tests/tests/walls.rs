//! Walls between machines: a process that has been taken over holds its own machine, and no other one.

use std::{
    fs,
    io::Read as _,
    os::unix::net::UnixStream,
    path::Path,
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use cofferdam_protocol::{
    FromGuest, PORT, VERSION,
    frame::{FrameWriter, MAX_FROM_GUEST_BYTES},
};
use cofferdam_tests::Cofferdam;
use nix::unistd::geteuid;

/// Threads that attack at the same time: enough that the queue of connections is seldom empty.
const ATTACKERS: usize = 3;

/// What the attackers have got.
#[derive(Debug, Default)]
struct Loot {
    /// Connections to the host that it closed.
    closed: u64,
    /// What it said before.
    told: Vec<u8>,
}

/// Processes of the same user that pretend to be the guest, as long as this runs.
struct Attack {
    attackers: Vec<JoinHandle<Loot>>,
    is_over: Arc<AtomicBool>,
}

impl Attack {
    /// On every machine below this directory.
    fn on(run_directory: &Path) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let attack = || {
            let (run_directory, is_over) = (run_directory.to_owned(), Arc::clone(&is_over));
            thread::spawn(move || {
                let mut loot = Loot::default();
                while !is_over.load(Ordering::Relaxed) {
                    let machines = fs::read_dir(&run_directory).into_iter().flatten().flatten();
                    if !machines.fold(false, |any, machine| loot.pretend_to_be_the_guest_of(&machine.path()) || any) {
                        thread::sleep(Duration::from_millis(1));
                    }
                }
                loot
            })
        };
        Self { attackers: (0..ATTACKERS).map(|_| attack()).collect(), is_over }
    }

    fn end(self) -> Loot {
        self.is_over.store(true, Ordering::Relaxed);
        let loots = self.attackers.into_iter().map(|attacker| attacker.join().expect("it only looks for sockets"));
        loots.fold(Loot::default(), |all, one| Loot {
            closed: all.closed + one.closed,
            told: [all.told, one.told].concat(),
        })
    }
}

impl Loot {
    /// Whether the host listened.
    fn pretend_to_be_the_guest_of(&mut self, machine: &Path) -> bool {
        let Ok(mut stream) = UnixStream::connect(machine.join(format!("vsock/s_{PORT}"))) else { return false };
        // As soon as it has heard this, the host sends the specification to a guest.
        let hello = FromGuest::Hello { version: VERSION, uptime_us: 1 };
        let _ = FrameWriter::new(&stream, MAX_FROM_GUEST_BYTES).write(&hello);
        // An error is a connection that was closed before it had been read from.
        let _ = stream.read_to_end(&mut self.told);
        self.closed += 1;
        true
    }
}

#[test]
fn whoever_connects_in_place_of_a_guest_learns_nothing_and_the_guest_is_heard() {
    let cofferdam = Cofferdam::new();
    let attack = Attack::on(&cofferdam.run_directory());
    let build = cofferdam.build().output("build/out").exported();
    let built = build.shell("echo secret >/dev/null; echo honest > out").succeeds();
    let Loot { closed, told } = attack.end();
    assert_eq!(built.read("build/out"), "honest\n");
    assert_eq!(told, b"", "the host said something to {closed} connections");
    assert!(closed > 100, "this test tests nothing: only {closed} connections came before the guest's\n{built}");
    let warning = "closed a connection to a machine's socket";
    let built = built.says(&format!("{warning}: only process"));
    let built = built.says(&format!("pid={} uid={}", process::id(), geteuid()));
    assert!(built.stderr.matches(warning).count() < 10, "{built}");
}

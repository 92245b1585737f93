//! A machine that runs, and how it ends.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use thiserror::Error;

use crate::machine::jail::{Child, SpawnError};

use super::cloud_hypervisor::Control;

/// How long a machine may take to end in order. It takes some twenty milliseconds.
const ORDERLY_END_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the reason for a VMM's end is waited for once it has ended. Only something that it started and that still
/// holds the pipe uses this up.
const LAST_EVENT_TIMEOUT: Duration = Duration::from_millis(200);

/// Why a machine could not be started.
#[derive(Debug, Error)]
pub enum VmmError {
    /// The machine asked for is out of bounds.
    #[error("the machine's {field} {rule}, not {value}")]
    Machine {
        /// The field of [`Machine`](super::Machine).
        field: &'static str,
        /// What holds for it.
        rule: String,
        /// What it was.
        value: String,
    },
    /// One of its programs doesn't start.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// One of its programs ended at once.
    #[error("the machine ended while it was started: {0}")]
    Died(Death),
    /// A socket in the run directory can't be made or reached.
    #[error("cannot use the socket {name} in the run directory")]
    Socket {
        /// Its name.
        name: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A program didn't do in time what it must before the machine can run.
    #[error("{program} did not {what} within {seconds} s")]
    Timeout {
        /// What it is called.
        program: &'static str,
        /// What it should have done.
        what: &'static str,
        /// How long it was waited for.
        seconds: u64,
    },
    /// There are too few huge pages on this host.
    #[error(
        "the machine takes {needed} huge pages, and {available} are to be had; to mend it: sudo sysctl \
         vm.nr_hugepages={remedy}"
    )]
    HugePages {
        /// Pages that it takes.
        needed: u64,
        /// Pages that are free and promised to nobody.
        available: u64,
        /// The setting with which they suffice.
        remedy: u64,
    },
    /// The VMM has a file, and that runs no machine.
    #[error(
        "{} runs no machine{}; to mend it: name another file in COFFERDAM_CLOUD_HYPERVISOR, or use --vmm qemu",
        file.display(),
        last_words(said)
    )]
    Unusable {
        /// The file.
        file: PathBuf,
        /// The last that it said where the cause doesn't tell, escaped.
        said: String,
        /// What it did.
        source: Box<VmmError>,
    },
    /// The VMM's version is older than any that works.
    #[error("it is version {version}; the oldest that works is {oldest}, {reason}")]
    TooOld {
        /// What it says of itself.
        version: String,
        /// The oldest one.
        oldest: String,
        /// Why.
        reason: &'static str,
    },
    /// The VMM doesn't answer a call.
    #[error("{program} gave no answer to {call} within {} s", limit.as_secs_f64())]
    Silent {
        /// What it is called.
        program: &'static str,
        /// The call.
        call: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The connection to the VMM's API broke.
    #[error("{program} gave no usable answer to {call}")]
    Api {
        /// What it is called.
        program: &'static str,
        /// The call.
        call: &'static str,
        /// What went wrong.
        source: io::Error,
    },
    /// The VMM refused a call.
    #[error("{program} refused {call} (HTTP status {status}): {said}")]
    Refused {
        /// What it is called.
        program: &'static str,
        /// The call.
        call: &'static str,
        /// The HTTP status.
        status: u16,
        /// Its words, escaped.
        said: String,
    },
}

fn last_words(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!(", last saying: {said}") }
}

/// What brought a machine to its end, as far as its VMM tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// One of its processes ended, which its status explains.
    Process,
    /// The guest's kernel panicked, and said so to the panic device.
    Panic,
    /// The guest reset itself: a reboot, a triple fault, or a panic of a kernel that doesn't know the panic device.
    Reset,
}

/// How a machine ended: which of its processes did, how, and the last that it said.
#[derive(Clone, Debug)]
pub struct Death {
    /// What the program is called.
    pub program: String,
    /// How it ended. Success when the guest powered off; killed by us after a panic or a reset.
    pub status: ExitStatus,
    /// The tail of its output and of the guest's console, escaped.
    pub said: String,
    /// What brought it about.
    pub cause: Cause,
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what())?;
        if self.said.is_empty() { f.write_str(" without a word") } else { f.write_str(&last_words(&self.said)) }
    }
}

impl Death {
    /// What happened, without the last words.
    pub fn what(&self) -> String {
        match self.cause {
            Cause::Process => format!("{} died ({})", self.program, self.status),
            Cause::Panic => "the guest's kernel panicked".to_owned(),
            Cause::Reset => "the guest reset itself".to_owned(),
        }
    }

    pub(crate) async fn of(child: &mut Child, cause: Cause) -> Self {
        let status = child.wait().await;
        Self { program: child.name().to_owned(), status, said: child.said(), cause }
    }
}

/// A machine that runs. Dropping it kills all its processes; [`kill`](Self::kill) also waits until they are gone.
#[derive(Debug)]
pub struct Vm {
    vmm: Child,
    /// A device in a process of its own, where the VMM has none built in.
    device: Option<Child>,
    /// The VMM's API and events, where it has them.
    control: Option<Control>,
}

impl Vm {
    pub(super) fn new(vmm: Child, device: Option<Child>, control: Option<Control>) -> Self {
        Self { vmm, device, control }
    }

    /// Waits until the machine ends: with the first of its processes, or because the VMM tells that the guest is no
    /// more. Cancel safe, and can be called again.
    pub async fn died(&mut self) -> Death {
        let Self { vmm, device, control } = self;
        let cause = tokio::select! {
            biased;
            Some(cause) = told(control) => cause,
            _ = vmm.wait() => {
                // What it told before it ended.
                let told = tokio::time::timeout(LAST_EVENT_TIMEOUT, told(control)).await;
                told.ok().flatten().unwrap_or(Cause::Process)
            }
            death = ended(device) => return death,
        };
        if cause != Cause::Process {
            vmm.kill().await;
        }
        Death::of(vmm, cause).await
    }

    /// Ends a machine whose guest has said its last. Where the VMM can be asked it ends in order, and tells what the
    /// guest's devices have done; else, and where that takes too long, as [`kill`](Self::kill) does.
    pub async fn finish(&mut self) {
        let Self { vmm, control, .. } = self;
        if let Some(control) = control {
            let orderly = async {
                tokio::select! {
                    // The guest was quicker.
                    _ = vmm.wait() => {}
                    outcome = control.end() => match outcome {
                        Ok(()) => drop(vmm.wait().await),
                        Err(error) => tracing::debug!(%error, "the machine could not be ended in order"),
                    }
                }
            };
            if tokio::time::timeout(ORDERLY_END_TIMEOUT, orderly).await.is_err() {
                tracing::debug!("the machine did not end in order within {} s", ORDERLY_END_TIMEOUT.as_secs());
            }
        }
        self.kill().await;
    }

    /// Kills what still runs of it and waits until it is gone.
    pub async fn kill(&mut self) {
        let device = async {
            if let Some(device) = &mut self.device {
                device.kill().await;
            }
        };
        tokio::join!(self.vmm.kill(), device);
    }

    /// The tail of the guest's console and of the VMM's own messages, escaped; at most 16 KiB of it.
    pub fn console(&self) -> String {
        self.vmm.said()
    }
}

async fn ended(device: &mut Option<Child>) -> Death {
    match device {
        Some(device) => Death::of(device, Cause::Process).await,
        None => std::future::pending().await,
    }
}

/// Nothing where the VMM tells nothing more.
async fn told(control: &mut Option<Control>) -> Option<Cause> {
    control.as_mut()?.events.ended().await
}

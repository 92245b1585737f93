//! A machine that runs, and how it ends.

use std::fmt;
use std::io;
use std::process::ExitStatus;

use thiserror::Error;
use tokio::task::JoinHandle;

use crate::jail::{Child, SpawnError};

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

/// How a machine ended: which of its processes did, how, and the last that it said.
#[derive(Clone, Debug)]
pub struct Death {
    /// What the program is called.
    pub program: String,
    /// How it ended. Success when the guest powered off.
    pub status: ExitStatus,
    /// The tail of its output and of the guest's console, escaped.
    pub said: String,
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { program, status, said } = self;
        write!(f, "{program} ended ({status})")?;
        if said.is_empty() { f.write_str(" without a word") } else { write!(f, ", last saying: {said}") }
    }
}

impl Death {
    pub(super) async fn of(child: &mut Child) -> Self {
        let status = child.wait().await;
        Self { program: child.name().to_owned(), status, said: child.said() }
    }
}

/// A machine that runs. Dropping it kills all its processes; [`kill`](Self::kill) also waits until they are gone.
#[derive(Debug)]
pub struct Vm {
    vmm: Child,
    /// A device in a process of its own, where the VMM has none built in.
    device: Option<Child>,
    /// Ends when the guest has reset itself, where the VMM doesn't end by itself then.
    reset: Option<JoinHandle<()>>,
}

impl Vm {
    pub(super) fn new(vmm: Child, device: Option<Child>, reset: Option<JoinHandle<()>>) -> Self {
        Self { vmm, device, reset }
    }

    /// Waits until the first of its processes ends. Cancel safe, and can be called again.
    pub async fn died(&mut self) -> Death {
        let Self { vmm, device, reset } = self;
        tokio::select! {
            biased;
            _ = vmm.wait() => {}
            () = ended(device) => if let Some(device) = device { return Death::of(device).await },
            () = has_reset(reset) => {
                vmm.kill().await;
            }
        }
        Death::of(vmm).await
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

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(reset) = &self.reset {
            reset.abort();
        }
    }
}

async fn ended(child: &mut Option<Child>) {
    match child {
        Some(child) => {
            child.wait().await;
        }
        None => std::future::pending().await,
    }
}

async fn has_reset(watch: &mut Option<JoinHandle<()>>) {
    match watch {
        Some(task) => {
            // A watch that ended is never asked again; one that broke has nothing to say.
            let seen = task.await.is_ok();
            *watch = None;
            if !seen {
                std::future::pending::<()>().await;
            }
        }
        None => std::future::pending().await,
    }
}

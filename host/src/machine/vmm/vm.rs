//! A running machine and its end.

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;

use crate::machine::death::{Cause, Death};
use crate::machine::jail::{Child, Spawner};

use super::config::Config;
use super::control::Control;
use super::error::VmmError;

/// Time limit for an orderly end of a machine. It takes some twenty milliseconds.
const ORDERLY_END_TIMEOUT: Duration = Duration::from_secs(2);

/// Time limit for reading the reason of a VMM's end, once it has ended. Only a process that it started and that still holds
/// the pipe makes this necessary.
const LAST_EVENT_TIMEOUT: Duration = Duration::from_millis(200);

/// A virtual machine monitor.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// Starts a machine. Its run directory must have the sockets of our devices and of the host, see the module. Returns when
    /// the processes run. The guest has come up when it connects to the host. After an error no process is left.
    async fn start(&self, spawner: &Spawner, run_dir: &Path, config: &Config) -> Result<Vm, VmmError>;
}

/// A running machine. Dropping it kills all its processes. [`kill`](Self::kill) also waits until they are gone.
#[derive(Debug)]
pub struct Vm {
    vmm: Child,
    /// The vsock device's own process, if it isn't built into the VMM.
    device: Option<Child>,
    /// The VMM's API and events, if it has them.
    control: Option<Control>,
}

impl Vm {
    pub(super) fn new(vmm: Child, device: Option<Child>, control: Option<Control>) -> Self {
        Self { vmm, device, control }
    }

    /// The process that connects to the host for the guest: the vsock device, or the VMM that has one built in.
    pub(crate) fn connecting_pid(&self) -> u32 {
        self.device.as_ref().unwrap_or(&self.vmm).pid()
    }

    /// Waits for the end of the machine: the end of its first process, or the VMM's report that the guest has ended. Cancel
    /// safe, and can be called again.
    pub async fn died(&mut self) -> Death {
        let Self { vmm, device, control } = self;
        let cause = tokio::select! {
            biased;
            Some(cause) = told(control) => cause,
            _ = vmm.wait() => {
                // The last event before its end.
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

    /// Has a VMM with an API end in order, in which case it logs its devices' counters. After the time limit, or without an
    /// API, it is left to [`kill`](Self::kill).
    pub async fn end_in_order(&mut self) {
        let Self { vmm, control, .. } = self;
        let Some(control) = control else { return };
        let orderly = async {
            tokio::select! {
                // The guest has powered off already.
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

    /// Kills its remaining processes, and waits until they are gone.
    pub async fn kill(&mut self) {
        let device = async {
            if let Some(device) = &mut self.device {
                device.kill().await;
            }
        };
        tokio::join!(self.vmm.kill(), device);
    }

    /// The tail of the guest's console and of the VMM's own messages, escaped, at most 16 KiB.
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

/// The reported cause. `None` if the VMM reports none.
async fn told(control: &mut Option<Control>) -> Option<Cause> {
    control.as_mut()?.events.ended().await
}

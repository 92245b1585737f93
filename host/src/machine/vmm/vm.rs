//! A machine that runs, and how it ends.

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;

use crate::machine::death::{Cause, Death};
use crate::machine::jail::{Child, Spawner};

use super::config::Config;
use super::control::Control;
use super::error::VmmError;

/// How long a machine may take to end in order. It takes some twenty milliseconds.
const ORDERLY_END_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the reason for a VMM's end is waited for once it has ended. Only something that it started and that still
/// holds the pipe uses this up.
const LAST_EVENT_TIMEOUT: Duration = Duration::from_millis(200);

/// A virtual machine monitor.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// Starts a machine whose run directory holds all that the module's table says is there before. Returns once the
    /// processes run; whether the guest comes up shows in its call to the host. After an error nothing runs.
    async fn start(&self, spawner: &Spawner, run_dir: &Path, config: &Config) -> Result<Vm, VmmError>;
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

    /// The process that connects to the host for the guest: the vsock device, or the VMM that has one built in.
    pub(crate) fn connecting_pid(&self) -> u32 {
        self.device.as_ref().unwrap_or(&self.vmm).pid()
    }

    /// Waits until the machine ends: with the first of its processes, or because the VMM tells that the guest is no
    /// more. Cancel safe, and can be called again.
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

    /// Ends a machine whose guest has nothing left to do. Where the VMM can be asked it ends in order, and tells what the
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

/// The reported cause; nothing where the VMM reports none.
async fn told(control: &mut Option<Control>) -> Option<Cause> {
    control.as_mut()?.events.ended().await
}

//! cloud-hypervisor: the VMM for production. It needs KVM and serves vsock itself.
//!
//! ```text
//!   start ── ch.sock bound by us, handed down as descriptor 3 ── vmm.ping ── vm.create ── vm.boot
//!         └─ a pipe for events, handed down as descriptor 4 ──▶ "rebooting" ──▶ the machine has ended
//! ```
//!
//! Since the API's socket listens before the process starts, the first call needn't wait for it. When a guest resets
//! itself, as it does on a panic, cloud-hypervisor would start it anew and wait a minute for the vhost-user device,
//! which serves one connection only; it has no option to end instead, but it tells of it first.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use cofferdam_protocol::INPUTS_TAG;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::jail::{Program, Spawner};

use super::api::Api;
use super::vm::Death;
use super::{FS_QUEUE_SIZE, FS_SOCKET, GUEST_CID, Machine, SCRATCH_DISK, VSOCK, Vm, Vmm, VmmError};

/// What it is called in messages.
pub(super) const NAME: &str = "cloud-hypervisor";

/// The API's socket in the run directory; gone once we are connected.
const API_SOCKET: &str = "ch.sock";

/// What it reports when the guest has reset itself, as it stands in the event's JSON.
const RESET_EVENT: &[u8] = b"\"rebooting\"";

/// How long a process that gives no answer gets to end, so that its own words can be the error.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_millis(500);

/// `quiet`, since each byte on the serial console is an exit to the VMM, and slow where KVM itself is emulated.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1";

/// The cloud-hypervisor of this host.
#[derive(Clone, Debug)]
pub(super) struct CloudHypervisor {
    pub(super) program: PathBuf,
}

#[async_trait]
impl Vmm for CloudHypervisor {
    async fn start(&self, spawner: &Spawner, run_dir: &Path, machine: &Machine) -> Result<Vm, VmmError> {
        let machine = machine.checked()?;
        let socket_error = |source| VmmError::Socket { name: API_SOCKET, source };
        let (listener, stream) = api_socket(run_dir).map_err(socket_error)?;
        let (events, events_writer) = io::pipe().map_err(socket_error)?;
        let events = pipe::Receiver::from_owned_fd(OwnedFd::from(events)).map_err(socket_error)?;
        let program = Program::new(NAME, &self.program, run_dir)
            .args(["--api-socket", "fd=3", "--event-monitor", "fd=4", "--seccomp", "true"])
            .descriptor(listener)
            .descriptor(events_writer);
        let mut process = spawner.spawn(program).await?;
        if let Err(error) = create_and_boot(stream, &machine).await {
            let ended = tokio::time::timeout(LAST_WORDS_TIMEOUT, Death::of(&mut process)).await;
            process.kill().await;
            return Err(ended.map_or(error, VmmError::Died));
        }
        Ok(Vm::new(process, None, Some(tokio::spawn(until_reset(events)))))
    }
}

/// A socket that listens and a connection that waits in its queue.
fn api_socket(run_dir: &Path) -> io::Result<(UnixListener, UnixStream)> {
    // Through the open directory, since its path may be too long for a socket's address.
    let directory = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(run_dir)?;
    let path = format!("/proc/self/fd/{}/{API_SOCKET}", directory.as_raw_fd());
    let listener = UnixListener::bind(&path)?;
    let stream = UnixStream::connect(&path)?;
    // Whoever controls the API controls the VMM: after us nobody finds it.
    fs::remove_file(&path)?;
    Ok((listener, stream))
}

async fn create_and_boot(stream: UnixStream, machine: &Machine) -> Result<(), VmmError> {
    let mut api = Api::connect(stream).await?;
    api.get("vmm.ping").await?;
    api.put("vm.create", Some(&configuration(machine))).await?;
    api.put("vm.boot", None).await
}

/// The body of `vm.create`. Versions that don't know a field ignore it.
fn configuration(machine: &Machine) -> serde_json::Value {
    json!({
        "payload": { "kernel": machine.kernel, "initramfs": machine.initramfs, "cmdline": KERNEL_COMMAND_LINE },
        // Builds run no VMs of their own, and a guest that sees no virtualisation can't attack the host's.
        "cpus": { "boot_vcpus": machine.cpus, "max_vcpus": machine.cpus, "nested": false },
        "memory": { "size": machine.memory_bytes, "shared": true },
        "fs": [{ "tag": INPUTS_TAG, "socket": FS_SOCKET, "num_queues": 1, "queue_size": FS_QUEUE_SIZE }],
        "vsock": { "cid": GUEST_CID, "socket": VSOCK },
        "disks": [{ "path": SCRATCH_DISK, "image_type": "Raw" }],
        "rng": { "src": "/dev/urandom" },
        // To our pipe, of which the tail is kept: a panic is the last that a guest says.
        "serial": { "mode": "Tty" },
        "console": { "mode": "Off" },
    })
}

/// Reads events until one tells that the guest has reset itself. Never ends when the writer does: then the process has
/// ended, and that is seen elsewhere.
async fn until_reset(mut events: pipe::Receiver) {
    let mut window: Vec<u8> = Vec::with_capacity(4096 + RESET_EVENT.len());
    let mut buffer = [0; 4096];
    loop {
        match events.read(&mut buffer).await {
            Ok(0) | Err(_) => std::future::pending().await,
            Ok(length) => {
                window.extend(&buffer[..length]);
                if window.windows(RESET_EVENT.len()).any(|part| part == RESET_EVENT) {
                    return;
                }
                // What was read may end in the middle of the word.
                window.drain(..window.len().saturating_sub(RESET_EVENT.len()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn a_reset_is_seen_across_reads() {
        let (reader, mut writer) = io::pipe().unwrap();
        let mut watch = tokio::spawn(until_reset(pipe::Receiver::from_owned_fd(reader.into()).unwrap()));
        writer.write_all(b"{ \"event\": \"booted\" }\n\n{ \"event\": \"reboo").unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut watch).await.is_err());
        writer.write_all(b"ting\" }").unwrap();
        watch.await.unwrap();
    }
}

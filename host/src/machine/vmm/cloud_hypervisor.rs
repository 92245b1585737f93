//! cloud-hypervisor: the VMM for production. It needs KVM and serves vsock itself.
//!
//! ```text
//!   start ── ch.sock bound by us, handed down as descriptor 3 ── vmm.ping ── vm.create ── vm.boot
//!         └─ a pipe for events, handed down as descriptor 4 ──▶ panic, reset ──▶ the machine has ended
//!   end   ── vm.info ── vm.counters ── vm.shutdown ── vm.delete ── vmm.shutdown ──▶ the process has ended
//! ```
//!
//! Since the API's socket listens before the process starts, the first call needn't wait for it. When a guest resets
//! itself, cloud-hypervisor would start it anew and wait a minute for the vhost-user device, which serves one
//! connection only; it has no option to end instead, but it tells of it first, see [`events`](super::events).
//!
//! # Confinement
//!
//! | what its documents advise | how it is done |
//! |---|---|
//! | seccomp | `--seccomp true`: filters for each thread that does more than wait |
//! | Landlock | asked for with the machine, in `vm.create`: `--landlock` wants a kernel on the command line. It grants what the machine names (kernel, initramfs, scratch disk, `fs.sock`, `/dev/urandom`), and one rule of ours lets the vsock device make its socket in a directory that holds nothing else. Without it on a kernel that is too old, which `doctor` and the log tell: seccomp and the machine itself remain |
//! | no network | no such device, unless the build may use the network: then it has the one of a device process |
//! | no guess at a disk's format | `image_type` says raw; a guess would let a guest write the header of a format that names files of the host, and reset |
//! | no nested virtualisation | `nested` is off unless the build may run VMs: a guest that sees no virtualisation can't attack the host's |
//!
//! Its console is a virtio console on its own thread: a serial one costs the guest an exit a byte, and there is none.
//! It writes to our pipe and not to a file, whose size nothing would bound: the tail is kept, and the pipe is always
//! read. What a kernel says before the console's driver is up appears once it is, or never when the kernel ends before;
//! then it is told that it has reset itself, and QEMU shows the rest.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use cofferdam_protocol::network::MTU;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::machine::death::{Cause, Death};
use crate::machine::device::{Attachment, AttachmentKind};
use crate::machine::jail::{Child, Program, Spawner, View, landlock_version};
use crate::machine::peer::Peer;

use super::api::{Api, NAME};
use super::config::Config;
use super::control::Control;
use super::error::VmmError;
use super::events::Events;
use super::find::{CLOUD_HYPERVISOR, Version};
use super::layout::{GUEST_CID, KERNEL_PARAMETERS, SCRATCH_DISK, VSOCK, VSOCK_DIRECTORY};
use super::vm::{Vm, Vmm};

/// The API's socket in the run directory; gone once we are connected.
const API_SOCKET: &str = "ch.sock";

/// How long a process may take to serve its API. It takes some ten milliseconds, and some hundred where KVM itself is
/// emulated.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a process that gives no answer gets to end, so that its own words can be the error.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_millis(500);

/// The first version that knows `landlock_enable` and `landlock_rules`.
const KNOWS_LANDLOCK: Version = Version(41, 0);

/// The first version that knows `cpus.nested`.
const KNOWS_NESTED: Version = Version(50, 0);

/// The first version that, unless told otherwise, gives all vCPUs of a machine one cookie of Linux's core scheduling.
pub(super) const SCHEDULES_CORES: Version = Version(52, 0);

/// The first version that knows `disks.image_type`; 50.0 doesn't.
const KNOWS_IMAGE_TYPE: Version = Version(50, 1);

/// The Landlock that it asks of the kernel, Linux 6.2's; from version 48 on it fails with an older one.
const LANDLOCK_VERSION: u32 = 3;

/// The cloud-hypervisor of this host.
#[derive(Clone, Debug)]
pub(super) struct CloudHypervisor {
    pub(super) program: PathBuf,
    /// How long it may take to serve its API.
    pub(super) ready: Duration,
}

/// What `vmm.ping` answers.
#[derive(Debug, Deserialize)]
struct Ping {
    version: String,
}

#[async_trait]
impl Vmm for CloudHypervisor {
    async fn start(&self, spawner: &Spawner, run_dir: &Path, config: &Config) -> Result<Vm, VmmError> {
        let config = config.checked()?;
        if let Some(model) = config.cpu_model {
            let rule = "can be set for QEMU only, since cloud-hypervisor shows the host's CPU; leave it".to_owned();
            return Err(VmmError::Machine { field: "cpu_model", rule, value: model });
        }
        let socket_error = |source| VmmError::Socket { name: API_SOCKET, source };
        let (listener, stream) = api_socket(run_dir).map_err(socket_error)?;
        let (events, events_writer) = io::pipe().map_err(socket_error)?;
        let program = Program::new(NAME, &self.program, run_dir)
            .args(["--api-socket", "fd=3", "--event-monitor", "fd=4", "--seccomp", "true"])
            .descriptor(listener)
            .descriptor(events_writer)
            .walled(view(&config))
            .longest_file(config.longest_file(run_dir));
        let process = spawner.spawn(program).await.map_err(|error| self.unusable(String::new(), error.into()))?;
        self.drive(process, stream, events.into(), &config).await
    }
}

impl CloudHypervisor {
    pub(super) fn new(program: PathBuf) -> Self {
        Self { program, ready: READY_TIMEOUT }
    }

    /// Has a process make the machine and boot it.
    pub(super) async fn drive(
        &self,
        mut process: Child,
        stream: UnixStream,
        events: OwnedFd,
        config: &Config,
    ) -> Result<Vm, VmmError> {
        let events = Events::read(events).map_err(|source| VmmError::Socket { name: "for events", source })?;
        match create_and_boot(stream, self.ready, config).await {
            Ok(api) => Ok(Vm::new(process, None, Some(Control { api, events }))),
            Err(error) => {
                let death = Death::of(&mut process, Cause::Process);
                let ended = tokio::time::timeout(LAST_WORDS_TIMEOUT, death).await;
                process.kill().await;
                Err(match ended {
                    // No program does this to itself: somebody, or the kernel for want of memory.
                    Ok(death) if death.status.signal() == Some(libc::SIGKILL) => VmmError::Died(death),
                    Ok(death) => self.unusable(String::new(), VmmError::Died(death)),
                    Err(_) => self.unusable(process.said(), error),
                })
            }
        }
    }

    fn unusable(&self, said: String, source: VmmError) -> VmmError {
        VmmError::Unusable { file: self.program.clone(), said, source: Box::new(source) }
    }
}

/// The ways in which a version of it runs less confined than it could on a kernel with this Landlock.
pub(super) fn unconfined(version: Version, landlock: u32) -> Vec<String> {
    let mut ways = vec![];
    if version < KNOWS_LANDLOCK {
        ways.push(format!("no Landlock, which it knows from version {KNOWS_LANDLOCK} on"));
    } else if landlock < LANDLOCK_VERSION {
        ways.push(format!(
            "no Landlock, of which it needs version {LANDLOCK_VERSION} (Linux 6.2) and this kernel has {landlock}"
        ));
    }
    if version < KNOWS_NESTED {
        ways.push(format!("builds see the host's virtualisation, which it hides from version {KNOWS_NESTED} on"));
    }
    if version < KNOWS_IMAGE_TYPE {
        ways.push(format!("it guesses the scratch disk's format, which it takes from version {KNOWS_IMAGE_TYPE} on"));
    }
    ways
}

/// What it opens by its path.
fn view(config: &Config) -> View {
    let view = View::nothing().run_dir().file(&config.kernel).file(&config.initramfs);
    ["/dev/kvm", "/dev/urandom"].into_iter().fold(view, View::device)
}

/// A socket that listens and a connection that waits in its queue.
fn api_socket(run_dir: &Path) -> io::Result<(UnixListener, UnixStream)> {
    // Through the open directory, since its path may be too long for a socket's address.
    let directory = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(run_dir)?;
    let path = format!("/proc/self/fd/{}/{API_SOCKET}", directory.as_raw_fd());
    let listener = UnixListener::bind(&path)?;
    let stream = UnixStream::connect(&path)?;
    // Control of the API is control of the VMM: nobody else must find the socket, or have put another in its place.
    fs::remove_file(&path)?;
    let peer = Peer::of(&stream)?;
    if peer.pid != std::process::id() {
        return Err(io::Error::other(format!("{peer} listens in its place")));
    }
    Ok((listener, stream))
}

async fn create_and_boot(stream: UnixStream, ready: Duration, config: &Config) -> Result<Api, VmmError> {
    let mut api = Api::connect(stream).await?;
    let Ping { version } = api.get("vmm.ping", ready).await?;
    // What runs counts, not what its file said some time before.
    let knows = Version::of(&version);
    if knows < CLOUD_HYPERVISOR.oldest {
        let oldest = CLOUD_HYPERVISOR.oldest.to_string();
        return Err(VmmError::TooOld { version, oldest, reason: CLOUD_HYPERVISOR.reason });
    }
    let landlock = landlock_version();
    let unconfined = unconfined(knows, landlock).join("; ");
    if !unconfined.is_empty() {
        tracing::warn!(version, "cloud-hypervisor runs less confined than it could: {unconfined}");
    }
    api.put("vm.create", Some(&configuration(config, knows, landlock))).await?;
    api.put("vm.boot", None).await?;
    Ok(api)
}

/// The body of `vm.create`: what a version of it knows, and no more.
fn configuration(config: &Config, version: Version, landlock: u32) -> Value {
    let (mut fs, mut net) = (Vec::new(), Vec::new());
    for Attachment { kind, socket, queue_size } in &config.attachments {
        match kind {
            AttachmentKind::Fs { tag } => {
                fs.push(json!({ "tag": tag, "socket": socket, "num_queues": 1, "queue_size": queue_size }));
            }
            // It takes the address and the MTU from here, and not from the device.
            AttachmentKind::Net => net.push(json!({
                "vhost_user": true,
                "vhost_socket": socket,
                "num_queues": 2,
                "queue_size": queue_size,
                "mac": AttachmentKind::mac(),
                "mtu": MTU,
            })),
        }
    }
    let mut body = json!({
        "payload": { "kernel": config.kernel, "initramfs": config.initramfs, "cmdline": format!("console=hvc0 {KERNEL_PARAMETERS}") },
        "cpus": {
            "boot_vcpus": config.cpus,
            "max_vcpus": config.cpus,
            // Every host shows the same, whatever its own threads and sockets are.
            "topology": { "threads_per_core": 1, "cores_per_die": config.cpus, "dies_per_package": 1, "packages": 1 },
        },
        "memory": {
            "size": config.memory_bytes,
            "shared": true,
            "hugepages": config.hugepages,
            // Left to itself it asks /dev/hugepages, which isn't mounted everywhere.
            "hugepage_size": config.huge_page_bytes(),
        },
        "fs": fs,
        "vsock": { "cid": GUEST_CID, "socket": VSOCK },
        "disks": [{ "path": SCRATCH_DISK }],
        "rng": { "src": "/dev/urandom" },
        "serial": { "mode": "Off" },
        "console": { "mode": "Tty" },
        "pvpanic": true,
    });
    if !net.is_empty() {
        body["net"] = json!(net);
    }
    if version >= KNOWS_NESTED {
        body["cpus"]["nested"] = json!(config.nested);
    }
    if version >= KNOWS_IMAGE_TYPE {
        body["disks"][0]["image_type"] = json!("Raw");
    }
    if version >= KNOWS_LANDLOCK && landlock >= LANDLOCK_VERSION {
        body["landlock_enable"] = json!(true);
        // Versions before 48 grant the socket alone, which isn't there yet.
        body["landlock_rules"] = json!([{ "path": VSOCK_DIRECTORY, "access": "w" }]);
        // Of network devices it grants nothing by itself.
        for attachment in config.attachments.iter().filter(|attachment| attachment.kind == AttachmentKind::Net) {
            let rule = json!({ "path": attachment.socket, "access": "rw" });
            body["landlock_rules"].as_array_mut().into_iter().for_each(|rules| rules.push(rule.clone()));
        }
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(tag: &'static str, socket: &'static str) -> Attachment {
        Attachment { kind: AttachmentKind::Fs { tag }, socket, queue_size: 512 }
    }

    #[test]
    fn a_version_is_sent_what_it_knows_and_no_more() {
        let config = Config {
            kernel: "/image/kernel".into(),
            initramfs: "/image/initramfs".into(),
            memory_bytes: 1 << 30,
            cpus: 3,
            cpu_model: None,
            hugepages: true,
            attachments: vec![share("inputs", "fs.sock")],
            nested: false,
        };
        let body = |version, landlock| configuration(&config, version, landlock);
        let oldest = body(CLOUD_HYPERVISOR.oldest, 7);
        let expected = json!({
            "payload": {
                "kernel": "/image/kernel", "initramfs": "/image/initramfs", "cmdline": format!("console=hvc0 {KERNEL_PARAMETERS}"),
            },
            "cpus": {
                "boot_vcpus": 3, "max_vcpus": 3,
                "topology": { "threads_per_core": 1, "cores_per_die": 3, "dies_per_package": 1, "packages": 1 },
            },
            "memory": {
                "size": 1 << 30, "shared": true, "hugepages": true, "hugepage_size": config.huge_page_bytes(),
            },
            "fs": [{ "tag": "inputs", "socket": "fs.sock", "num_queues": 1, "queue_size": 512 }],
            "vsock": { "cid": 3, "socket": "vsock/s" },
            "disks": [{ "path": "scratch.ext4" }],
            "rng": { "src": "/dev/urandom" },
            "serial": { "mode": "Off" },
            "console": { "mode": "Tty" },
            "pvpanic": true,
        });
        assert_eq!(oldest, expected);
        assert_eq!(body(Version(40, 2), 7), expected);

        let mut expected = expected;
        assert_eq!(body(Version(41, 0), 2), expected);
        expected["landlock_enable"] = json!(true);
        expected["landlock_rules"] = json!([{ "path": "vsock", "access": "w" }]);
        assert_eq!(body(Version(41, 0), 3), expected);
        assert_eq!(body(Version(49, 0), 3), expected);
        expected["cpus"]["nested"] = json!(false);
        assert_eq!(body(Version(50, 0), 3), expected);
        expected["disks"][0]["image_type"] = json!("Raw");
        assert_eq!(body(Version(50, 1), 3), expected);
        assert_eq!(body(Version(53, 0), 7), expected);

        let attachments = vec![share("inputs", "fs.sock"), share("paths", "paths.sock")];
        let config = Config { attachments, nested: true, ..config.clone() };
        expected["cpus"]["nested"] = json!(true);
        let fs = |tag, socket| json!({ "tag": tag, "socket": socket, "num_queues": 1, "queue_size": 512 });
        expected["fs"] = json!([fs("inputs", "fs.sock"), fs("paths", "paths.sock")]);
        assert_eq!(configuration(&config, Version(53, 0), 7), expected);

        let net = Attachment { kind: AttachmentKind::Net, socket: "net.sock", queue_size: 1024 };
        let config = Config { attachments: vec![share("inputs", "fs.sock"), net], ..config };
        expected["fs"] = json!([fs("inputs", "fs.sock")]);
        expected["net"] = json!([{
            "vhost_user": true, "vhost_socket": "net.sock", "num_queues": 2, "queue_size": 1024,
            "mac": "02:63:6f:66:00:02", "mtu": 65520,
        }]);
        expected["landlock_rules"] =
            json!([{ "path": "vsock", "access": "w" }, { "path": "net.sock", "access": "rw" }]);
        assert_eq!(configuration(&config, Version(53, 0), 7), expected);
    }

    #[test]
    fn what_is_less_confined_is_said() {
        assert!(unconfined(Version(53, 0), 3).is_empty());
        assert_eq!(
            unconfined(Version(53, 0), 2),
            ["no Landlock, of which it needs version 3 (Linux 6.2) and this kernel has 2"]
        );
        assert_eq!(
            unconfined(Version(39, 0), 7),
            [
                "no Landlock, which it knows from version 41.0 on",
                "builds see the host's virtualisation, which it hides from version 50.0 on",
                "it guesses the scratch disk's format, which it takes from version 50.1 on",
            ]
        );
    }
}

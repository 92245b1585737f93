//! QEMU: the VMM that runs anywhere, with KVM where it works and by emulation (TCG) elsewhere.
//!
//! ```text
//!   start ── vhost-device-vsock listens on vsock.sock ── we connect ── QEMU inherits the connection as descriptor 3
//! ```
//!
//! QEMU connects to a vhost-user socket once, as it starts, and ends if nobody listens. We connect in its place because
//! we can wait until the device is up.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use cofferdam_protocol::network::MTU;
use rustix::fs::inotify;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::spawn_blocking;

use crate::machine::death::{Cause, Death};
use crate::machine::device::{Attachment, AttachmentKind};
use crate::machine::jail::{Child, Program, Spawner, View};
use crate::machine::peer::Peer;

use super::config::Config;
use super::error::VmmError;
use super::kind::Accelerator;
use super::layout::{GUEST_CID, KERNEL_PARAMETERS, SCRATCH_DISK, VSOCK};
use super::tsc;
use super::vm::{Vm, Vmm};

/// What the vsock device is called in messages.
const VSOCK_DEVICE: &str = "vhost-device-vsock";

/// The vhost-user socket of that device, in the run directory.
const VSOCK_DEVICE_SOCKET: &str = "vsock.sock";

/// How long that device may take to listen, in seconds. It takes a few milliseconds.
const LISTEN_TIMEOUT_S: u64 = 10;

/// Most memory of the code that TCG makes of the guest's, in MiB. QEMU's default is an eighth of the host's memory, up to a
/// GiB, which the guest can fill.
pub const TCG_CODE_MIB: u64 = 256;

/// Room for many events of a directory; one takes 272 bytes at most.
const MAX_EVENTS_BYTES: usize = 4096;

/// The CPU that is emulated: all that TCG can, without the claim that string instructions are fast. TCG executes them byte by
/// byte, and Linux and the C library clear and copy memory with them on a CPU that claims it.
pub const TCG_CPU: &str = "max,-erms,-fsrm";

/// Where packages put its firmware and its modules, below the prefix that it is installed under.
const DIRECTORIES: [&str; 4] =
    ["share/qemu", "share/seabios", "lib/qemu", concat!("lib/", "x86_64-linux-gnu", "/qemu")];

/// When to try again to connect to a socket that is there and doesn't listen yet.
const CONNECT_INTERVAL: Duration = Duration::from_millis(1);

/// The QEMU of this host and the vsock device that goes with it.
#[derive(Clone, Debug)]
pub(super) struct Qemu {
    pub(super) program: PathBuf,
    pub(super) vsock_device: PathBuf,
    pub(super) accelerator: Accelerator,
}

#[async_trait]
impl Vmm for Qemu {
    async fn start(&self, spawner: &Spawner, run_dir: &Path, config: &Config) -> Result<Vm, VmmError> {
        let config = config.checked()?;
        let device = Program::new(VSOCK_DEVICE, &self.vsock_device, run_dir)
            .args(["--vm".to_owned(), format!("guest-cid={GUEST_CID},socket={VSOCK_DEVICE_SOCKET},uds-path={VSOCK}")])
            .walled(View::nothing().run_dir())
            .longest_file(config.memory_bytes);
        let mut device = spawner.spawn(device).await?;
        match self.start_machine(spawner, run_dir, &config, &mut device).await {
            Ok(vmm) => Ok(Vm::new(vmm, Some(device), None)),
            Err(error) => {
                device.kill().await;
                Err(error)
            }
        }
    }
}

impl Qemu {
    async fn start_machine(
        &self,
        spawner: &Spawner,
        run_dir: &Path,
        config: &Config,
        device: &mut Child,
    ) -> Result<Child, VmmError> {
        let vsock = connect(run_dir, device).await?;
        let arguments = self.arguments(config, tsc::khz().await);
        let qemu = Program::new("qemu", &self.program, run_dir)
            .args(arguments)
            .descriptor(vsock)
            .walled(self.view(config))
            .longest_file(config.longest_file(run_dir));
        Ok(spawner.spawn(qemu).await?)
    }

    /// Firmware and modules are in directories that lie beside its program's.
    fn view(&self, config: &Config) -> View {
        let prefix = self.program.canonicalize().ok().and_then(|program| Some(program.parent()?.parent()?.to_owned()));
        let there = DIRECTORIES.iter().flat_map(|directory| prefix.iter().map(move |prefix| prefix.join(directory)));
        // It finds them by the place of its own program, and tries file locks on the null device.
        let view = View::nothing().run_dir().device("/dev/null").file(&self.program);
        let view = view.file(&config.kernel).file(&config.initramfs);
        let view = there.filter(|directory| directory.is_dir()).fold(view, View::file);
        match self.accelerator {
            Accelerator::Kvm => view.device("/dev/kvm"),
            Accelerator::Tcg => view,
        }
    }

    /// The command line, whose order has no meaning. Descriptor 3 is the connection to the vsock device.
    fn arguments(&self, config: &Config, tsc_khz: u64) -> Vec<String> {
        let memory_mib = config.memory_bytes / (1024 * 1024);
        let (accel, any_cpu, hidden) = match self.accelerator {
            Accelerator::Kvm if config.nested => ("kvm".to_owned(), "host", ""),
            Accelerator::Kvm => ("kvm".to_owned(), "host", ",-vmx,-svm"),
            // Taking svm from its CPU breaks the guest's user space (seen with QEMU 7.2).
            Accelerator::Tcg => (format!("tcg,thread=multi,tb-size={TCG_CODE_MIB}"), TCG_CPU, ""),
        };
        // A model that the host can't give in full is refused: it would be another CPU on each host.
        let cpu = match &config.cpu_model {
            Some(model) => format!("{model},enforce{hidden}"),
            None => format!("{any_cpu}{hidden}"),
        };
        let cpus = config.cpus;
        let huge = if config.hugepages { ",hugetlb=on" } else { "" };
        let options: [(&str, String); 22] = [
            // The smallest machine with PCI. Its memory is shared with the vhost-user devices.
            ("-M", "microvm,pcie=on,memory-backend=memory".into()),
            ("-object", format!("memory-backend-memfd,id=memory,size={memory_mib}M,share=on{huge}")),
            ("-m", format!("{memory_mib}M")),
            ("-accel", accel),
            ("-cpu", cpu),
            // Every host shows the same, whatever its own threads and sockets are.
            ("-smp", format!("{cpus},sockets=1,cores={cpus},threads=1")),
            // Nothing but what is listed here.
            ("-nodefaults", String::new()),
            ("-no-user-config", String::new()),
            ("-display", "none".into()),
            ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into()),
            // A guest that resets itself, as it does on a panic, has ended.
            ("-no-reboot", String::new()),
            ("-kernel", config.kernel.display().to_string()),
            ("-initrd", config.initramfs.display().to_string()),
            ("-append", kernel_command_line(tsc_khz)),
            ("-chardev", "stdio,id=console,signal=off".into()),
            ("-serial", "chardev:console".into()),
            ("-chardev", "socket,id=vsock,fd=3".into()),
            ("-device", "vhost-user-vsock-pci,chardev=vsock".into()),
            // Gone after the build: nothing in it is ever synced, and what the guest discards takes no room.
            (
                "-drive",
                format!("if=none,id=scratch,file={SCRATCH_DISK},format=raw,cache=unsafe,discard=unmap,werror=report"),
            ),
            ("-device", "virtio-blk-pci,drive=scratch".into()),
            ("-object", "rng-builtin,id=entropy".into()),
            ("-device", "virtio-rng-pci,rng=entropy".into()),
        ];
        let options =
            options.into_iter().chain(config.attachments.iter().flat_map(|one| attach(one, self.accelerator)));
        let parts = options.flat_map(|(option, value)| [option.to_owned(), value]);
        parts.filter(|part| !part.is_empty()).collect()
    }
}

/// The options of a device that a process of its own serves.
fn attach(
    &Attachment { kind, socket, queue_size }: &Attachment,
    accelerator: Accelerator,
) -> Vec<(&'static str, String)> {
    match kind {
        AttachmentKind::Fs { tag } => vec![
            ("-chardev", format!("socket,id={tag},path={socket}")),
            ("-device", format!("vhost-user-fs-pci,chardev={tag},tag={tag},queue-size={queue_size}")),
        ],
        AttachmentKind::Net => {
            let mac = AttachmentKind::mac();
            // Without KVM, QEMU 7.2 crashes when such a device uses MSI-X.
            let interrupts = if accelerator == Accelerator::Tcg { ",vectors=0" } else { "" };
            // Without a ROM, of which a kernel that is given has no use.
            let device = format!(
                "virtio-net-pci,netdev=net,mac={mac},host_mtu={MTU},rx_queue_size={queue_size},romfile={interrupts}"
            );
            vec![
                ("-chardev", format!("socket,id=net,path={socket}")),
                ("-netdev", "vhost-user,id=net,chardev=net".into()),
                ("-device", device),
            ]
        }
    }
}

/// What a guest's kernel is told, for a counter of this rate in kHz.
///
/// A panic resets at once, by a triple fault, which every machine understands. Why the kernel is told the counter's rate is
/// said where it is measured. Without `tsc=reliable` an emulated machine with two CPUs doesn't trust the counter, although QEMU
/// gives all of them the same one, and goes by ticks, of which a busy host loses some. The check that the timer's interrupt
/// arrives counts ticks as well, and panics when they come late.
///
/// `lpj` is how often the counter ticks from one tick of the timer to the next. A kernel that isn't told measures it for each
/// emulated CPU but the first, for some ten ticks of the timer. It is right for 100 ticks a second. With more, as Debian's
/// kernel has, the short delays of drivers last longer.
pub fn kernel_command_line(tsc_khz: u64) -> String {
    let lpj = tsc_khz.saturating_mul(10);
    format!("console=ttyS0 {KERNEL_PARAMETERS} reboot=t tsc_early_khz={tsc_khz} tsc=reliable no_timer_check lpj={lpj}")
}

/// Tells when files are made in a directory.
struct Made(AsyncFd<OwnedFd>);

impl Made {
    fn watch(directory: &Path) -> io::Result<Self> {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(&watch, directory, inotify::WatchFlags::CREATE)?;
        // SAFETY: an owned descriptor stays open, and the same, until it is dropped.
        Ok(Self(unsafe { AsyncFd::register_with_interest(watch, Interest::READABLE) }?))
    }

    /// Waits until something has been made since the last time, or since the watch began.
    async fn next(&self) -> io::Result<()> {
        let mut events = [0; MAX_EVENTS_BYTES];
        self.0.async_io(Interest::READABLE, |watch| Ok(rustix::io::read(watch, &mut events)?)).await.map(drop)
    }
}

/// Connects to the vsock device as soon as it listens. Another process that listens in its place is given nothing.
async fn connect(run_dir: &Path, device: &mut Child) -> Result<UnixStream, VmmError> {
    let socket_error = |source| VmmError::Socket { name: VSOCK_DEVICE_SOCKET, source };
    // Through the open directory, since its path may be too long for a socket's address.
    let directory = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(run_dir);
    let directory = directory.map_err(socket_error)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{VSOCK_DEVICE_SOCKET}", directory.as_raw_fd()));
    let (pid, mut is_told) = (device.pid(), false);
    let attempts = async {
        let made = Made::watch(run_dir).map_err(socket_error)?;
        loop {
            match UnixStream::connect(&path) {
                Ok(stream) => {
                    let peer = Peer::of(&stream).map_err(socket_error)?;
                    if peer.pid == pid {
                        // Not on the way: the kernel closes it only when nobody looks at its marks any more, which takes
                        // some 16 ms.
                        spawn_blocking(|| drop(made));
                        return Ok(stream);
                    }
                    if !std::mem::replace(&mut is_told, true) {
                        tracing::warn!(
                            "{peer} listens on {VSOCK_DEVICE_SOCKET}, and not {VSOCK_DEVICE}, process {pid}"
                        );
                    }
                    tokio::time::sleep(CONNECT_INTERVAL).await;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => made.next().await.map_err(socket_error)?,
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    tokio::time::sleep(CONNECT_INTERVAL).await;
                }
                Err(error) => return Err(socket_error(error)),
            }
        }
    };
    let outcome = tokio::select! {
        outcome = tokio::time::timeout(Duration::from_secs(LISTEN_TIMEOUT_S), attempts) => Some(outcome),
        _ = device.wait() => None,
    };
    match outcome {
        Some(Ok(stream)) => stream,
        Some(Err(_)) => Err(VmmError::Timeout { program: VSOCK_DEVICE, what: "listen", seconds: LISTEN_TIMEOUT_S }),
        None => Err(VmmError::Died(Death::of(device, Cause::Process).await)),
    }
}

//! How machines begin and end, with small programs in the place of the VMM and of its device.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use tokio::runtime::Handle;

use super::cloud_hypervisor::CloudHypervisor;
use super::qemu::Qemu;
use super::*;

/// Writes an executable file. From another process, because a descriptor that is open for writing here may be in the
/// hands of a child that another thread has just forked, and then the kernel refuses to execute the file.
pub(super) fn program(path: &Path, script: &str) -> PathBuf {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "printf '#!/bin/sh\\n%s\\n' \"$2\" > \"$1\" && chmod 755 \"$1\"", "sh"]).arg(path).arg(script);
    assert!(command.status().unwrap().success());
    path.to_owned()
}

/// A run directory whose path is longer than a socket's address may be.
struct RunDir {
    root: tempfile::TempDir,
    path: PathBuf,
}

impl RunDir {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("long".repeat(40));
        fs::create_dir(&path).unwrap();
        Self { root, path }
    }

    fn listen(&self, name: &str) -> UnixListener {
        let directory = File::open(&self.path).unwrap();
        UnixListener::bind(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd())).unwrap()
    }

    fn program(&self, name: &str, script: &str) -> PathBuf {
        program(&self.root.path().join(name), script)
    }

    async fn start(&self, vmm: &dyn Vmm) -> Result<Vm, VmmError> {
        let spawner = Spawner::new(Handle::current()).unwrap();
        let file = self.program("file", "");
        let machine = Machine { kernel: file.clone(), initramfs: file, memory_bytes: 1 << 30, cpus: 3 };
        vmm.start(&spawner, &self.path, &machine).await
    }

    /// Processes that work in this directory, other than zombies.
    fn processes(&self) -> usize {
        let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path().join("cwd"));
        processes.filter(|cwd| fs::read_link(cwd).is_ok_and(|directory| directory == self.path)).count()
    }
}

fn qemu(program: PathBuf, vsock_device: PathBuf) -> Qemu {
    Qemu { program, vsock_device, accelerator: Accelerator::Tcg }
}

#[tokio::test]
async fn qemu_gets_its_machine_and_its_end_is_the_machines() {
    let run = RunDir::new();
    let _listener = run.listen("vsock.sock");
    let vmm = qemu(
        run.program("qemu", "echo \"$@\"; readlink /proc/self/fd/3; exit 5"),
        run.program("device", "echo \"$@\" > seen; exec sleep 1000"),
    );
    let mut vm = run.start(&vmm).await.unwrap();
    let death = vm.died().await;
    assert_eq!((death.program.as_str(), death.status.code()), ("qemu", Some(5)));
    for part in ["memory-backend-memfd,id=memory,size=1024M,share=on", "-smp 3", "tag=inputs", "\nsocket:["] {
        assert!(death.said.contains(part), "{part} is not in: {}", death.said);
    }
    assert!(death.to_string().starts_with("qemu ended (exit status: 5), last saying: -M microvm"));
    assert_eq!(vm.console(), death.said);
    assert_eq!(fs::read_to_string(run.path.join("seen")).unwrap(), "--vm guest-cid=3,socket=vsock.sock,uds-path=vs\n");
    assert_eq!(run.processes(), 1);
    vm.kill().await;
    assert_eq!(run.processes(), 0);
    assert_eq!(vm.died().await.status.code(), Some(5));
}

#[tokio::test]
async fn the_end_of_the_device_is_the_machines_too() {
    let run = RunDir::new();
    let _listener = run.listen("vsock.sock");
    let vmm = qemu(
        run.program("qemu", "exec sleep 1000"),
        run.program("device", "until [ -e go ]; do sleep 0.01; done; echo gone; exit 4"),
    );
    let mut vm = run.start(&vmm).await.unwrap();
    assert!(tokio::time::timeout(std::time::Duration::from_millis(50), vm.died()).await.is_err());
    fs::write(run.path.join("go"), "").unwrap();
    assert_eq!(vm.died().await.to_string(), "vhost-device-vsock ended (exit status: 4), last saying: gone");
    vm.kill().await;
    assert_eq!(run.processes(), 0);
}

#[tokio::test]
async fn a_half_started_qemu_leaves_nothing() {
    let run = RunDir::new();
    let device = run.program("device", "echo 'bad option' >&2; exit 3");
    let error = run.start(&qemu("/bin/true".into(), device)).await.unwrap_err();
    let said =
        "the machine ended while it was started: vhost-device-vsock ended (exit status: 3), last saying: bad option";
    assert_eq!(error.to_string(), said);

    let error = run.start(&qemu("/bin/true".into(), "/does/not/exist".into())).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot start vhost-device-vsock (/does/not/exist)");

    let _listener = run.listen("vsock.sock");
    let device = run.program("device", "exec sleep 1000");
    let error = run.start(&qemu("/does/not/exist".into(), device)).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot start qemu (/does/not/exist)");
    assert_eq!(run.processes(), 0);
}

#[tokio::test]
async fn a_cloud_hypervisor_that_ends_at_once_says_why() {
    let run = RunDir::new();
    let program = run.program("ch", "echo \"$@\"; echo 'no such option' >&2; exit 1");
    let error = run.start(&CloudHypervisor { program }).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the machine ended while it was started: cloud-hypervisor ended (exit status: 1), last saying: \
         --api-socket fd=3 --event-monitor fd=4 --seccomp true\nno such option"
    );
    assert_eq!(fs::read_dir(&run.path).unwrap().count(), 0);
    assert_eq!(run.processes(), 0);
}

#[tokio::test]
async fn a_machine_out_of_bounds_starts_nothing() {
    let run = RunDir::new();
    let spawner = Spawner::new(Handle::current()).unwrap();
    let machine = Machine { kernel: "/bin/sh".into(), initramfs: "/bin/sh".into(), memory_bytes: 1 << 30, cpus: 0 };
    let vmms: [Box<dyn Vmm>; 2] = [
        Box::new(qemu("/bin/true".into(), "/bin/true".into())),
        Box::new(CloudHypervisor { program: "/bin/true".into() }),
    ];
    for vmm in vmms {
        let error = vmm.start(&spawner, &run.path, &machine).await.unwrap_err();
        assert!(matches!(error, VmmError::Machine { field: "cpus", .. }), "{error}");
    }
}

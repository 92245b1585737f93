//! One guest: its run directory, its processes, its connection. Dropping it ends them all.

use std::{os::unix::net::UnixStream, sync::Arc, time::Duration};

use cofferdam_protocol::{HostPath, PORT};
use nix::sys::statvfs::statvfs;
use tokio::net::UnixListener;

use super::{AFTERMATH, Builder, ExecutorError, Options};
use crate::{
    devices::inputs::{self, Device},
    devices::paths::{self, Shown},
    machine::vmm::{self, Death, Machine, Vm},
    machine::{FileError, RunDir},
    request::{BuildRequest, KVM},
};

/// Memory that the guest's kernel and guest-init keep from a build, in bytes, beside a share of the whole. Debian's
/// 6.1 kernel keeps, with two CPUs, 96 MiB of 360, 191 MiB of 1152 and 372 MiB of 4320; six more CPUs cost 14 MiB.
const GUEST_OVERHEAD_BYTES: u64 = 160 << 20;

/// The kernel's page structures take 64 bytes of each 4096, its tables and its zones' reserves the rest.
const GUEST_OVERHEAD_SHARE: u64 = 16;

/// With less room than this, in bytes, a host's disk is as good as full: a write of a guest is as large at times.
const MIN_ROOM_BYTES: u64 = 1 << 20;

pub(super) struct Guest {
    // Fields are dropped in this order: processes first, then what they hold open.
    vm: Vm,
    device: Device,
    paths: Option<paths::Device>,
    listener: Option<UnixListener>,
    run_dir: RunDir,
    memory_bytes: u64,
    host_paths: Vec<HostPath>,
}

impl Guest {
    pub(super) async fn start(
        builder: &Builder,
        (request, options): (&BuildRequest, &Options),
        tree: Arc<inputs::Tree>,
    ) -> Result<Self, ExecutorError> {
        let settings = &builder.settings;
        let asked = request.constraints.as_ref().map_or(0, |constraints| constraints.min_memory);
        let memory_bytes = asked.max(options.memory_bytes);
        let run_dir = RunDir::create(&settings.run_dir)?;
        run_dir.copy_sparse(&settings.image.scratch, vmm::SCRATCH_DISK, options.scratch_bytes)?;
        let socket = |source| FileError { action: "listen for the guest in", path: run_dir.path().to_owned(), source };
        run_dir.directory(vmm::VSOCK_DIRECTORY)?;
        let listener = run_dir.bind(&format!("{}_{PORT}", vmm::VSOCK))?;
        listener.set_nonblocking(true).map_err(socket)?;
        let listener = UnixListener::from_std(listener).map_err(socket)?;

        let device = Device::start(&builder.spawner, run_dir.path(), tree, &builder.store)
            .await
            .map_err(ExecutorError::InputsDevice)?;
        let (host_paths, shown) = show(builder, request)?;
        let paths = if shown.is_empty() {
            None
        } else {
            let started = paths::Device::start(&builder.spawner, run_dir.path(), shown).await;
            Some(started.map_err(ExecutorError::PathsDevice)?)
        };
        let machine = Machine {
            kernel: settings.image.kernel.clone(),
            initramfs: settings.image.initramfs.clone(),
            memory_bytes: memory_bytes + memory_bytes / GUEST_OVERHEAD_SHARE + GUEST_OVERHEAD_BYTES,
            cpus: options.cpus,
            cpu_model: settings.cpu_model.clone(),
            hugepages: settings.hugepages,
            paths: paths.is_some(),
            nested: wants_kvm(request),
        };
        let vmm = settings.vmm.vmm();
        let vm = vmm.start(&builder.spawner, run_dir.path(), &machine).await.map_err(ExecutorError::Vmm)?;
        Ok(Self { vm, device, paths, listener: Some(listener), run_dir, memory_bytes, host_paths })
    }

    /// The memory that the build was promised, in bytes.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// What it is shown of the host.
    pub(super) fn host_paths(&self) -> &[HostPath] {
        &self.host_paths
    }

    /// Waits for the guest's one connection, and takes no other after it.
    pub(super) async fn connected(&mut self, limit: Duration) -> Result<UnixStream, ExecutorError> {
        let failed = |source| FileError {
            action: "accept the guest's connection in",
            path: self.run_dir.path().to_owned(),
            source,
        };
        let Some(listener) = self.listener.take() else {
            return Err(failed(std::io::ErrorKind::NotConnected.into()).into());
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => Some(accepted),
            death = first_death(&mut self.vm, &mut self.device, self.paths.as_mut()) => {
                return Err(super::died(death, super::Phase::Booting));
            }
            () = tokio::time::sleep(limit) => None,
        };
        match accepted {
            Some(accepted) => {
                let stream = accepted.and_then(|(stream, _)| stream.into_std()).map_err(failed)?;
                stream.set_nonblocking(false).map_err(failed)?;
                Ok(stream)
            }
            None => Err(ExecutorError::NeverConnected { limit, console: self.vm.console() }),
        }
    }

    /// The file system that the scratch disk is on has no room, so the guest's writes to the disk may have failed.
    pub(super) fn host_is_full(&self) -> Option<ExecutorError> {
        let room = statvfs(self.run_dir.path()).ok()?;
        (room.blocks_available() * room.fragment_size() < MIN_ROOM_BYTES).then(|| {
            FileError {
                action: "keep what the build writes in",
                path: self.run_dir.path().to_owned(),
                source: nix::Error::ENOSPC.into(),
            }
            .into()
        })
    }

    /// The first death of a process that the build needs.
    pub(super) async fn died(&mut self) -> Death {
        first_death(&mut self.vm, &mut self.device, self.paths.as_mut()).await
    }

    /// The guest has said its last.
    pub(super) async fn finish(mut self) {
        self.vm.finish().await;
        self.end_devices().await;
    }

    pub(super) async fn kill(mut self) {
        self.vm.kill().await;
        self.end_devices().await;
    }

    async fn end_devices(&mut self) {
        self.device.kill().await;
        if let Some(paths) = &mut self.paths {
            paths.kill().await;
        }
    }
}

/// Whether an admitted request is to run VMs of its own.
pub(super) fn wants_kvm(request: &BuildRequest) -> bool {
    let mut asked = request.constraints.iter().flat_map(|constraints| &constraints.available_ro_paths);
    asked.any(|path| path.as_str() == KVM)
}

/// Opens the paths of the host that an admitted request asks for.
fn show(builder: &Builder, request: &BuildRequest) -> Result<(Vec<HostPath>, Vec<Shown>), ExecutorError> {
    let asked = request.constraints.iter().flat_map(|constraints| &constraints.available_ro_paths);
    let mut opened = (Vec::new(), Vec::new());
    for (path, host) in asked.filter_map(|path| Some((path, builder.host.ro_paths.get(path)?))) {
        let shown = Shown::open(host).map_err(|source| FileError {
            action: "show builds the path",
            path: host.clone(),
            source,
        })?;
        let path = path.as_str().trim_start_matches('/').to_owned();
        opened.0.push(HostPath { path, is_directory: shown.is_directory() });
        opened.1.push(shown);
    }
    Ok(opened)
}

/// A VMM that ends hangs up on its device, which then ends with success and may be noticed first; what the VMM said is
/// what happened. A device that fails is no consequence of anything.
async fn first_death(vm: &mut Vm, device: &mut Device, paths: Option<&mut paths::Device>) -> Death {
    let paths_died = async {
        match paths {
            Some(paths) => paths.died().await,
            None => std::future::pending().await,
        }
    };
    let death = tokio::select! {
        biased;
        death = device.died() => death,
        death = paths_died => death,
        death = vm.died() => return death,
    };
    if !death.status.success() {
        return death;
    }
    tokio::time::timeout(AFTERMATH, vm.died()).await.unwrap_or(death)
}

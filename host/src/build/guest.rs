//! A guest in two steps: a machine boots with what must be known before, then a request is bound to it.
//!
//! ```text
//!   Shape ──boot──▶ Booted: connected ──bind(inputs, paths, connections)──▶ machine and stream, for a session
//! ```
//!
//! The scratch disk's size belongs to the shape, too. The host holds it by the size of the file that is the disk, and the VMM
//! tells the guest when it starts. A disk that is larger than its build may use would have nobody but the guest to hold it.

use std::{os::unix::net::UnixStream, path::PathBuf, sync::Arc};

use cofferdam_castore::Store;
use cofferdam_protocol::HostPath;
use tokio::task::spawn_blocking;

use super::{
    error::{BuildError, ExecutorError},
    footprint::{self, Footprint},
    interruption::Interruptions,
    options::Options,
    settings::Settings,
};
use crate::{
    devices::{
        inputs::{self, Tree},
        net,
        paths::{self, Shown},
    },
    limits::Limits,
    machine::{Cause, ConnectError, Device, FileError, Machine, RunDir, jail::Spawner, vmm},
    network::{Broker, Grant},
    request::{AbsolutePath, BuildRequest, KVM},
};

/// How often a guest may boot for one build, see [`Machines::boot`].
const MAX_BOOTS: u32 = 2;

/// The machines of this host.
pub(super) struct Machines {
    pub(super) store: Store,
    pub(super) settings: Settings,
    pub(super) spawner: Spawner,
}

/// What a machine can't change once it has booted, and whose values many requests share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    /// The memory that the build is promised, in bytes.
    pub(super) memory_bytes: u64,
    cpus: u32,
    scratch_bytes: u64,
    /// Most memory that the directories of the inputs take, in bytes.
    inputs_memory_bytes: u64,
    /// Whether the build may run VMs of its own.
    nested: bool,
    /// Most connections at a time over its network device; `None` if it has no such device.
    connections: Option<u32>,
    /// Whether it has a device for paths of the host.
    paths: bool,
}

impl Shape {
    /// For a request that asks for nothing.
    pub(super) fn usual(limits: &Limits) -> Self {
        let &Limits { memory_bytes, cpus, scratch_bytes, inputs_memory_bytes, .. } = limits;
        Self { memory_bytes, cpus, scratch_bytes, inputs_memory_bytes, nested: false, connections: None, paths: false }
    }

    /// For an admitted request whose inputs' directories take so much memory.
    pub(super) fn of(request: &BuildRequest, options: &Options, settings: &Settings, inputs_memory_bytes: u64) -> Self {
        let asked = request.constraints.as_ref().map_or(0, |constraints| constraints.min_memory);
        let usual = Self::usual(&options.limits);
        Self {
            memory_bytes: asked.max(usual.memory_bytes),
            inputs_memory_bytes,
            nested: wants_kvm(request),
            connections: network(request, options, settings).map(|grant| grant.policy.limits.connections),
            paths: shown(request, settings).next().is_some(),
            ..usual
        }
    }

    /// What its footprint depends on.
    fn limits(&self) -> Limits {
        let Self { memory_bytes, cpus, inputs_memory_bytes, .. } = *self;
        Limits { memory_bytes, cpus, inputs_memory_bytes, ..Limits::default() }
    }

    /// Memory of the host that its network and the opener of its paths take, in bytes.
    fn late_bytes(&self) -> u64 {
        let network = self.connections.map_or(0, footprint::network_bytes);
        network + if self.paths { footprint::OPENER_BYTES } else { 0 }
    }

    /// CPUs of the machine, and most memory of the host that it takes, in bytes.
    pub(super) fn takes(&self, footprint: Footprint) -> (u32, u64) {
        (self.cpus, footprint.bytes(&self.limits()).saturating_add(self.late_bytes()))
    }

    /// The part of that memory which the processes of the machine take, in bytes.
    fn helpers_bytes(&self, footprint: Footprint) -> u64 {
        footprint.helpers_bytes(&self.limits()).saturating_add(self.late_bytes())
    }
}

/// What the build of an admitted request gets of the network.
pub(super) fn network<'o>(request: &BuildRequest, options: &'o Options, settings: &Settings) -> Option<&'o Grant> {
    let asks = request.constraints.as_ref().is_some_and(|constraints| constraints.network_access);
    options.network.as_ref().filter(|_| asks && !settings.withhold_network)
}

/// The paths of the host that an admitted request is shown: as it names them, and where they are.
fn shown<'a>(
    request: &'a BuildRequest,
    settings: &'a Settings,
) -> impl Iterator<Item = (&'a AbsolutePath, &'a PathBuf)> {
    let asked = request.constraints.iter().flat_map(|constraints| &constraints.available_ro_paths);
    asked.filter_map(|path| Some((path, settings.ro_paths.get(path)?)))
}

/// Opens the paths of the host that an admitted request is shown.
pub(super) fn show(request: &BuildRequest, settings: &Settings) -> Result<(Vec<HostPath>, Vec<Shown>), FileError> {
    let opened = shown(request, settings).map(|(path, host)| {
        let shown = Shown::open(host);
        let failed = |source| FileError { action: "show builds the path", path: host.clone(), source };
        let shown = shown.map_err(failed)?;
        let path = path.as_str().trim_start_matches('/').to_owned();
        Ok((HostPath { path, is_directory: shown.is_directory() }, shown))
    });
    opened.collect()
}

/// Whether an admitted request is to run VMs of its own.
pub(super) fn wants_kvm(request: &BuildRequest) -> bool {
    let mut asked = request.constraints.iter().flat_map(|constraints| &constraints.available_ro_paths);
    asked.any(|path| path.as_str() == KVM)
}

/// A machine whose guest has connected, and that has no request yet. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Booted {
    pub(super) machine: Machine,
    pub(super) stream: UnixStream,
    unbound: Unbound,
}

/// What its devices still lack.
#[derive(Debug)]
struct Unbound {
    inputs: inputs::Unbound,
    paths: Option<paths::Unbound>,
    network: Option<net::Unbound>,
}

/// What a request fills in.
pub(super) struct Binding {
    /// The inputs.
    pub(super) tree: Tree,
    /// The paths of the host, for a machine that has a device for them.
    pub(super) shown: Vec<Shown>,
    /// Makes its connections, if it has a network.
    pub(super) broker: Option<Broker>,
}

impl Booted {
    /// Fills in what its devices lack. If that fails, the machine is killed.
    pub(super) async fn bind(self, binding: Binding) -> Result<(Machine, UnixStream), BuildError> {
        let (Unbound { inputs, paths, network }, Binding { tree, shown, broker }) = (self.unbound, binding);
        if let Some(paths) = paths
            && let Err(error) = paths.bind(shown)
        {
            return Err(end(self.machine, BuildError::Executor(error.into())).await);
        }
        if let Some((network, broker)) = network.zip(broker) {
            network.bind(broker);
        }
        inputs.bind(Arc::new(tree));
        Ok((self.machine, self.stream))
    }
}

/// Kills the machine of a build without a result. If its host's disk is full, this is why the build failed.
pub(super) async fn end(machine: Machine, error: BuildError) -> BuildError {
    let full = machine.host_is_full();
    machine.kill().await;
    match (error, full) {
        (BuildError::Failed(_), Some(full)) => BuildError::Executor(full.into()),
        (error, _) => error,
    }
}

impl Machines {
    /// Boots a machine until its guest connects.
    ///
    /// Where the processor is emulated, one kernel in some hundred hangs or resets itself while it boots: it changes its own code,
    /// and QEMU 7.2 seems to execute for ever what it has translated from the code in between. A guest that never connected has seen
    /// nothing of the request and may boot again.
    pub(super) async fn boot(&self, shape: &Shape, interruptions: &Interruptions<'_>) -> Result<Booted, BuildError> {
        let limit = self.settings.connect_timeout;
        let mut boots = 1;
        loop {
            let started = interruptions.before(self.start(shape)).await?;
            let (mut machine, unbound) = started.map_err(BuildError::Executor)?;
            let error = match interruptions.before(machine.connected(limit)).await {
                Ok(Ok(stream)) => return Ok(Booted { machine, stream, unbound }),
                Ok(Err(error)) => error,
                Err(interrupted) => return Err(end(machine, interrupted).await),
            };
            machine.kill().await;
            let what = match error {
                ConnectError::Timeout { .. } if boots < MAX_BOOTS => "did not connect in time",
                ConnectError::Died(death) if death.cause == Cause::Reset && boots < MAX_BOOTS => {
                    "reset itself while it booted"
                }
                error => return Err(BuildError::Executor(error.into())),
            };
            boots += 1;
            tracing::warn!("the guest {what}; booting another");
        }
    }

    async fn start(&self, shape: &Shape) -> Result<(Machine, Unbound), ExecutorError> {
        let Self { store, settings, spawner } = self;
        let helpers_bytes = shape.helpers_bytes(Footprint::of(&settings.vmm));
        let spawner = &spawner.for_machine(helpers_bytes, shape.cpus)?;
        let run_dir = RunDir::create(&settings.run_dir)?;
        let copy = run_dir.copy_sparse(&settings.image.scratch, vmm::SCRATCH_DISK, shape.scratch_bytes)?;
        let disk = async {
            let copied = spawn_blocking(copy).await;
            copied.map_err(|error| ExecutorError::Thread(error.into()))?.map_err(ExecutorError::from)
        };
        let inputs = async { Ok(inputs::Device::start(spawner, run_dir.path(), store).await?) };
        let paths = async {
            Ok(match shape.paths {
                true => Some(paths::Device::start(spawner, run_dir.path()).await?),
                false => None,
            })
        };
        let network = async {
            Ok(match shape.connections {
                Some(_) => Some(net::Device::start((spawner, run_dir.path()), settings.vmm.kind).await?),
                None => None,
            })
        };
        let ((), (inputs, unbound_inputs), paths, network) = tokio::try_join!(disk, inputs, paths, network)?;
        let mut devices: Vec<Box<dyn Device>> = vec![Box::new(inputs)];
        let mut unbound = Unbound { inputs: unbound_inputs, paths: None, network: None };
        if let Some((paths, shown)) = paths {
            unbound.paths = Some(shown);
            devices.push(Box::new(paths));
        }
        if let Some((network, connections)) = network {
            unbound.network = Some(connections);
            devices.push(Box::new(network));
        }
        let config = vmm::Config {
            kernel: settings.image.kernel.clone(),
            initramfs: settings.image.initramfs.clone(),
            memory_bytes: footprint::machine_bytes(shape.memory_bytes),
            cpus: shape.cpus,
            cpu_model: settings.cpu_model.clone(),
            hugepages: settings.hugepages,
            attachments: Vec::new(),
            nested: shape.nested,
        };
        let vmm = settings.vmm.vmm();
        let machine = Machine::start((&*vmm, spawner), run_dir, devices, config).await?;
        Ok((machine, unbound))
    }
}

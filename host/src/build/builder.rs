use std::sync::Arc;

use cofferdam_castore::{
    B3Digest, Store,
    blobservice::Lease,
    directoryservice::DirectoryMemory,
    refscan::{self, ReferencePattern},
};
use cofferdam_protocol::Specification;
use tokio_util::sync::CancellationToken;

use super::{
    built::Built,
    conversation::Conversation,
    ending::{Ending, HangUp},
    environment,
    error::{BuildError, ExecutorError, Failed},
    footprint::Footprint,
    guest::{self, Binding, Machines, Shape},
    interruption::Interruptions,
    observer::Observer,
    options::Options,
    phase::Phase,
    progress::Progress,
    settings::Settings,
    standby::{StandbyUse, Taken},
    teardown::Teardown,
};
use crate::{
    devices::inputs,
    machine::{jail::Spawner, sweep},
    network::{Broker, Observe, Policy},
    request::{self, Admitted, BuildRequest, Host, RequestError, RequestErrorKind},
};

/// Runs builds on this host, any number at a time.
pub(crate) struct Builder {
    pub(super) machines: Machines,
    host: Host,
    image_digest: environment::ImageDigest,
}

impl Builder {
    /// A builder for one store; first cleans up after builds whose host process was killed.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// The place for run directories can't be made private or cleaned, or no thread can be started.
    pub(crate) fn new(store: Store, settings: Settings) -> Result<Self, ExecutorError> {
        sweep(&settings.run_dir)?;
        let spawner = Spawner::new(tokio::runtime::Handle::current(), settings.jail.clone())?;
        let host = Host {
            ro_paths: settings.ro_paths.clone(),
            withholds_network: settings.withhold_network,
            network: settings.network,
            nested: settings.nested,
            ..Host::this()
        };
        Ok(Self {
            machines: Machines { store, settings, spawner },
            host,
            image_digest: environment::ImageDigest::default(),
        })
    }

    /// The digest of all that builds on this host can see beside their request and its limits: equal requests give equal
    /// builds only where it is equal, too. It changes with the image, even while this builder is there.
    ///
    /// # Errors
    ///
    /// The image can't be read.
    pub(crate) fn environment(&self) -> std::io::Result<B3Digest> {
        environment::digest(&self.machines.settings, &self.image_digest)
    }

    /// The digests of the guest image's files.
    ///
    /// # Errors
    ///
    /// The image can't be read.
    pub(crate) fn image_digests(&self) -> std::io::Result<environment::ImageDigests> {
        self.image_digest.get(&self.machines.settings.image)
    }

    /// Which connections the build of an admitted request gets; nothing if it has no network.
    pub(crate) fn network<'o>(&self, request: &Admitted, options: &'o Options) -> Option<&'o Policy> {
        guest::network(request, options, &self.machines.settings).map(|grant| &*grant.policy)
    }

    /// Admits a request if this host can build it.
    ///
    /// # Errors
    ///
    /// The first constraint that it can't meet.
    pub(crate) fn admit(&self, request: BuildRequest) -> Result<Admitted, RequestError> {
        request::admit(request, &self.host)
    }

    /// Most memory of this host that the build of an admitted request takes, in bytes.
    pub(crate) fn memory_bytes(&self, request: &Admitted, options: &Options) -> u64 {
        let needles = refscan::memory_bytes(&request.refscan_needles);
        let (_, machine) = self.takes(&self.shape(request, options));
        machine.saturating_add(needles)
    }

    /// The shape of a standby machine that an admitted request can take.
    pub(crate) fn shape(&self, request: &Admitted, options: &Options) -> Shape {
        Shape::of(request, options, &self.machines.settings, options.limits.inputs_memory_bytes)
    }

    /// The shape of a machine for a request that asks for nothing.
    pub(crate) fn usual_shape(&self, options: &Options) -> Shape {
        Shape::usual(&options.limits)
    }

    /// CPUs of a machine of this shape, and most memory of the host that it takes, in bytes.
    pub(crate) fn takes(&self, shape: &Shape) -> (u32, u64) {
        shape.takes(Footprint::of(&self.machines.settings.vmm))
    }

    /// Runs one build, in this standby machine if there is one. It sees only inputs that are in `store`, and its outputs are
    /// written there: the builder's store, or what the build's client sees of it.
    ///
    /// # Errors
    ///
    /// See [`BuildError`]; its variants differ in who has to act.
    pub(crate) async fn build(
        &self,
        (request, options): (&Admitted, &Options),
        store: &Store,
        observer: Arc<dyn Observer>,
        cancel: &CancellationToken,
        standby: Option<Taken>,
    ) -> Result<(Built, Teardown), BuildError> {
        let ending = Arc::new(Ending::new());
        let _at_the_end = HangUp(Arc::clone(&ending));
        let progress = Arc::new(Progress::new(observer, options, Arc::clone(&ending)));
        let interruptions = Interruptions { cancel, progress: Some(&progress) };
        let prepared = async {
            let _turn = progress.turn().await;
            prepare(request, options, store).await
        };
        let Prepared { needles, tree, lease } = interruptions.before(prepared).await??;
        progress.resolved(tree.memory_bytes());
        progress.enter(Phase::Booting);
        let settings = &self.machines.settings;
        let shape = Shape::of(request, options, settings, tree.memory_bytes());
        let (host_paths, shown) = guest::show(request, settings).map_err(|error| BuildError::Executor(error.into()))?;
        let waited = match standby {
            Some(taken) => {
                let taken = interruptions.before(taken.answered()).await?;
                progress.standby(if taken.is_some() { StandbyUse::Used } else { StandbyUse::Broken });
                taken
            }
            None => None,
        };
        let is_greeted = waited.is_some();
        let booted = match waited {
            Some(booted) => booted,
            None => self.machines.boot(&shape, &interruptions).await?,
        };
        let network = guest::network(request, options, settings);
        let observe = Arc::clone(&progress);
        let observe: Observe = Arc::new(move |connection| observe.connection(&connection));
        let broker = network.map(|grant| Broker::new(grant.clone(), observe));
        let (mut machine, stream) = booted.bind(Binding { tree, shown, broker }).await?;
        let conversation = Conversation {
            specification: Specification {
                host_paths,
                network: network.is_some(),
                user_namespaces: settings.user_namespaces,
                ca_file: network
                    .and_then(|grant| grant.policy.ca_file.as_ref())
                    .map(|file| file.contents().to_vec().into()),
                ..specification(request, options)
            },
            store: store.clone(),
            needles,
            options: options.clone(),
            memory_bytes: shape.memory_bytes,
            is_greeted,
            progress: Arc::clone(&progress),
            ending,
        };
        match conversation.hold(&mut machine, stream, &interruptions).await {
            Ok((result, usage)) => {
                let built = Built { result, usage, times: progress.times() };
                Ok((built, Teardown { machine, _lease: lease }))
            }
            Err(error) => match guest::end(machine, error).await {
                BuildError::Failed(failed) => {
                    Err(BuildError::Failed(Box::new(Failed { denials: progress.denials(), ..*failed })))
                }
                error => Err(error),
            },
        }
    }
}

/// What a build needs beside its machine.
struct Prepared {
    needles: ReferencePattern,
    tree: inputs::Tree,
    /// Keeps the inputs in the store.
    lease: Lease,
}

/// Gets ready what a build needs beside its machine.
async fn prepare(request: &BuildRequest, options: &Options, store: &Store) -> Result<Prepared, BuildError> {
    let needles = request.refscan_needles.clone();
    let needles = tokio::task::spawn_blocking(move || ReferencePattern::new(needles))
        .await
        .map_err(|error| BuildError::Executor(ExecutorError::Thread(error.into())))?
        .map_err(|error| {
            let rule = "must fit into memory";
            BuildError::Request(RequestError::new(RequestErrorKind::Invalid, "refscan_needles", rule).got(error))
        })?;
    let nodes: Vec<_> = request.inputs.values().cloned().collect();
    // Before anything is looked for, so that what is found stays to the end.
    let lease = store.blobs.lease(&nodes).map_err(|error| BuildError::Executor(ExecutorError::Store(error)))?;
    let memory = DirectoryMemory::limited(options.limits.inputs_memory_bytes);
    let tree = inputs::resolve(store, &request.inputs, memory).await;
    let time = if request.has_nix_store() { inputs::NIX_TIME } else { inputs::TIME };
    let tree = tree.map(|tree| tree.with_writable(request.writable_inputs()).with_time(time));
    let tree = tree.map_err(|error| match error.missing() {
        Some(wrong) => BuildError::Request(wrong),
        None => BuildError::Executor(ExecutorError::Resolve(error)),
    })?;
    Ok(Prepared { needles, tree, lease })
}

fn specification(request: &BuildRequest, options: &Options) -> Specification {
    let paths = |paths: &[request::RelativePath]| paths.iter().map(|path| path.as_str().to_owned()).collect();
    Specification {
        command_args: request.command_args.clone(),
        environment: request
            .environment_vars
            .iter()
            .map(|variable| (variable.key.clone(), variable.value.to_vec().into()))
            .collect(),
        working_dir: request.working_dir.as_str().to_owned(),
        inputs_dir: request.inputs_dir.as_str().to_owned(),
        scratch_paths: paths(&request.scratch_paths),
        additional_files: request
            .additional_files
            .iter()
            .map(|file| (file.path.as_str().to_owned(), file.contents.to_vec().into()))
            .collect(),
        outputs: paths(&request.outputs),
        provide_bin_sh: request.constraints.as_ref().is_some_and(|constraints| constraints.provide_bin_sh),
        host_paths: Vec::new(),
        network: false,
        kvm: guest::wants_kvm(request),
        processes: options.limits.processes,
        user_namespaces: false,
        ca_file: None,
        secrets: options.secrets.to_protocol(),
        unix_time_ns: 0,
        terminal: None,
    }
}

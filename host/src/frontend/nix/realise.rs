//! Operations that build derivations with all that they need, from what the client has uploaded.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc::{SyncSender, sync_channel},
    thread,
};

use cofferdam_nix::{
    DerivedPath, StorePath,
    protocol::{BuildResult, Status, Version},
    wire::Writer,
};

use super::{
    build,
    building::{self, Job, ended, failed},
    builds::Builds,
    content::SelfHash,
    graph::{self, Graph, LIMITS},
    plan::Plan,
    session::{Session, Stop, Tenant},
};

/// Builds of one request at a time. Each has a thread.
const BUILDS_AT_A_TIME: usize = 8;

/// Messages on their way to the client.
const BUFFERED_MESSAGES: usize = 16;

/// What a client wants, as it says it, and what that is unless it breaks a rule.
type Target = (String, Result<DerivedPath, String>);

/// What a build's thread tells its session.
enum Event<'a> {
    /// Bytes for the client.
    Message(Vec<u8>),
    /// A build has ended.
    Ended(&'a StorePath, Result<BuildResult, Stop>),
}

impl<B: Builds, R: Read, W: Write> Session<B, R, W> {
    pub(super) fn build_paths(&mut self) -> Result<(), Stop> {
        let results = self.realise()?;
        let errors: Vec<_> =
            results.into_iter().filter(|(_, result)| !result.is_success()).map(|(_, result)| result.message).collect();
        if !errors.is_empty() {
            return Err(Stop::Refused(errors.join("\n")));
        }
        Ok(self.answer()?.integer(1_u64)?)
    }

    pub(super) fn build_paths_with_results(&mut self) -> Result<(), Stop> {
        let (results, version) = (self.realise()?, self.version);
        let writer = self.answer()?;
        writer.integer(results.len() as u64)?;
        for (target, result) in results {
            writer.text(target)?;
            result.write(writer, version)?;
        }
        Ok(())
    }

    /// Reads what a client wants.
    fn targets(&mut self) -> Result<Vec<Target>, Stop> {
        let texts = self.reader.texts("the paths to build")?;
        let parsed = texts.into_iter().map(|text| {
            let path = DerivedPath::parse(&text, self.version);
            (text, path)
        });
        Ok(parsed.collect())
    }

    /// Reads what a client wants, and builds what is missing of it.
    fn realise(&mut self) -> Result<Vec<(String, BuildResult)>, Stop> {
        let targets = self.targets()?;
        let mode = self.reader.integer()?;
        if mode != 0 {
            return Err(Stop::Refused(format!("the build mode must be 0, not {mode}: nothing is repaired here")));
        }
        let paths: Vec<_> = targets.iter().filter_map(|(_, path)| path.as_ref().ok()).cloned().collect();
        let graph = Graph::of(&self.tenant, &paths)?;
        let wanted = graph.wanted(&paths)?;
        let valid = self.tenant.valid(&graph.output_paths())?;
        let mut plan = Plan::new(&graph, &wanted, &valid, self.keep_going);
        self.build_all(&graph, &mut plan)?;
        let mut results = Vec::new();
        for (text, path) in targets {
            let result = match path {
                Ok(DerivedPath::Opaque(path)) => self.opaque(&path)?,
                Ok(DerivedPath::Built { derivation, .. }) => {
                    let result = plan.result(&derivation).unwrap_or_else(|| ended(Status::AlreadyValid));
                    graph.with_outputs(&self.tenant, result, &derivation, &wanted[&derivation])?
                }
                Err(rule) => failed(Status::MiscFailure, format!("a path to build {rule}")),
            };
            results.push((text, result));
        }
        Ok(results)
    }

    pub(super) fn query_missing(&mut self) -> Result<(), Stop> {
        let targets = self.targets()?;
        let (mut known, mut unknown) = (Vec::new(), BTreeSet::new());
        for target in targets.into_iter().filter_map(|(_, target)| target.ok()) {
            let (DerivedPath::Opaque(path) | DerivedPath::Built { derivation: path, .. }) = &target;
            match self.tenant.get(path)? {
                Some(_) => known.push(target),
                None => drop(unknown.insert(path.clone())),
            }
        }
        let graph = Graph::of(&self.tenant, &known)?;
        let wanted = graph.wanted(&known)?;
        let valid = self.tenant.valid(&graph.output_paths())?;
        let to_build: BTreeSet<_> = Plan::new(&graph, &wanted, &valid, true).all().collect();
        let writer = self.answer()?;
        writer.texts(to_build)?;
        let (substituted, download_size, nar_size) = ([""; 0], 0_u64, 0_u64);
        writer.texts(substituted)?;
        writer.texts(&unknown)?;
        writer.integer(download_size)?;
        Ok(writer.integer(nar_size)?)
    }

    pub(super) fn query_derivation_output_map(&mut self) -> Result<(), Stop> {
        let path = self.reader.path("the derivation's path")?;
        let derivation = graph::parse(&self.tenant, &path, &self.tenant.require(&path)?)?;
        let mut paths: BTreeMap<_, _> =
            derivation.outputs.iter().map(|(name, output)| (name.clone(), output.path().cloned())).collect();
        if derivation.is_unresolved() {
            let graph = Graph::load(&self.tenant, &BTreeSet::from([path.clone()]), LIMITS)?;
            for (name, found) in &mut paths {
                *found = graph.0[&path].realisation(&self.tenant, name)?.map(|realisation| realisation.path);
            }
        }
        let writer = self.answer()?;
        writer.integer(paths.len() as u64)?;
        for (name, path) in &paths {
            writer.text(name)?;
            writer.optional(path.as_ref())?;
        }
        Ok(())
    }

    fn opaque(&self, path: &StorePath) -> Result<BuildResult, Stop> {
        Ok(match self.tenant.get(path)? {
            Some(_) => ended(Status::AlreadyValid),
            None => {
                let text = format!("path '{path}' is not valid, and is not fetched from elsewhere");
                failed(Status::MiscFailure, text)
            }
        })
    }

    /// Builds what is planned, some at a time.
    fn build_all<'a>(&mut self, graph: &'a Graph, plan: &mut Plan<'a>) -> Result<(), Stop> {
        let Self { tenant, builds, writer, version, .. } = self;
        let (tenant, builds, version) = (&*tenant, &*builds, *version);
        let (mut running, mut activity) = (0, 0);
        thread::scope(|scope| {
            // They are dropped before the threads are joined, so that none of these waits for this one.
            let (sender, events) = sync_channel(BUFFERED_MESSAGES);
            loop {
                while running < BUILDS_AT_A_TIME
                    && let Some(path) = plan.next()
                {
                    activity += 1;
                    running += 1;
                    let build = Build { tenant, graph, path, version, activity, events: sender.clone() };
                    let started = thread::Builder::new()
                        .name("nix build".to_owned())
                        .spawn_scoped(scope, move || build.run(builds));
                    started.map_err(|error| Stop::Refused(format!("can't start a thread for a build: {error}")))?;
                }
                if running == 0 {
                    return Ok(());
                }
                let Ok(event) = events.recv() else { return Ok(()) };
                match event {
                    Event::Message(bytes) => {
                        writer.0.write_all(&bytes)?;
                        writer.0.flush()?;
                    }
                    Event::Ended(path, result) => {
                        running -= 1;
                        plan.ended(path, result?);
                    }
                }
            }
        })
    }
}

/// One build of an operation.
struct Build<'s, 'a> {
    tenant: &'s Tenant,
    graph: &'a Graph,
    path: &'a StorePath,
    version: Version,
    activity: u64,
    events: SyncSender<Event<'a>>,
}

impl Build<'_, '_> {
    fn run(&self, builds: &impl Builds) {
        let built = catch_unwind(AssertUnwindSafe(|| self.build(builds)));
        let result = built.unwrap_or_else(|_| Err(Stop::Refused("a build's thread panicked".to_owned())));
        // The session may have ended.
        let _ = self.events.send(Event::Ended(self.path, result));
    }

    fn build(&self, builds: &impl Builds) -> Result<BuildResult, Stop> {
        let (path, derivation) = self.graph.resolved(self.tenant, self.path)?;
        let self_hash = SelfHash::of(self.version);
        let job = Job { path: &path, derivation: &derivation, logged_as: self.path, self_hash };
        let result = building::build(self.tenant, builds, &job, &mut |told| {
            let mut message = Writer(Vec::new());
            build::message(&mut message, self.version, self.activity, self.path, &told)?;
            self.events.send(Event::Message(message.0)).map_err(|_| Stop::Gone)
        })?;
        if result.is_success() && path != *self.path {
            let known = derivation.outputs.iter().filter_map(|(name, output)| Some((&**name, output.path()?.clone())));
            let found = result.outputs.iter().map(|found| (&*found.id.output, found.path.clone()));
            self.tenant.realise(&self.graph.0[self.path].modulo, known.chain(found))?;
        }
        Ok(result)
    }
}

impl Graph {
    /// The derivations of these targets, with all that they need.
    pub(super) fn of(tenant: &Tenant, targets: &[DerivedPath]) -> Result<Self, Stop> {
        let derivations = targets.iter().filter_map(|target| match target {
            DerivedPath::Built { derivation, .. } => Some(derivation.clone()),
            DerivedPath::Opaque(_) => None,
        });
        Self::load(tenant, &derivations.collect(), LIMITS)
    }

    /// The same result with what the client wants to know of the outputs of a derivation.
    fn with_outputs(
        &self,
        tenant: &Tenant,
        result: BuildResult,
        derivation: &StorePath,
        names: &BTreeSet<String>,
    ) -> Result<BuildResult, Stop> {
        if !result.is_success() {
            return Ok(result);
        }
        let found = names.iter().map(|name| self.0[derivation].realisation(tenant, name));
        let outputs = found.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect();
        Ok(BuildResult { outputs, ..result })
    }
}

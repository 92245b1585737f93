//! The task that owns the queue and all active builds. Everything else sends it messages.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, OnceLock, Weak},
    time::{Duration, Instant},
};

use cofferdam_castore::{B3Digest, blobservice::Lease};
use cofferdam_rpc::Client;
use futures::{FutureExt as _, future::ready};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::sleep_until,
};
use tokio_util::sync::CancellationToken;

use super::{
    ActiveBuild, Message, Prepared, Scheduler, SchedulerSettings, State, Submission, Subscription,
    active_build::{Interest, Subscribers, Tenants},
    draining,
    queue::{Budget, Queue, Refusal, Ticket, Waiting},
    run::{self, Start},
    standbys::Standbys,
};
use crate::{
    build::{Options, failure::Failure},
    records::{self, BuildId},
    request::{Admitted, RequestError, RequestErrorKind},
    telemetry::Amounts,
};

/// While builds wait, the disk is looked at and places in the queue are announced so often. Each build that leaves the queue moves
/// all that wait behind it, and the client of each is told, so that this isn't done for each build that leaves.
const WAITING_PERIOD: Duration = Duration::from_millis(500);

/// How long no other machine boots beside a build that takes one from the stock. It takes a few milliseconds unless it waits for
/// something else, and a boot would take the processors from it.
const TAKING_TIME: Duration = Duration::from_millis(500);

pub(super) struct EventLoop {
    scheduler: Scheduler,
    settings: SchedulerSettings,
    queue: Queue<Client>,
    /// `None` if there is no stock of machines.
    standbys: Option<Standbys>,
    /// Builds that take a standby machine, until their request goes to it, with the time until which no machine boots beside them.
    taking: HashMap<BuildId, Instant>,
    entries: BTreeMap<Ticket, Entry>,
    by_id: HashMap<BuildId, Ticket>,
    /// The latest of the builds with equal keys.
    by_key: HashMap<B3Digest, Ticket>,
    /// When places in the queue are announced next, if builds wait then.
    positions_due: Instant,
    /// Waiting builds by what they wait for, for the metrics.
    waiting: [(&'static str, i64); Waiting::WORDS.len()],
    /// Whether builds may have left the queue, or may wait for something else, since they were counted.
    recount: bool,
    draining: bool,
}

struct Entry {
    build: Arc<ActiveBuild>,
    options: Options,
    state: watch::Sender<State>,
    start: Option<oneshot::Sender<Result<Start, Failure>>>,
    environment: B3Digest,
    /// Keeps the inputs in the store.
    _lease: Lease,
    subscribers: Weak<Subscribers>,
    interests: BTreeMap<Client, Weak<Interest>>,
    /// The interests of clients that need not stay connected.
    detached: BTreeMap<Client, Arc<Interest>>,
}

impl Entry {
    /// A subscription of a client; `None` if nobody waits for the build any more.
    fn subscribe(&mut self, client: &Client) -> Option<Subscription> {
        let known = self.interests.get(client).and_then(Weak::upgrade);
        let interest = match known {
            Some(interest) => interest,
            None => {
                let subscribers = self.subscribers.upgrade()?;
                let interest = Arc::new(Interest { ended: CancellationToken::new(), subscribers });
                self.interests.retain(|_, interest| interest.strong_count() > 0);
                self.interests.insert(client.clone(), Arc::downgrade(&interest));
                interest
            }
        };
        Some(Subscription { build: Arc::clone(&self.build), joined: true, order: None, interest })
    }

    /// Ends a client's interest. Without any other the build is cancelled.
    fn leave(&mut self, client: &Client) {
        let left = self.interests.remove(client);
        self.detached.remove(client);
        if self.interests.values().all(|interest| interest.strong_count() == 0) {
            self.build.cancel.cancel();
        } else if let Some(left) = left.and_then(|left| left.upgrade()) {
            left.ended.cancel();
        }
    }

    fn is_open(&self) -> bool {
        !self.build.cancel.is_cancelled() && !matches!(*self.state.borrow(), State::Done(_))
    }
}

impl EventLoop {
    pub(super) fn new(scheduler: Scheduler, settings: SchedulerSettings) -> Self {
        let queue = Queue::new(settings.budget, settings.bounds);
        let (entries, by_id, by_key) = (BTreeMap::new(), HashMap::new(), HashMap::new());
        Self {
            scheduler,
            settings,
            queue,
            standbys: None,
            taking: HashMap::new(),
            entries,
            by_id,
            by_key,
            positions_due: Instant::now(),
            waiting: Waiting::WORDS.map(|word| (word, 0)),
            recount: true,
            draining: false,
        }
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Message>, drain: CancellationToken) {
        let drain_timeout = self.settings.drain_timeout;
        let Scheduler { backend, messages, .. } = &self.scheduler;
        self.standbys = Standbys::new(self.settings.standby.clone(), backend, messages).await;
        self.tend();
        let deadline = async {
            drain.cancelled().await;
            tokio::time::sleep(drain_timeout).await;
        };
        let mut deadline = std::pin::pin!(deadline);
        let mut late = false;
        while !(self.draining && self.entries.is_empty()) {
            let standbys_due = self.standbys.as_ref().and_then(Standbys::due);
            let waiting_due = self.waits().then_some(self.positions_due);
            let taking_due = self.taking.values().copied();
            let due = standbys_due.into_iter().chain(waiting_due).chain(taking_due).min();
            tokio::select! {
                Some(message) = inbox.recv() => self.handle(message),
                () = drain.cancelled(), if !self.draining => self.drain(),
                () = &mut deadline, if !late => {
                    late = true;
                    self.entries.values().for_each(|entry| entry.build.cancel.cancel());
                }
                () = sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {}
            }
            self.start_next();
            self.tend();
            let now = Instant::now();
            if now >= self.positions_due {
                self.positions_due = now + WAITING_PERIOD;
                self.publish_positions();
                self.recount = true;
            }
            self.count();
        }
        if let Some(standbys) = &mut self.standbys {
            standbys.clear().await;
        }
    }

    fn handle(&mut self, message: Message) {
        // If the sender has gone, this drops the answer with its subscription.
        match message {
            Message::Submit(submission, prepared, reply) => drop(reply.send(self.submit(*submission, prepared))),
            Message::Find(id, client, reply) => {
                drop(reply.send(self.entry(id).and_then(|entry| entry.subscribe(&client))));
            }
            Message::Leave(id, client, reply) => {
                let _ = reply.send(self.entry(id).map(|entry| entry.leave(&client)));
            }
            Message::List(reply) => {
                drop(reply.send(self.entries.values().map(|entry| Arc::clone(&entry.build)).collect()));
            }
            Message::Running(reply) => drop(reply.send(self.queue.running_of().clone())),
            Message::Resolved(id, unused_bytes) => {
                if let Some(ticket) = self.by_id.get(&id) {
                    self.queue.give_back(*ticket, unused_bytes);
                    self.recount = true;
                }
            }
            Message::Runs(id) => drop(self.taking.remove(&id)),
            Message::Ended(id) => self.remove(id),
            Message::Standby(id, news) => {
                if let Some(standbys) = &mut self.standbys {
                    standbys.hear(id, news);
                }
            }
        }
    }

    fn entry(&mut self, id: BuildId) -> Option<&mut Entry> {
        self.entries.get_mut(self.by_id.get(&id)?)
    }

    fn submit(&mut self, submission: Submission<Admitted>, prepared: Prepared) -> Result<Subscription, Failure> {
        let Prepared { environment, key, need, expected, lease } = prepared;
        if self.draining {
            return Err(draining());
        }
        if let Some(subscription) = self.join(&submission, key) {
            return Ok(subscription);
        }
        if let Some(standbys) = &mut self.standbys {
            standbys.keep(environment);
        }
        let client = submission.client.clone();
        let terms = self.scheduler.backend.tenants.of(&client).terms;
        let ticket = self.queue.push(client, terms, need).map_err(refused)?;
        let position = self.queue.order().take_while(|other| *other != ticket).count() as u64;
        let waiting_for = self.queue.waiting_for(ticket).unwrap_or(Waiting::Turn);
        self.note(waiting_for);
        let (state, receiver) = watch::channel(State::Queued { position, waiting_for });
        let (start, started) = oneshot::channel();
        let cancel = CancellationToken::new();
        let interest =
            Arc::new(Interest { ended: CancellationToken::new(), subscribers: Arc::new(Subscribers(cancel.clone())) });
        let Submission { client, request, digest, options, detached, rebuild: _, compare_with: _, context, memory } =
            submission;
        let description = records::describe(&request.command_args);
        let recording = self.scheduler.backend.records.begin(records::Request {
            digest,
            environment,
            key,
            client: client.to_string(),
            description: description.clone(),
            output_order: request.output_order(),
            output_paths: request.outputs.iter().map(|path| path.as_str().to_owned()).collect(),
            log_bytes: options.limits.log_bytes,
            secrets: options.secrets.names(),
        });
        let id = recording.id();
        tracing::info!(build = %id, %client, command = description, "accepted");
        let build = Arc::new(ActiveBuild {
            request,
            key,
            expected,
            recording,
            tenants: Mutex::new(Tenants { owner: client.to_string(), others: BTreeSet::new(), are_final: false }),
            shell: Mutex::default(),
            log_failure: OnceLock::new(),
            state: receiver,
            cancel,
            line: self.scheduler.trees.line(&client),
            context,
            _memory: memory,
        });
        let entry = Entry {
            build: Arc::clone(&build),
            options: options.clone(),
            state: state.clone(),
            start: Some(start),
            environment,
            _lease: lease,
            subscribers: Arc::downgrade(&interest.subscribers),
            interests: BTreeMap::from([(client.clone(), Arc::downgrade(&interest))]),
            detached: detached.then(|| (client, Arc::clone(&interest))).into_iter().collect(),
        };
        tokio::spawn(run::run(self.scheduler.clone(), Arc::clone(&build), options, started, state));
        self.entries.insert(ticket, entry);
        self.by_id.insert(id, ticket);
        self.by_key.insert(key, ticket);
        Ok(Subscription { build, joined: false, order: None, interest })
    }

    fn join(&mut self, submission: &Submission<Admitted>, key: B3Digest) -> Option<Subscription> {
        let ticket = *self.by_key.get(&key)?;
        let (client, entry) = (&submission.client, self.entries.get_mut(&ticket)?);
        if !entry.is_open() || entry.options != submission.options {
            return None;
        }
        let subscription = entry.subscribe(client)?;
        if !entry.build.join(client) {
            return None;
        }
        if submission.detached {
            entry.detached.insert(client.clone(), Arc::clone(&subscription.interest));
        }
        let terms = self.scheduler.backend.tenants.of(client).terms;
        if let Some(better) = self.queue.join(ticket, client, terms)
            && let Some(entry) = self.entries.remove(&ticket)
        {
            self.by_id.insert(entry.build.id(), better);
            self.by_key.insert(key, better);
            self.entries.insert(better, entry);
            self.recount = true;
        }
        Some(Subscription { order: Some(submission.request.output_order()), ..subscription })
    }

    fn waits(&self) -> bool {
        self.queue.order().next().is_some()
    }

    fn start_next(&mut self) {
        self.recount |= self.queue.hold(self.waits() && self.scheduler.backend.disk.low().is_some());
        while let Some(ticket) = self.queue.next(Instant::now()) {
            self.recount = true;
            let left = self.queue.budget().without(self.queue.used());
            let Some(entry) = self.entries.get_mut(&ticket) else { continue };
            let Some(start) = entry.start.take() else { continue };
            let mut with = Start { standby: None, room: ready(()).boxed() };
            if let Some(standbys) = &mut self.standbys {
                let shape = self.scheduler.backend.builder.shape(&entry.build.request, &entry.options);
                let standby = standbys.take(shape, entry.environment);
                if standby.is_ok() {
                    self.taking.insert(entry.build.id(), Instant::now() + TAKING_TIME);
                }
                with.standby = Some(standby);
                with.room = standbys.give_way(left);
            }
            // A build that has just been cancelled sends `Ended`.
            let _ = start.send(Ok(with));
        }
    }

    /// Keeps the stock of standby machines.
    fn tend(&mut self) {
        let now = Instant::now();
        self.taking.retain(|_, until| *until > now);
        let waits = self.waits() || !self.taking.is_empty();
        if let Some(standbys) = self.standbys.as_mut().filter(|_| !self.draining) {
            let left = self.queue.budget().without(self.queue.used());
            standbys.tend(left, waits);
        }
    }

    fn publish_positions(&self) {
        for (position, ticket) in self.queue.order().enumerate() {
            let Some((entry, waiting_for)) = self.entries.get(&ticket).zip(self.queue.waiting_for(ticket)) else {
                continue;
            };
            let position = position as u64;
            entry.state.send_if_modified(|state| match state {
                State::Queued { position: p, waiting_for: w } if (*p, *w) != (position, waiting_for) => {
                    (*p, *w) = (position, waiting_for);
                    true
                }
                _ => false,
            });
        }
    }

    fn remove(&mut self, id: BuildId) {
        self.taking.remove(&id);
        let Some(ticket) = self.by_id.remove(&id) else { return };
        self.recount = true;
        if !self.queue.remove(ticket) {
            self.queue.finish(ticket, Instant::now());
        }
        let Some(entry) = self.entries.remove(&ticket) else { return };
        if self.by_key.get(&entry.build.key) == Some(&ticket) {
            self.by_key.remove(&entry.build.key);
        }
    }

    /// Counts one more build that waits.
    fn note(&mut self, waiting: Waiting) {
        let of_word = self.waiting.iter_mut().filter(|(word, _)| *word == waiting.word());
        of_word.for_each(|(_, count)| *count += 1);
    }

    /// Tells the metrics how many builds wait. All are looked at only if that is needed: there may be thousands.
    fn count(&mut self) {
        if std::mem::take(&mut self.recount) {
            self.waiting = Waiting::WORDS.map(|word| (word, 0));
            let all: Vec<_> = self.queue.order().filter_map(|ticket| self.queue.waiting_for(ticket)).collect();
            all.into_iter().for_each(|waiting| self.note(waiting));
        }
        let amounts = |Budget { memory_bytes, cpus, builds }: Budget| Amounts { memory_bytes, cpus, builds };
        let metrics = &self.scheduler.backend.metrics;
        metrics.queue(self.waiting, amounts(self.queue.used()), amounts(self.queue.budget()));
        if let Some(standbys) = &self.standbys {
            let (booting, ready) = standbys.counts();
            metrics.standby(booting, ready);
        }
    }

    /// Refuses waiting builds, and all later submissions.
    fn drain(&mut self) {
        self.draining = true;
        self.recount = true;
        if let Some(standbys) = &mut self.standbys {
            // Their end is waited for at the end of this loop.
            drop(standbys.clear());
        }
        tracing::info!(builds = self.entries.len(), waiting = self.queue.order().count(), "draining");
        for (ticket, entry) in &mut self.entries {
            if self.queue.remove(*ticket)
                && let Some(start) = entry.start.take()
            {
                let _ = start.send(Err(draining()));
            }
        }
    }
}

fn refused(refusal: Refusal) -> Failure {
    match refusal {
        Refusal::Unsatisfiable { resource, .. } => {
            let (field, rule) = match resource {
                "CPUs" => ("limits.cpus", "must not exceed this daemon's [budget] cpus"),
                _ => (
                    "constraints.min_memory",
                    "must leave the build's machine, its processes and inputs_memory within this daemon's [budget] memory",
                ),
            };
            let error = RequestError::new(RequestErrorKind::Unsupported, field, rule);
            Failure::from(error.got(refusal))
        }
        Refusal::Disk { .. } => Failure::executor("quota", refusal.to_string()),
        Refusal::Full { limit, bound, retry_after } => {
            let mut failure = Failure::executor("queue_full", refusal.to_string());
            failure.fields.insert("limit".to_owned(), limit.into());
            failure.fields.insert("allowed".to_owned(), bound.into());
            failure.fields.insert("retry_after_seconds".to_owned(), retry_after.as_secs().into());
            failure
        }
    }
}

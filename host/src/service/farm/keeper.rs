use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
    time::Instant,
};

use cofferdam_castore::B3Digest;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::{
    super::Client, Farm, FarmSettings, Flight, Interest, Message, Order, State, Waiter, draining, flight, need, reuse,
};
use crate::{
    build::Options,
    failure::Failure,
    queue::{Queue, Refusal, Ticket, Waiting},
    records::{self, BuildId},
    request::{RequestError, RequestErrorKind},
};

/// The owner of the queue and of all builds in flight.
pub(super) struct Keeper {
    farm: Farm,
    settings: FarmSettings,
    queue: Queue<Client>,
    entries: BTreeMap<Ticket, Entry>,
    by_id: HashMap<BuildId, Ticket>,
    /// Of equal ones the last that could not join another.
    by_digest: HashMap<B3Digest, Ticket>,
    draining: bool,
}

struct Entry {
    flight: Arc<Flight>,
    options: Options,
    state: watch::Sender<State>,
    start: Option<oneshot::Sender<Result<(), Failure>>>,
    interest: Weak<Interest>,
    /// Keeps it alive when nobody waits.
    detached: Option<Arc<Interest>>,
}

impl Entry {
    fn waiter(&self, joined: bool) -> Option<Waiter> {
        Some(Waiter { flight: Arc::clone(&self.flight), joined, interest: self.interest.upgrade()? })
    }

    fn is_open(&self) -> bool {
        !self.flight.cancel.is_cancelled() && !matches!(*self.state.borrow(), State::Done(_))
    }
}

impl Keeper {
    pub(super) fn new(farm: Farm, settings: FarmSettings) -> Self {
        let queue = Queue::new(settings.budget, settings.bounds);
        let (entries, by_id, by_digest) = (BTreeMap::new(), HashMap::new(), HashMap::new());
        Self { farm, settings, queue, entries, by_id, by_digest, draining: false }
    }

    pub(super) async fn keep(mut self, mut inbox: mpsc::Receiver<Message>, drain: CancellationToken) {
        let drain_timeout = self.settings.drain_timeout;
        let deadline = async {
            drain.cancelled().await;
            tokio::time::sleep(drain_timeout).await;
        };
        let mut deadline = std::pin::pin!(deadline);
        let mut late = false;
        while !(self.draining && self.entries.is_empty()) {
            tokio::select! {
                Some(message) = inbox.recv() => self.take(message),
                () = drain.cancelled(), if !self.draining => self.drain(),
                () = &mut deadline, if !late => {
                    late = true;
                    self.entries.values().for_each(|entry| entry.flight.cancel());
                }
            }
            self.start_next();
            self.tell_positions();
            let waiting = self.queue.order().filter_map(|ticket| self.queue.waiting_for(ticket));
            self.farm.crew.metrics.queue(waiting, self.queue.used(), self.queue.budget());
        }
    }

    fn take(&mut self, message: Message) {
        // Whoever asked may have gone away since; what nobody takes is dropped, and a build's waiter with it.
        match message {
            Message::Order(order, reply) => drop(reply.send(self.order(*order))),
            Message::Find(id, reply) => {
                let entry = self.by_id.get(&id).and_then(|ticket| self.entries.get(ticket));
                drop(reply.send(entry.and_then(|entry| entry.waiter(true))));
            }
            Message::List(reply) => {
                drop(reply.send(self.entries.values().map(|entry| Arc::clone(&entry.flight)).collect()));
            }
            Message::Ended(id) => self.forget(id),
        }
    }

    fn order(&mut self, order: Order) -> Result<Waiter, Failure> {
        if self.draining {
            return Err(draining());
        }
        if let Some(waiter) = self.join(&order) {
            return Ok(waiter);
        }
        let key = reuse::key(&order);
        let ticket = self.queue.push(order.client.clone(), need(&order.request, &order.options)).map_err(refused)?;
        let (state, receiver) = watch::channel(State::Queued { position: 0, waiting_for: Waiting::Turn });
        let (start, started) = oneshot::channel();
        let cancel = CancellationToken::new();
        let interest = Arc::new(Interest(cancel.clone()));
        let Order { client, request, digest, options, detached, rebuild: _, context, paid } = order;
        let recording = self.farm.crew.records.begin(records::Request {
            digest,
            key,
            client: client.to_string(),
            description: records::describe(&request.command_args),
            log_bytes: options.log_bytes,
        });
        let id = recording.id();
        let (joined, shell, log_failure) = (Mutex::default(), Mutex::default(), OnceLock::new());
        let flight = Arc::new(Flight {
            request,
            digest,
            client,
            recording,
            joined,
            shell,
            log_failure,
            state: receiver,
            cancel,
            context,
            _paid: paid,
        });
        let entry = Entry {
            flight: Arc::clone(&flight),
            options: options.clone(),
            state: state.clone(),
            start: Some(start),
            interest: Arc::downgrade(&interest),
            detached: detached.then(|| Arc::clone(&interest)),
        };
        let crew = Arc::clone(&self.farm.crew);
        tokio::spawn(flight::fly(crew, Arc::clone(&flight), options, started, state, self.farm.clone()));
        self.entries.insert(ticket, entry);
        self.by_id.insert(id, ticket);
        self.by_digest.insert(digest, ticket);
        Ok(Waiter { flight, joined: false, interest })
    }

    fn join(&mut self, order: &Order) -> Option<Waiter> {
        let entry = self.entries.get_mut(self.by_digest.get(&order.digest)?)?;
        if !entry.is_open() || entry.options != order.options {
            return None;
        }
        let waiter = entry.waiter(true)?;
        if order.detached {
            entry.detached = Some(Arc::clone(&waiter.interest));
        }
        entry.flight.joined.lock().unwrap_or_else(PoisonError::into_inner).insert(order.client.clone());
        Some(waiter)
    }

    fn start_next(&mut self) {
        while let Some(ticket) = self.queue.next(Instant::now()) {
            if let Some(start) = self.entries.get_mut(&ticket).and_then(|entry| entry.start.take()) {
                // One that was cancelled at this moment says that it has ended.
                let _ = start.send(Ok(()));
            }
        }
    }

    fn tell_positions(&self) {
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

    fn forget(&mut self, id: BuildId) {
        let Some(ticket) = self.by_id.remove(&id) else { return };
        if !self.queue.remove(ticket) {
            self.queue.finish(ticket, Instant::now());
        }
        let Some(entry) = self.entries.remove(&ticket) else { return };
        if self.by_digest.get(&entry.flight.digest) == Some(&ticket) {
            self.by_digest.remove(&entry.flight.digest);
        }
    }

    /// Nothing is taken any more, and what waits won't start.
    fn drain(&mut self) {
        self.draining = true;
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
            let field = if resource == "CPUs" { "limits.cpus" } else { "constraints.min_memory" };
            let rule = "must not exceed what this daemon may use for all builds together";
            let error = RequestError::new(RequestErrorKind::Unsupported, field, rule);
            Failure::from(error.got(refusal))
        }
        Refusal::Full { limit, bound, retry_after } => {
            let mut failure = Failure::executor("queue_full", refusal.to_string());
            failure.fields.insert("limit".to_owned(), limit.into());
            failure.fields.insert("allowed".to_owned(), bound.into());
            failure.fields.insert("retry_after_seconds".to_owned(), retry_after.as_secs().into());
            failure
        }
    }
}

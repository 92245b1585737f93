//! Operations of clients on existing builds. [`super::Operators`] decides who may do them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    sync::Arc,
};

use cofferdam_castore::views::Usage;
use cofferdam_rpc::Client;

use super::{Message, Scheduler, State, Subscription, access::unknown, queue::Load};
use crate::{
    build::{Terminal, failure::Failure},
    records::{BuildId, LogReader, Record, Recorded, Records, RecordsError, Status},
    tenants::Tenant,
};

/// A build that a client has found.
#[derive(Debug)]
pub(crate) enum Found {
    /// It waits or runs. Keeping this keeps it from being cancelled.
    Active(Subscription),
    /// It has ended.
    Ended(Box<Record>),
}

/// A build in a list.
#[derive(Debug)]
pub(crate) struct Listed {
    /// Its record.
    pub record: Record,
    /// Its state, if it is active.
    pub state: Option<State>,
}

/// What a client has of the daemon's disk.
#[derive(Debug)]
pub(crate) struct ClientUsage {
    /// The client.
    pub client: String,
    /// In the store. `None` if the store isn't divided among clients.
    pub stored: Option<Usage>,
    /// Its running builds.
    pub running: Load,
    /// Its builds that have ended.
    pub recorded: Recorded,
    /// What it may have.
    pub allowed: Tenant,
}

/// Part of a list.
#[derive(Debug)]
pub(crate) struct Page {
    /// The latest first. A page may have fewer than requested, or none, although more follow.
    pub builds: Vec<Listed>,
    /// Where the next page begins, if there may be one.
    pub next: Option<BuildId>,
}

impl Scheduler {
    /// Finds a build.
    ///
    /// # Errors
    ///
    /// There is none that the client may see.
    pub(crate) async fn find(&self, client: &Client, id: BuildId) -> Result<Found, Failure> {
        let active = self.ask(client, |reply| Message::Find(id, client.clone(), reply)).await.flatten();
        let found = match active {
            Some(subscription) => Found::Active(subscription),
            None => {
                let record = self.ask_records(client, move |records| records.get(id)).await?;
                Found::Ended(Box::new(record.ok_or_else(unknown)?))
            }
        };
        let operators = &self.backend.operators;
        let is_visible = match &found {
            Found::Active(subscription) => operators.let_see(client, &subscription.build.record()),
            Found::Ended(record) => operators.let_see(client, record),
        };
        is_visible.then_some(found).ok_or_else(unknown)
    }

    /// Ends a client's interest in a build, which is cancelled if no other client waits for it. An operator cancels it for all
    /// clients. A build that has ended is not changed.
    ///
    /// # Errors
    ///
    /// There is none that the client may see.
    pub(crate) async fn cancel(&self, client: &Client, id: BuildId) -> Result<(), Failure> {
        let Found::Active(subscription) = self.find(client, id).await? else { return Ok(()) };
        if self.is_operator(client) {
            subscription.build.cancel.cancel();
        } else {
            let _ = self.ask(client, |reply| Message::Leave(id, client.clone(), reply)).await;
        }
        Ok(())
    }

    /// The wanted builds among those that a client may see, the latest first: at most `most` of those before `before`, which is
    /// [`Page::next`] of the page before.
    ///
    /// # Errors
    ///
    /// The records can't be read.
    pub(crate) async fn list(
        &self,
        client: &Client,
        wanted: impl Fn(&Record) -> bool + Send + 'static,
        before: Option<BuildId>,
        most: usize,
    ) -> Result<Page, Failure> {
        let active = self.ask(client, Message::List).await.unwrap_or_default();
        let mut states: HashMap<_, _> =
            active.iter().map(|build| (build.id(), build.state().borrow().clone())).collect();
        let (theirs, operators) = (client.clone(), self.backend.operators.clone());
        let page = self.ask_records(client, move |records| {
            let wanted = |record: &Record| operators.let_see(&theirs, record) && wanted(record);
            records.list(&wanted, before, most)
        });
        let page = page.await?;
        let listed = |record: Record| Listed { state: states.remove(&record.id), record };
        Ok(Page { builds: page.records.into_iter().map(listed).collect(), next: page.next })
    }

    /// The signed statement of how a build's outputs were made. It names the client that asked first, so only this client and
    /// operators get it.
    ///
    /// # Errors
    ///
    /// There is no build that the client may see, or no statement.
    pub(crate) async fn proof(&self, client: &Client, id: BuildId) -> Result<Vec<u8>, Failure> {
        let none = |why: &str| Err(Failure::wrong("no_provenance", format!("the build has no provenance: {why}")));
        let Found::Ended(record) = self.find(client, id).await? else { return none("it has not ended") };
        if self.owner_for(client, &record) != record.client {
            return none("it was signed for another client, which asked for the build first");
        }
        match self.ask_records(client, move |records| records.proof(id)).await? {
            Some(proof) => Ok(proof),
            None if record.status() == Status::Built => {
                none("a version without provenance built it, or it could not be signed")
            }
            None => none("it made nothing"),
        }
    }

    /// What a client has; for an operator, what each client has.
    ///
    /// # Errors
    ///
    /// It can't be read what they have in the store.
    pub(crate) async fn usage(&self, client: &Client) -> Result<Vec<ClientUsage>, Failure> {
        let running = self.ask(client, Message::Running).await.unwrap_or_default();
        let running: BTreeMap<_, _> = running.into_iter().map(|(client, load)| (client.to_string(), load)).collect();
        let (name, all, backend) = (client.to_string(), self.is_operator(client), Arc::clone(&self.backend));
        let read = self.work(client, move || {
            let stored = match all {
                true => backend.views.usages()?,
                false => backend.views.usage(&name)?.map(|usage| (name.clone(), usage)).into_iter().collect(),
            };
            Ok((stored.into_iter().collect::<BTreeMap<_, _>>(), backend.records.recorded()))
        });
        let (stored, recorded) = read.await?.map_err(|error: io::Error| {
            Failure::executor_because("store", "what clients have in the store can't be read", &error)
        })?;
        let names: BTreeSet<_> = match all {
            true => stored.keys().chain(running.keys()).chain(recorded.keys()).cloned().collect(),
            false => BTreeSet::from([client.to_string()]),
        };
        let usage = |client: String| ClientUsage {
            stored: self.backend.views.are_divided().then(|| stored.get(&client).copied().unwrap_or_default()),
            running: running.get(&client).copied().unwrap_or_default(),
            recorded: recorded.get(&client).copied().unwrap_or_default(),
            allowed: client.parse().map(|client| self.backend.tenants.of(&client)).unwrap_or_default(),
            client,
        };
        Ok(names.into_iter().map(usage).collect())
    }

    /// A build's encoded request, if it is on record.
    ///
    /// # Errors
    ///
    /// There is no build that the client may see.
    pub(crate) async fn request(&self, client: &Client, id: BuildId) -> Result<Option<Vec<u8>>, Failure> {
        self.find(client, id).await?;
        self.ask_records(client, move |records| records.request(id)).await
    }

    /// The key that checks signed statements, in PEM.
    pub(crate) fn public_key(&self) -> String {
        self.backend.signer.key.public().to_pem()
    }

    /// A reader of a build's log, from an offset on.
    ///
    /// # Errors
    ///
    /// There is no build that the client may see, or its log is shorter.
    pub(crate) async fn read_log(&self, client: &Client, id: BuildId, offset: u64) -> Result<LogReader, Failure> {
        self.find(client, id).await?;
        let reader = self.ask_records(client, move |records| records.read_log(id, offset)).await?;
        Ok(reader.ok_or_else(unknown)?.in_turns(self.questions.line(client)))
    }

    /// A reader of the log of a build that the client waits for, from an offset on.
    ///
    /// # Errors
    ///
    /// The client may not see the build, or its log is shorter.
    pub(crate) fn read_log_of(
        &self,
        client: &Client,
        Subscription { build, .. }: &Subscription,
        offset: u64,
    ) -> Result<LogReader, Failure> {
        if !self.backend.operators.let_see(client, &build.record()) {
            return Err(unknown());
        }
        let reader = build.recording.read_log(offset).map_err(|error| Failure::from(&error))?;
        Ok(reader.in_turns(self.questions.line(client)))
    }

    /// Whether a build is on record. Blocks.
    pub(crate) fn has_record(&self, id: BuildId) -> bool {
        // After an error it may be.
        !matches!(self.backend.records.get(id), Ok(None))
    }

    /// Lends a terminal to a build that asks for one. Keeping the returned subscription keeps the build.
    ///
    /// # Errors
    ///
    /// There is no build that the client may see, or it offers no shell.
    pub(crate) async fn use_shell(
        &self,
        client: &Client,
        id: BuildId,
        terminal: Terminal,
    ) -> Result<Subscription, Failure> {
        if let Found::Active(subscription) = self.find(client, id).await?
            && subscription.build.lend(terminal)
        {
            return Ok(subscription);
        }
        Err(Failure::wrong("no_shell", "the build offers no shell now; an event announces it after a failure"))
    }

    /// The client to name to this one as the one that asked for a build.
    pub(crate) fn owner_for(&self, client: &Client, record: &Record) -> String {
        self.backend.operators.owner_for(client, record)
    }

    /// Whether a client may do everything with every build.
    pub(crate) fn is_operator(&self, client: &Client) -> bool {
        self.backend.operators.include(client)
    }

    /// Waits until the scheduler's task answers, or has ended.
    pub(crate) async fn answers(&self) {
        drop(self.tell(Message::List).await);
    }

    async fn ask_records<T: Send + 'static>(
        &self,
        client: &Client,
        question: impl FnOnce(&Records) -> Result<T, RecordsError> + Send + 'static,
    ) -> Result<T, Failure> {
        let backend = Arc::clone(&self.backend);
        let answer = self.work(client, move || question(&backend.records)).await?;
        answer.map_err(|error| Failure::from(&error))
    }
}

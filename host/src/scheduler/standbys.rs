//! The standby machines of this daemon: carries out what [`Stock`] decides.

use std::{sync::Arc, time::Instant};

use cofferdam_castore::B3Digest;
use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared, join_all},
};
use tokio::{sync::mpsc, task::spawn_blocking};

use super::{
    Backend, Message, StandbySettings,
    queue::{Budget, Need},
    stock::{MachineId, Stock},
};
use crate::build::{Builder, News, Shape, Standby, StandbyUse};

/// Ends when standby machines are gone whose room is needed.
pub(super) type Room = BoxFuture<'static, ()>;

/// The end of one machine, for everyone who needs its room.
type Gone = Shared<BoxFuture<'static, ()>>;

/// The stock and its machines.
pub(super) struct Standbys {
    stock: Stock<Shape, B3Digest, Standby>,
    builder: Arc<Builder>,
    /// The environment of the machines in stock.
    environment: Option<B3Digest>,
    messages: mpsc::Sender<Message>,
    /// Machines that are being ended.
    leaving: Vec<Gone>,
}

impl Standbys {
    /// No machines yet. `None` if there are to be none.
    pub(super) async fn new(
        settings: StandbySettings,
        backend: &Arc<Backend>,
        messages: &mpsc::Sender<Message>,
    ) -> Option<Self> {
        if settings.bounds.machines == 0 {
            return None;
        }
        let builder = Arc::clone(&backend.builder);
        let theirs = Arc::clone(&builder);
        // Unless the image can't be read, in which case each build says so.
        let environment = spawn_blocking(move || theirs.environment()).await.ok().and_then(Result::ok);
        let mut stock = Stock::new(settings.bounds);
        let usual = builder.usual_shape(&settings.first);
        stock.count(usual, need(&builder, &usual), Instant::now());
        Some(Self { stock, builder, environment, messages: messages.clone(), leaving: Vec::new() })
    }

    /// Counts a build that starts, and takes a machine for it.
    pub(super) fn take(&mut self, shape: Shape, environment: B3Digest) -> Result<Standby, StandbyUse> {
        self.stock.count(shape, need(&self.builder, &shape), Instant::now());
        self.stock.take(shape, environment).ok_or(StandbyUse::NoneInStock)
    }

    /// Ends machines until the others fit into what builds leave of the budget. The room is free once the future ends.
    pub(super) fn give_way(&mut self, left: Budget) -> Room {
        let gone = self.stock.fit_into(left, Instant::now());
        self.end(gone);
        self.room()
    }

    /// Ends machines that are of no use to builds in this environment.
    pub(super) fn keep(&mut self, environment: B3Digest) {
        if self.environment.replace(environment) == Some(environment) {
            return;
        }
        let gone = self.stock.keep(environment);
        if !gone.is_empty() {
            tracing::info!(machines = gone.len(), "the guest image has changed: ended the standby machines");
        }
        self.end(gone);
    }

    /// Ends machines that are too old or worth too little, and boots the next one unless a build waits.
    pub(super) fn tend(&mut self, left: Budget, is_waiting: bool) {
        let now = Instant::now();
        let gone = self.stock.expire(now);
        self.end(gone);
        let Some(environment) = self.environment.filter(|_| !is_waiting) else { return };
        let Some((order, displaced)) = self.stock.next(left, now) else { return };
        self.end(displaced);
        let room = self.room();
        let builder = Arc::clone(&self.builder);
        let messages = self.messages.clone();
        let shape = order.shape;
        self.stock.add(&order, environment, now, |id| {
            Standby::start(builder, (shape, environment), room, move |news| {
                let messages = messages.clone();
                // If the event loop has ended, so has the stock.
                tokio::spawn(async move { messages.send(Message::Standby(id, news)).await });
            })
        });
    }

    /// Takes in news of a machine.
    pub(super) fn hear(&mut self, id: MachineId, news: News) {
        match news {
            News::Ready if self.stock.ready(id) => tracing::info!("a standby machine is ready"),
            News::Lost(why) if let Some(lost) = self.stock.lost(id, Instant::now()) => {
                tracing::warn!(why, "lost a standby machine");
                self.end([lost]);
            }
            // It has been taken or ended.
            News::Ready | News::Lost(_) => {}
        }
    }

    /// Ends all machines. They are gone once the future ends.
    pub(super) fn clear(&mut self) -> Room {
        self.environment = None;
        let gone = self.stock.clear();
        self.end(gone);
        self.room()
    }

    /// When to [tend](Self::tend) them although nothing has happened.
    pub(super) fn due(&self) -> Option<Instant> {
        self.stock.due(Instant::now())
    }

    /// How many boot, and how many are ready.
    pub(super) fn counts(&self) -> (usize, usize) {
        self.stock.counts()
    }

    fn end(&mut self, machines: impl IntoIterator<Item = Standby>) {
        self.leaving.extend(machines.into_iter().map(|machine| {
            // A task of its own, so that it ends even if nobody waits for its room.
            tokio::spawn(machine.end()).map(drop).boxed().shared()
        }));
    }

    /// Ends when all machines that are being ended are gone.
    fn room(&mut self) -> Room {
        self.leaving.retain(|gone| gone.peek().is_none());
        join_all(self.leaving.clone()).map(drop).boxed()
    }
}

fn need(builder: &Builder, shape: &Shape) -> Need {
    let (cpus, memory_bytes) = builder.takes(shape);
    Need { memory_bytes, cpus, disk_bytes: 0 }
}

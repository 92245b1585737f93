use cofferdam_proto::cofferdam::v1::{Accepted, Event, LogChunk, ShellOffer, event};
use tonic::Status;

use super::{
    convert,
    outlet::{Gone, Outlet},
    records_status,
};
use crate::{
    network::Connection,
    records::{LogReader, Record},
    scheduler::{State, Subscription},
};

/// Tells how a build goes on. The client waits for it as long as it listens.
pub(super) async fn tell_active(
    subscription: Subscription,
    accepted: Accepted,
    log: Option<LogReader>,
    outlet: Outlet<Event>,
) {
    let mut teller = Teller { outlet, log, connections: 0 };
    // Nobody listens any more when it breaks off.
    let _ = teller.build(&subscription, accepted).await;
}

/// Tells how a build went.
pub(super) async fn tell_record(record: Record, accepted: Accepted, log: Option<LogReader>, outlet: Outlet<Event>) {
    let mut teller = Teller { outlet, log, connections: 0 };
    let _ = teller.record(&record, accepted).await;
}

struct Teller {
    outlet: Outlet<Event>,
    log: Option<LogReader>,
    /// How many connections have been told.
    connections: usize,
}

impl Teller {
    async fn build(&mut self, subscription: &Subscription, accepted: Accepted) -> Result<(), Gone> {
        self.say(event::Event::Accepted(accepted)).await?;
        let mut state = subscription.build.state();
        state.mark_changed();
        let mut connected = subscription.build.connected();
        connected.mark_changed();
        let (mut told, mut offered) = (None, false);
        loop {
            let offset = self.log.as_ref().map_or(0, LogReader::position);
            tokio::select! {
                biased;
                () = self.outlet.closed() => return Err(Gone),
                record = subscription.left() => return self.say(event::Event::Done(convert::done(&record))).await,
                changed = state.changed() => {
                    if changed.is_err() {
                        return self.outlet.refuse(Status::internal("the build's task panicked"));
                    }
                    let now = state.borrow_and_update().clone();
                    match now {
                        State::Done(record) => return self.done(&subscription.arranged(&record)).await,
                        State::Queued { position, waiting_for } => {
                            self.say(event::Event::Queued(convert::queued(position, waiting_for))).await?;
                        }
                        State::Running { phase, sample, shell } => {
                            if told.replace(phase) != Some(phase) {
                                self.say(event::Event::Phase(convert::phase(phase).into())).await?;
                            }
                            if let Some(sample) = sample {
                                self.say(event::Event::Sample(convert::sample(&sample))).await?;
                            }
                            if let Some(reason) = shell.filter(|_| !std::mem::replace(&mut offered, true)) {
                                let offer = ShellOffer { reason: reason.to_string() };
                                self.say(event::Event::Shell(offer)).await?;
                            }
                        }
                    }
                }
                Ok(()) = connected.changed() => {
                    let connections = subscription.build.connections_after(self.connections);
                    self.connections(&connections).await?;
                }
                bytes = next(&mut self.log) => self.log(offset, bytes).await?,
            }
        }
    }

    async fn record(&mut self, record: &Record, accepted: Accepted) -> Result<(), Gone> {
        self.say(event::Event::Accepted(accepted)).await?;
        self.done(record).await
    }

    async fn connections(&mut self, connections: &[Connection]) -> Result<(), Gone> {
        for connection in connections {
            self.say(event::Event::Connection(convert::connection(connection))).await?;
            self.connections += 1;
        }
        Ok(())
    }

    /// The rest of the connections and of the log, and the end.
    async fn done(&mut self, record: &Record) -> Result<(), Gone> {
        self.connections(record.connections.get(self.connections..).unwrap_or_default()).await?;
        while self.log.is_some() {
            let offset = self.log.as_ref().map_or(0, LogReader::position);
            let bytes = next(&mut self.log).await;
            self.log(offset, bytes).await?;
        }
        self.say(event::Event::Done(convert::done(record))).await
    }

    async fn log(&mut self, offset: u64, bytes: Result<Option<bytes::Bytes>, Status>) -> Result<(), Gone> {
        match bytes {
            Ok(Some(data)) => self.say(event::Event::Log(LogChunk { offset, data })).await,
            Ok(None) => {
                self.log = None;
                Ok(())
            }
            Err(status) => self.outlet.refuse(status),
        }
    }

    async fn say(&self, event: event::Event) -> Result<(), Gone> {
        self.outlet.say(Event { event: Some(event) }).await
    }
}

/// The next bytes of the log; never, when there is none to be told.
async fn next(log: &mut Option<LogReader>) -> Result<Option<bytes::Bytes>, Status> {
    match log {
        Some(log) => log.next().await.map_err(|error| records_status(&error)),
        None => std::future::pending().await,
    }
}

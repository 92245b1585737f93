//! The host's side of a device's connection: asks the build's broker, and passes sockets on.
//!
//! ```text
//!   start ──▶ no build yet ──bind──▶ serves the build ──▶ ends with the device
//!                  └── the device asks for anything ──▶ cut off
//! ```

use std::collections::HashMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::relay::{Ended, Ends, Relay};
use super::socket::{Carried, carried, reset_with_last_copy};
use super::wire::{Answer, NoRequest, Request, receive_request, send_answer};
use crate::network::{Broker, Denial, Opened, Passed, Refusal, Resolved};

/// How long a build may take to name its server.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often connections are looked at that nothing else draws attention to.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long a server may take none of what a build had said before it closed a connection.
const DRAIN_PATIENCE: Duration = Duration::from_secs(300);

/// Most questions that are open at a time. An honest device asks fewer.
const MAX_OPEN: usize = 4096;

/// Why a device's connection was closed from this side.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The connection broke.
    #[error("the connection to the network device failed: {0}")]
    Connection(#[from] io::Error),
    /// The device sent something else than a request: it has been taken over or is broken.
    #[error("the network device broke the protocol: {0}")]
    Protocol(#[from] NoRequest),
    /// The device used an id for two things, or asked too much: it has been taken over or is broken.
    #[error("the network device broke the protocol: {0}")]
    OutOfStep(&'static str),
    /// The task panicked.
    #[error("the task that serves the network device panicked")]
    Panicked,
}

/// The broker that a server still lacks. Dropping it ends the server.
pub struct Unbound(oneshot::Sender<Broker>);

impl Unbound {
    /// Gives the device the connections of a build. It must have asked for none before.
    pub(crate) fn bind(self, broker: Broker) {
        // The device may have gone.
        let _ = self.0.send(broker);
    }
}

impl fmt::Debug for Unbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unbound").finish_non_exhaustive()
    }
}

/// The task that serves one device, until the device closes the connection. Dropping it ends the task.
#[derive(Debug)]
pub(super) struct Server {
    task: JoinHandle<()>,
    ended: oneshot::Receiver<Result<(), ServeError>>,
}

impl Server {
    /// Serves a device that has no build yet.
    pub(super) fn start(socket: OwnedFd) -> io::Result<(Self, Unbound)> {
        // SAFETY: nothing else has this descriptor, and it is closed with the registration.
        let socket = unsafe { AsyncFd::register(socket) }?;
        let (unbound, bound) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let task = tokio::spawn(async move {
            // The server may have been dropped.
            let _ = end.send(serve(socket, bound).await);
        });
        Ok((Self { task, ended }, Unbound(unbound)))
    }

    /// Waits for a failure. Cancel safe. An end is none.
    pub(super) async fn failed(&mut self) -> ServeError {
        if self.ended.is_terminated() {
            return std::future::pending().await;
        }
        match (&mut self.ended).await {
            Ok(Err(error)) => error,
            Ok(Ok(())) => std::future::pending().await,
            Err(_) => ServeError::Panicked,
        }
    }

    /// Waits until everything is on record, once the device has gone.
    pub(super) async fn finish(&mut self) {
        if !self.ended.is_terminated() {
            let _ = (&mut self.ended).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(socket: AsyncFd<OwnedFd>, bound: oneshot::Receiver<Broker>) -> Result<(), ServeError> {
    let Some(broker) = broker(&socket, bound).await? else { return Ok(()) };
    let session = Session {
        socket,
        broker: Arc::new(broker),
        connections: HashMap::new(),
        tasks: JoinSet::new(),
        carried: Carried::default(),
    };
    session.serve().await
}

/// The broker, once it is bound; nothing if the device has gone, or if there will never be one.
///
/// A guest without a build leaves its interface down, so that its device has nothing to ask.
async fn broker(socket: &AsyncFd<OwnedFd>, mut bound: oneshot::Receiver<Broker>) -> Result<Option<Broker>, ServeError> {
    loop {
        tokio::select! {
            biased;
            broker = &mut bound => return Ok(broker.ok()),
            readable = socket.readable() => {
                // What the device has just asked, it may have asked for the build.
                match bound.try_recv() {
                    Err(TryRecvError::Empty) => {}
                    broker => return Ok(broker.ok()),
                }
                match readable?.try_io(|socket| receive_request(socket.get_ref().as_fd())) {
                    Ok(Ok(Some(_))) => return Err(ServeError::OutOfStep("it asked before there was a build")),
                    Ok(Ok(None)) => return Ok(None),
                    Ok(Err(error)) if is_gone(&error) => return Ok(None),
                    Ok(Err(error)) => return Err(error.into()),
                    Err(_) => {}
                }
            }
        }
    }
}

/// One device's connection.
struct Session {
    socket: AsyncFd<OwnedFd>,
    broker: Arc<Broker>,
    connections: HashMap<u32, State>,
    tasks: JoinSet<(u32, Done)>,
    /// By connections that have ended.
    carried: Carried,
}

/// What becomes of a connection.
enum State {
    /// A task connects, or sends the first bytes.
    Busy(AbortHandle),
    /// The build has to name its server.
    Overheard(Opened, Instant),
    /// The device has the socket, or one whose bytes are relayed. This side keeps a copy, by which the kernel tells how much it
    /// has carried.
    Passed(Passed, Option<Relay>),
    /// The device has closed its socket, and the relay still has bytes for the server. That had taken so many at that time.
    Draining(Passed, Relay, Carried, Instant),
}

impl State {
    fn carried(&self) -> Option<Carried> {
        match self {
            Self::Passed(passed, _) | Self::Draining(passed, ..) => carried(&passed.stream),
            Self::Busy(_) | Self::Overheard(..) => None,
        }
    }
}

/// What a task has done.
enum Done {
    Connected(Result<Opened, Refusal>),
    Passed(io::Result<Passed>),
    Resolved(Resolved),
    Relayed(Ended),
}

impl Session {
    async fn serve(mut self) -> Result<(), ServeError> {
        let result = self.serve_all().await;
        for (_, state) in std::mem::take(&mut self.connections) {
            self.end(state, true);
        }
        // What they would have connected is on record only once they have ended.
        self.tasks.shutdown().await;
        result
    }

    async fn serve_all(&mut self) -> Result<(), ServeError> {
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                // First, so that a device that never stops asking can't put off the limits.
                _ = ticks.tick() => self.look().await?,
                Some(done) = self.tasks.join_next() => {
                    // A task that was aborted has nothing to tell.
                    if let Ok((id, done)) = done {
                        self.done(id, done).await?;
                    }
                }
                readable = self.socket.readable() => {
                    let mut readable = readable?;
                    match readable.try_io(|socket| receive_request(socket.get_ref().as_fd())) {
                        Ok(Ok(Some(request))) => self.take(request?).await?,
                        Ok(Err(error)) if is_gone(&error) => return Ok(()),
                        Ok(Ok(None)) => return Ok(()),
                        Ok(Err(error)) => return Err(error.into()),
                        Err(_) => {}
                    }
                }
            }
        }
    }

    async fn take(&mut self, request: Request) -> Result<(), ServeError> {
        if self.tasks.len() + self.connections.len() >= MAX_OPEN {
            return Err(ServeError::OutOfStep("too many questions"));
        }
        let broker = Arc::clone(&self.broker);
        match request {
            Request::Connect { id, .. } if self.connections.contains_key(&id) => {
                return Err(ServeError::OutOfStep("an id is in use"));
            }
            Request::Connect { id, to } => {
                let task = self.tasks.spawn(async move { (id, Done::Connected(broker.connect(to).await)) });
                self.connections.insert(id, State::Busy(task));
            }
            Request::Resolve { id, name, family } => {
                self.tasks.spawn(async move { (id, Done::Resolved(broker.resolve(&name, family).await)) });
            }
            Request::Head { id, bytes } => match self.connections.remove(&id) {
                Some(State::Overheard(opened, since)) => self.overhear(id, opened, since, &bytes).await?,
                // It was just refused, which the device doesn't know yet.
                None => {}
                Some(_) => return Err(ServeError::OutOfStep("nobody listens to a connection")),
            },
            Request::TurnedAway { to, others } => self.broker.turned_away(to, others),
            Request::Close { id, reset } => {
                self.close(id, reset);
            }
        }
        Ok(())
    }

    /// The device has closed a connection.
    fn close(&mut self, id: u32, reset: bool) {
        match self.connections.remove(&id) {
            Some(State::Passed(passed, Some(relay))) if !reset && !relay.has_ended() => {
                let carried = carried(&passed.stream).unwrap_or_default();
                self.connections.insert(id, State::Draining(passed, relay, carried, Instant::now()));
            }
            Some(state) => self.end(state, reset),
            None => {}
        }
    }

    async fn overhear(&mut self, id: u32, mut opened: Opened, since: Instant, bytes: &[u8]) -> Result<(), ServeError> {
        match opened.feed(bytes) {
            Ok(true) => {
                let task = self.tasks.spawn(async move { (id, Done::Passed(opened.pass().await)) });
                self.connections.insert(id, State::Busy(task));
                Ok(())
            }
            Ok(false) => {
                self.connections.insert(id, State::Overheard(opened, since));
                self.answer(&Answer::Speak { id }, None).await
            }
            Err(denial) => {
                self.broker.abandoned(opened, denial);
                self.refuse(id, Refusal::Denied).await
            }
        }
    }

    async fn done(&mut self, id: u32, done: Done) -> Result<(), ServeError> {
        let is_wanted = matches!(self.connections.get(&id), Some(State::Busy(_)));
        match done {
            Done::Resolved(Resolved { found, exists }) => {
                self.answer(&Answer::Resolved { id, found, exists }, None).await
            }
            Done::Relayed(ended) => self.relayed(id, ended).await,
            // The device closed it meanwhile.
            Done::Connected(_) | Done::Passed(_) if !is_wanted => Ok(()),
            Done::Connected(Err(why)) => {
                self.connections.remove(&id);
                self.refuse(id, why).await
            }
            Done::Connected(Ok(opened)) if opened.is_checked() => {
                self.connections.insert(id, State::Overheard(opened, Instant::now()));
                self.answer(&Answer::Speak { id }, None).await
            }
            Done::Connected(Ok(opened)) => match opened.pass().await {
                Ok(passed) => self.pass(id, passed).await,
                Err(_) => self.lost(id).await,
            },
            Done::Passed(Ok(passed)) => self.pass(id, passed).await,
            Done::Passed(Err(_)) => self.lost(id).await,
        }
    }

    async fn lost(&mut self, id: u32) -> Result<(), ServeError> {
        self.connections.remove(&id);
        self.refuse(id, Refusal::Refused).await
    }

    async fn pass(&mut self, id: u32, mut passed: Passed) -> Result<(), ServeError> {
        // Limits on bytes would not hold.
        if carried(&passed.stream).is_none() {
            passed.cut(Denial::Uncounted);
            return self.lost(id).await;
        }
        // This process may have no descriptor left, which is for this connection alone to suffer.
        let Ok((socket, relay)) = self.share(id, &passed) else {
            return self.lost(id).await;
        };
        self.connections.insert(id, State::Passed(passed, relay));
        self.answer(&Answer::Connected { id }, Some(socket)).await
    }

    /// The socket for the device: a copy, or that of a relay where there is a rate.
    fn share(&mut self, id: u32, passed: &Passed) -> io::Result<(OwnedFd, Option<Relay>)> {
        let copy = passed.stream.try_clone()?;
        let Some(rate) = passed.rate.clone() else { return Ok((copy.into(), None)) };
        let (ends, socket) = Ends::new(copy)?;
        let (stop, stopped) = oneshot::channel();
        let task = self.tasks.spawn(async move { (id, Done::Relayed(ends.carry(&rate, stopped).await)) });
        Ok((socket, Some(Relay::new(task, stop))))
    }

    /// A relay has ended.
    async fn relayed(&mut self, id: u32, ended: Ended) -> Result<(), ServeError> {
        match self.connections.get_mut(&id) {
            Some(State::Passed(_, Some(relay))) => match relay.ended(ended) {
                Ok(()) => Ok(()),
                Err(_) => self.refuse(id, Refusal::Refused).await,
            },
            Some(State::Draining(..)) => {
                if let Some(state) = self.connections.remove(&id) {
                    self.end(state, ended.result.is_err());
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    async fn refuse(&mut self, id: u32, why: Refusal) -> Result<(), ServeError> {
        self.answer(&Answer::Refused { id, why }, None).await
    }

    async fn answer(&mut self, answer: &Answer, with: Option<OwnedFd>) -> Result<(), ServeError> {
        let with = with.as_ref().map(OwnedFd::as_fd);
        let since = Instant::now();
        loop {
            let Ok(writable) = timeout(INTERVAL, self.socket.writable()).await else {
                // A device that takes no answers is not to outlive the limits by it.
                self.cut_off_all_if_spent();
                if since.elapsed() > PATIENCE {
                    return Err(ServeError::OutOfStep("it takes no answers"));
                }
                continue;
            };
            match writable?.try_io(|socket| send_answer(socket.get_ref().as_fd(), answer, with)) {
                // The next look for a request finds that the device has gone.
                Ok(Err(error)) if is_gone(&error) => return Ok(()),
                Ok(sent) => return Ok(sent?),
                Err(_) => {}
            }
        }
    }

    /// Ends connections whose build says nothing, and all if they have carried too much.
    async fn look(&mut self) -> Result<(), ServeError> {
        let mute = self.connections.iter().filter_map(|(id, state)| match state {
            State::Overheard(_, since) if since.elapsed() > PATIENCE => Some(*id),
            _ => None,
        });
        for id in mute.collect::<Vec<_>>() {
            if let Some(State::Overheard(opened, _)) = self.connections.remove(&id) {
                self.broker.abandoned(opened, Denial::NoServerName);
                self.refuse(id, Refusal::Denied).await?;
            }
        }
        self.give_up_draining();
        for id in self.cut_off_all_if_spent() {
            // So that the build sees a reset, and not a server that has said all.
            self.refuse(id, Refusal::Denied).await?;
        }
        Ok(())
    }

    /// Ends connections that the device has closed, and whose server takes nothing.
    fn give_up_draining(&mut self) {
        let given_up = self.connections.extract_if(|_, state| {
            let now = state.carried();
            let State::Draining(_, _, before, since) = state else { return false };
            if now != Some(*before) {
                (*before, *since) = (now.unwrap_or_default(), Instant::now());
            }
            since.elapsed() > DRAIN_PATIENCE
        });
        for (_, state) in given_up.collect::<Vec<_>>() {
            self.end(state, true);
        }
    }

    /// Ends all connections if they have carried too much together. Returns which.
    fn cut_off_all_if_spent(&mut self) -> Vec<u32> {
        let open = self.connections.values().filter_map(State::carried);
        let all = open.fold(self.carried, Carried::and);
        if !self.broker.is_spent(all.sent, all.received) {
            return Vec::new();
        }
        let mut ended = Vec::new();
        for (id, state) in &mut self.connections {
            let (passed, relay) = match state {
                State::Passed(passed, relay) => (passed, relay.as_mut()),
                State::Draining(passed, relay, ..) => (passed, Some(relay)),
                State::Busy(_) | State::Overheard(..) => continue,
            };
            if passed.cut(Denial::TooMuch) {
                if let Some(relay) = relay {
                    relay.stop();
                }
                // It may be closed already.
                let _ = passed.stream.shutdown(Shutdown::Both);
                ended.push(*id);
            }
        }
        ended
    }

    /// Ends a connection, and takes note of it.
    fn end(&mut self, state: State, reset: bool) {
        match state {
            State::Busy(task) => task.abort(),
            State::Overheard(opened, _) => self.broker.abandoned(opened, Denial::NoServerName),
            State::Passed(passed, _) | State::Draining(passed, ..) => {
                let carried = carried(&passed.stream).unwrap_or_default();
                self.carried = self.carried.and(carried);
                // A device that has been taken over may have kept the socket, so its copy must be of no use.
                if reset {
                    reset_with_last_copy(&passed.stream);
                } else {
                    // The other side may have closed it already.
                    let _ = passed.stream.shutdown(Shutdown::Both);
                }
                passed.ended(carried.sent, carried.received);
            }
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod hostile;

#[cfg(test)]
mod relayed;

#[cfg(test)]
mod tests;

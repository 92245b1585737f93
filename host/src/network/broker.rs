//! Decides about one build's connections, makes them, and takes note of them.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::check::Check;
use super::pins::Pins;
use super::policy::{Decision, Denial, Policy};
use super::record::{Connection, Observe, Verdict};
use super::{Family, Refusal, floor, own};

/// How long a host may take to accept a connection, or to take the first bytes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Most queries of a build that are asked upstream at a time. Others wait.
const MAX_QUERIES: usize = 32;

/// Most characters of a text on record that is no name.
const MAX_RECORDED_CHARS: usize = 253;

/// One build's way to the network.
pub struct Broker {
    policy: Arc<Policy>,
    pins: Mutex<Pins>,
    connections: Arc<Semaphore>,
    queries: Semaphore,
    is_spent: AtomicBool,
    observe: Observe,
}

/// Puts a connection on record when it is dropped, so that none is left out, whatever becomes of it.
struct Note {
    record: Connection,
    observe: Observe,
}

impl Drop for Note {
    fn drop(&mut self) {
        (self.observe)(std::mem::take(&mut self.record));
    }
}

/// A connection that has been made.
pub(crate) struct Opened {
    stream: TcpStream,
    check: Option<Box<Check>>,
    note: Note,
    permit: OwnedSemaphorePermit,
}

/// A connection that the build may use.
pub(crate) struct Passed {
    /// The socket, which doesn't block.
    pub(crate) stream: std::net::TcpStream,
    note: Note,
    _permit: OwnedSemaphorePermit,
}

/// The answer to a query. Nothing: it can't be found out.
pub(crate) struct Resolved {
    pub(crate) found: Option<Vec<IpAddr>>,
    pub(crate) exists: bool,
}

impl Broker {
    /// A new build's.
    pub fn new(policy: Arc<Policy>, observe: Observe) -> Self {
        let connections = Arc::new(Semaphore::new(policy.limits.connections as usize));
        let (queries, is_spent) = (Semaphore::new(MAX_QUERIES), AtomicBool::new(false));
        Self { policy, pins: Mutex::default(), connections, queries, is_spent, observe }
    }

    /// Resolves a name, if a rule has it. Addresses that the build may not connect to are left out.
    pub(crate) async fn resolve(&self, name: &str, family: Family) -> Resolved {
        if let Err(denial) = self.policy.has_name(name) {
            // What is no name may be long.
            let name: String = name.escape_default().take(MAX_RECORDED_CHARS).collect();
            self.note(Connection { name: Some(name), ..Connection::default() }).record.deny(denial);
            return Resolved { found: Some(Vec::new()), exists: false };
        }
        let _turn = self.queries.acquire().await;
        let Some(mut found) = self.policy.resolvers.look_up(name, family).await else {
            return Resolved { found: None, exists: false };
        };
        let mut dropped = None;
        found.addresses.retain(|address| {
            // One that may be the host's own is left out.
            let may = self.policy.has_address(*address, is_own(floor::canonical(*address)).unwrap_or(true));
            if let Err(denial) = may {
                dropped = Some((*address, denial));
            }
            may.is_ok() && self.pins.lock().add(floor::canonical(*address), name)
        });
        if let Some((address, denial)) = dropped {
            let verdict = Verdict::Denied(format!("{denial}: {address}"));
            drop(self.note(Connection { name: Some(name.to_owned()), verdict, ..Connection::default() }));
        }
        Resolved { found: Some(found.addresses), exists: found.exists }
    }

    /// Connects to an address, if a rule allows it.
    pub(crate) async fn connect(&self, to: SocketAddr) -> Result<Opened, Refusal> {
        let to = SocketAddr::new(floor::canonical(to.ip()), to.port());
        let names = self.pins.lock().names(to.ip());
        let (name, verdict) = (names.first().cloned(), Verdict::Abandoned);
        let mut note = self.note(Connection { name, address: Some(to), verdict, ..Connection::default() });
        let is_own = is_own(to.ip());
        let decided = match self.is_spent.load(Ordering::Relaxed) {
            true => Err(Denial::TooMuch),
            false => self.policy.decide(to, &names, *is_own.as_ref().unwrap_or(&true)),
        };
        let permit = Arc::clone(&self.connections).try_acquire_owned().map_err(|_| Denial::TooMany);
        let (decision, permit) = match decided.and_then(|decision| Ok((decision, permit?))) {
            Ok(allowed) => allowed,
            Err(denial) => {
                let is_unknown = denial == Denial::Own && is_own.is_err();
                note.record.deny(if is_unknown { Denial::Unknown } else { denial });
                return Err(Refusal::Denied);
            }
        };
        let check = match decision {
            Decision::Connect { name } => {
                note.record.name = name;
                None
            }
            Decision::Check { tls, names } => Some(Box::new(Check::new(tls, names))),
        };
        if let Some(check) = &check {
            note.record.name = check.first_name().cloned();
        }
        let connected = timeout(PATIENCE, TcpStream::connect(to)).await;
        let refused = match connected.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into())) {
            Ok(stream) => {
                note.record.verdict = if check.is_some() { denied(Denial::NoServerName) } else { Verdict::Allowed };
                return Ok(Opened { stream, check, note, permit });
            }
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Refusal::Refused,
            Err(_) => Refusal::Unreachable,
        };
        note.record.verdict = if refused == Refusal::Refused { Verdict::Refused } else { Verdict::Unreachable };
        Err(refused)
    }

    /// Takes note of a connection that ended before anything was passed on.
    pub(crate) fn abandoned(&self, mut opened: Opened, why: Denial) {
        opened.note.record.deny(why);
    }

    /// Whether all connections together have carried too much. If so, there are no more.
    pub(crate) fn is_spent(&self, sent: u64, received: u64) -> bool {
        let is_spent = sent > self.policy.limits.sent_bytes || received > self.policy.limits.received_bytes;
        self.is_spent.fetch_or(is_spent, Ordering::Relaxed);
        is_spent
    }

    fn note(&self, record: Connection) -> Note {
        Note { record, observe: Arc::clone(&self.observe) }
    }
}

fn denied(denial: Denial) -> Verdict {
    Verdict::Denied(denial.to_string())
}

impl Opened {
    /// Whether the build has to name its server first.
    pub(crate) fn is_checked(&self) -> bool {
        self.check.is_some()
    }

    /// Takes the next bytes of the build's; none if there will be no more. Returns whether they are enough.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Result<bool, Denial> {
        let Some(check) = &mut self.check else { return Ok(true) };
        match check.feed(bytes)? {
            Some(name) => {
                self.note.record.name = Some(name);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Sends the bytes that were taken, and gives the connection to the build.
    pub(crate) async fn pass(self) -> io::Result<Passed> {
        let Self { mut stream, check, mut note, permit } = self;
        note.record.verdict = Verdict::Allowed;
        if let Some(check) = check {
            let received = check.into_received();
            // The connection may end before the kernel can be asked.
            note.record.sent = received.len() as u64;
            let sent = timeout(PATIENCE, stream.write_all(&received)).await;
            sent.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))?;
        }
        Ok(Passed { stream: stream.into_std()?, note, _permit: permit })
    }
}

impl Passed {
    /// Ends it. So many bytes were sent and received.
    pub(crate) fn ended(mut self, sent: u64, received: u64) {
        (self.note.record.sent, self.note.record.received) = (sent, received);
    }

    /// Takes note that a limit ends it. Returns whether that is new.
    pub(crate) fn cut(&mut self, limit: Denial) -> bool {
        let verdict = denied(limit);
        let is_new = self.note.record.verdict != verdict;
        self.note.record.verdict = verdict;
        is_new
    }
}

/// Whether an address leads to this host itself. An address of NAT64 leads to where the address in it does.
fn is_own(address: IpAddr) -> io::Result<bool> {
    let inner = floor::translated(address).map_or(Ok(false), |inner| own::is_own(inner.into()))?;
    Ok(inner || own::is_own(address)?)
}

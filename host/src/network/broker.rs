//! Decides about one build's connections, makes them, and takes note of them.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
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
use super::{Family, Refusal, floor};

/// How long a host may take to accept a connection, or to take the first bytes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Most queries of a build that are asked upstream at a time. Others wait.
const MAX_QUERIES: usize = 32;

/// One build's way to the network.
pub struct Broker {
    policy: Arc<Policy>,
    pins: Mutex<Pins>,
    connections: Arc<Semaphore>,
    queries: Semaphore,
    is_spent: AtomicBool,
    observe: Observe,
}

/// A connection that has been made.
pub(crate) struct Opened {
    stream: TcpStream,
    check: Option<Box<Check>>,
    /// What will be on record of it.
    record: Connection,
    permit: OwnedSemaphorePermit,
}

/// A connection that the build may use.
pub(crate) struct Passed {
    /// The socket, which doesn't block.
    pub(crate) stream: std::net::TcpStream,
    record: Connection,
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
        let connections = Arc::new(Semaphore::new(policy.connections as usize));
        let (queries, is_spent) = (Semaphore::new(MAX_QUERIES), AtomicBool::new(false));
        Self { policy, pins: Mutex::default(), connections, queries, is_spent, observe }
    }

    /// Resolves a name, if a rule has it. Addresses that the build may not connect to are left out.
    pub(crate) async fn resolve(&self, name: &str, family: Family) -> Resolved {
        if let Err(denial) = self.policy.has_name(name) {
            let denied = Verdict::Denied(denial.to_string());
            let name = Some(name.escape_default().to_string());
            (self.observe)(Connection { name, verdict: denied, ..Connection::default() });
            return Resolved { found: Some(Vec::new()), exists: false };
        }
        let _turn = self.queries.acquire().await;
        let Some(mut found) = self.policy.resolvers.look_up(name, family).await else {
            return Resolved { found: None, exists: false };
        };
        let mut dropped = None;
        found.addresses.retain(|address| {
            let may = self.policy.has_address(*address, is_own(*address));
            if let Err(denial) = may {
                dropped = Some((*address, denial));
            }
            may.is_ok() && self.pins.lock().add(floor::canonical(*address), name)
        });
        if let (Some((address, denial)), true) = (dropped, found.addresses.is_empty()) {
            let verdict = Verdict::Denied(format!("{denial}: {address}"));
            (self.observe)(Connection { name: Some(name.to_owned()), verdict, ..Connection::default() });
        }
        Resolved { found: Some(found.addresses), exists: found.exists }
    }

    /// Connects to an address, if a rule allows it.
    pub(crate) async fn connect(&self, to: SocketAddr) -> Result<Opened, Refusal> {
        let to = SocketAddr::new(floor::canonical(to.ip()), to.port());
        let names = self.pins.lock().names(to.ip());
        let mut record = Connection { name: names.first().cloned(), address: Some(to), ..Connection::default() };
        let decided = match self.is_spent.load(Ordering::Relaxed) {
            true => Err(Denial::TooMuch),
            false => self.policy.decide(to, &names, is_own(to.ip())),
        };
        let permit = Arc::clone(&self.connections).try_acquire_owned().map_err(|_| Denial::TooMany);
        let (decision, permit) = match decided.and_then(|decision| Ok((decision, permit?))) {
            Ok(allowed) => allowed,
            Err(denial) => return Err(self.denied(record, denial)),
        };
        let check = match decision {
            Decision::Connect { name } => {
                record.name = name;
                None
            }
            Decision::Check { tls, names } => Some(Box::new(Check::new(tls, names))),
        };
        if let Some(check) = &check {
            record.name = check.first_name().cloned();
        }
        let connected = timeout(PATIENCE, TcpStream::connect(to)).await;
        let refused = match connected.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into())) {
            Ok(stream) => return Ok(Opened { stream, check, record, permit }),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Refusal::Refused,
            Err(_) => Refusal::Unreachable,
        };
        record.verdict = if refused == Refusal::Refused { Verdict::Refused } else { Verdict::Unreachable };
        (self.observe)(record);
        Err(refused)
    }

    /// Takes note of a connection's end.
    pub(crate) fn ended(&self, passed: Passed, sent: u64, received: u64) {
        (self.observe)(Connection { sent, received, ..passed.record });
    }

    /// Takes note of a connection that ended before anything was passed on.
    pub(crate) fn abandoned(&self, opened: Opened, why: Denial) {
        self.denied(opened.record, why);
    }

    /// Whether all connections together have carried too much. If so, there are no more.
    pub(crate) fn is_spent(&self, sent: u64, received: u64) -> bool {
        let is_spent = sent > self.policy.sent_bytes || received > self.policy.received_bytes;
        self.is_spent.fetch_or(is_spent, Ordering::Relaxed);
        is_spent
    }

    fn denied(&self, mut record: Connection, denial: Denial) -> Refusal {
        record.verdict = Verdict::Denied(denial.to_string());
        (self.observe)(record);
        Refusal::Denied
    }
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
                self.record.name = Some(name);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Sends the bytes that were taken, and gives the connection to the build.
    pub(crate) async fn pass(self) -> io::Result<Passed> {
        let Self { mut stream, check, record, permit } = self;
        if let Some(check) = check {
            let sent = timeout(PATIENCE, stream.write_all(&check.into_received())).await;
            sent.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))?;
        }
        Ok(Passed { stream: stream.into_std()?, record, _permit: permit })
    }
}

/// Whether an address leads to this host itself. It is asked for a route, and sends nothing.
fn is_own(address: IpAddr) -> bool {
    let any = match address {
        IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // Without a route, there is nowhere to connect to either.
    let local = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect((address, 1))?;
        socket.local_addr()
    });
    local.is_ok_and(|local| local.ip() == address)
}

//! Decides about one build's connections, makes them, and takes note of them.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::timeout;

use super::check::{Check, Heard};
use super::clients::Grant;
use super::own::Route;
use super::pace::Pace;
use super::pins::Pins;
use super::policy::{Decision, Denial, Policy};
use super::rate::Rate;
use super::record::{Connection, Observe, Verdict};
use super::stand_ins::StandIns;
use super::{Family, Limits, Refusal, floor, own};

/// How long a host may take to accept a connection, or to take the first bytes.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a host may take to accept a connection over IPv6 to a name that has an IPv4 address, too, so that a build goes on with
/// that in time.
const FALLBACK_PATIENCE: Duration = Duration::from_millis(800);

/// Most queries of a build that are asked upstream at a time. Others wait.
const MAX_QUERIES: usize = 32;

/// Most connections of a build that no server has accepted yet. An honest device asks for no more.
const MAX_HALF_OPEN: usize = 64;

/// Most characters of a text on record that is no name.
const MAX_RECORDED_CHARS: usize = 253;

/// One build's way to the network.
pub struct Broker {
    grant: Grant,
    policy: Arc<Policy>,
    pins: Mutex<Pins>,
    stand_ins: Mutex<StandIns>,
    connections: Arc<Semaphore>,
    half_open: Semaphore,
    opens: Mutex<Pace>,
    queries: Semaphore,
    query_pace: Mutex<Pace>,
    rate: Option<Arc<Rate>>,
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
    permits: Permits,
    rate: Option<Arc<Rate>>,
}

/// A connection's own part, and those of its client and of all builds.
type Permits = (OwnedSemaphorePermit, Vec<OwnedSemaphorePermit>);

/// A connection that the build may use.
pub(crate) struct Passed {
    /// The socket, which doesn't block.
    pub(crate) stream: std::net::TcpStream,
    /// How fast the build's connections may be, if that is limited.
    pub(crate) rate: Option<Arc<Rate>>,
    note: Note,
    _permits: Permits,
}

/// The answer to a query. Nothing: it can't be found out.
pub(crate) struct Resolved {
    pub(crate) found: Option<Vec<IpAddr>>,
    pub(crate) exists: bool,
}

impl Broker {
    /// A new build's.
    pub fn new(grant: Grant, observe: Observe) -> Self {
        let policy = Arc::clone(&grant.policy);
        let limits = policy.limits;
        let rate = NonZeroU64::new(limits.rate).filter(|rate| rate.get() != Limits::UNLIMITED_RATE);
        Self {
            grant,
            policy,
            pins: Mutex::default(),
            stand_ins: Mutex::default(),
            connections: Arc::new(Semaphore::new(limits.connections as usize)),
            half_open: Semaphore::new(MAX_HALF_OPEN),
            opens: Mutex::new(Pace::new(limits.opens)),
            queries: Semaphore::new(MAX_QUERIES),
            query_pace: Mutex::new(Pace::new(limits.queries)),
            rate: rate.map(|rate| Arc::new(Rate::new(rate))),
            is_spent: AtomicBool::new(false),
            observe,
        }
    }

    /// Resolves a name, if a rule has it. Addresses that the build may not connect to are left out.
    pub(crate) async fn resolve(&self, name: &str, family: Family) -> Resolved {
        let may = match self.query_pace.lock().take(Instant::now()) {
            true => self.policy.has_name(name),
            false => Err(Denial::TooManyQueries),
        };
        if let Err(denial) = may {
            // What is no name may be long.
            let name: String = name.escape_default().take(MAX_RECORDED_CHARS).collect();
            self.note(Connection { name: Some(name), ..Connection::default() }).record.deny(denial);
            // The build may ask again for a name that it may have.
            let found = (denial != Denial::TooManyQueries).then(Vec::new);
            return Resolved { found, exists: false };
        }
        if self.policy.proxy.is_some() {
            return self.stand_in(name, family);
        }
        let _turn = self.queries.acquire().await;
        let Some(mut found) = self.policy.resolvers.look_up(name, family).await else {
            let verdict = Verdict::Failed("no DNS server gave a usable answer; see [network] resolvers".to_owned());
            drop(self.note(Connection { name: Some(name.to_owned()), verdict, ..Connection::default() }));
            return Resolved { found: None, exists: false };
        };
        let mut dropped = None;
        found.addresses.retain(|address| {
            // One that may be the host's own is left out.
            let route = route(floor::canonical(*address)).unwrap_or(Route::Own);
            if family == Family::V6 && route == Route::Nowhere {
                return false;
            }
            let may = self.policy.has_address(*address, route == Route::Own);
            let may = may.and_then(|()| {
                let has_room = self.pins.lock().add(floor::canonical(*address), name);
                if has_room { Ok(()) } else { Err(Denial::TooManyNames) }
            });
            if let Err(denial) = may {
                dropped = Some((*address, denial));
            }
            may.is_ok()
        });
        if let Some((address, denial)) = dropped {
            let verdict = Verdict::Denied(format!("{denial}: {address}"));
            drop(self.note(Connection { name: Some(name.to_owned()), verdict, ..Connection::default() }));
        }
        Resolved { found: Some(found.addresses), exists: found.exists }
    }

    /// The address that stands for a name which the proxy will resolve. There is one for every name that a rule has.
    fn stand_in(&self, name: &str, family: Family) -> Resolved {
        if family == Family::V6 {
            return Resolved { found: Some(Vec::new()), exists: true };
        }
        let address = self.stand_ins.lock().address(name);
        if address.is_none() {
            let verdict = denied(Denial::TooManyNames);
            drop(self.note(Connection { name: Some(name.to_owned()), verdict, ..Connection::default() }));
        }
        Resolved { found: address.map(|address| vec![address]), exists: address.is_some() }
    }

    /// Connects to an address, if a rule allows it.
    pub(crate) async fn connect(&self, to: SocketAddr) -> Result<Opened, Refusal> {
        let to = SocketAddr::new(floor::canonical(to.ip()), to.port());
        let stand_in = self.stand_ins.lock().name(to.ip()).map(str::to_owned);
        let names = match &stand_in {
            Some(name) => BTreeSet::from([name.clone()]),
            None => self.pins.lock().names(to.ip()),
        };
        let (name, verdict) = (names.first().cloned(), Verdict::Abandoned);
        let mut note = self.note(Connection { name, address: Some(to), verdict, ..Connection::default() });
        let decided = self.decide(to, stand_in.is_some(), &names);
        let (decision, permits, _half_open) = match decided.and_then(|decision| {
            let (permits, half_open) = self.take()?;
            Ok((decision, permits, half_open))
        }) {
            Ok(allowed) => allowed,
            Err(denial) => {
                note.record.deny(denial);
                return Err(Refusal::Denied);
            }
        };
        let check = match decision {
            Decision::Connect { name } => {
                note.record.name = name;
                None
            }
            Decision::Listen { tls } => Some(Box::new(Check::new(tls, None))),
            Decision::Check { tls, names } => {
                note.record.name = names.first().cloned();
                Some(Box::new(Check::new(tls, Some(names))))
            }
        };
        let has_fallback = to.is_ipv6() && self.pins.lock().have_ipv4(&names);
        let patience = if has_fallback { FALLBACK_PATIENCE } else { PATIENCE };
        match self.open(to, stand_in.as_deref(), patience).await {
            Ok(stream) => {
                note.record.verdict = match &check {
                    Some(check) if check.may_deny() => denied(Denial::NoServerName),
                    _ => Verdict::Allowed,
                };
                Ok(Opened { stream, check, note, permits, rate: self.rate.clone() })
            }
            Err((verdict, refusal)) => {
                note.record.verdict = verdict;
                Err(refusal)
            }
        }
    }

    fn decide(&self, to: SocketAddr, is_stand_in: bool, names: &BTreeSet<String>) -> Result<Decision, Denial> {
        if self.is_spent.load(Ordering::Relaxed) {
            return Err(Denial::TooMuch);
        }
        if !self.opens.lock().take(Instant::now()) {
            return Err(Denial::TooManyOpens);
        }
        if is_stand_in {
            return self.policy.decide_by_name(to.port(), names);
        }
        let route = route(to.ip());
        let is_own = route.as_ref().map_or(true, |route| *route == Route::Own);
        match self.policy.decide(to, names, is_own) {
            Err(Denial::Own) if route.is_err() => Err(Denial::Unknown),
            decided => decided,
        }
    }

    /// Connects, to the proxy if there is one.
    async fn open(
        &self,
        to: SocketAddr,
        stand_in: Option<&str>,
        patience: Duration,
    ) -> Result<TcpStream, (Verdict, Refusal)> {
        if let Some(proxy) = &self.policy.proxy {
            let to = stand_in.map_or_else(|| to.to_string(), |name| format!("{name}:{}", to.port()));
            return proxy.connect(&to).await.map_err(|error| {
                tracing::debug!(to, %error, "no connection by the proxy");
                (Verdict::Failed(error.to_string()), Refusal::Refused)
            });
        }
        let connected = timeout(patience, TcpStream::connect(to)).await;
        connected.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into())).map_err(|error| match error.kind() {
            ErrorKind::ConnectionRefused => (Verdict::Refused, Refusal::Refused),
            _ => (Verdict::Unreachable, Refusal::Unreachable),
        })
    }

    /// Takes one of each of the connections that the build may have.
    fn take(&self) -> Result<(Permits, SemaphorePermit<'_>), Denial> {
        let half_open = self.half_open.try_acquire().map_err(|_| Denial::TooManyHalfOpen)?;
        let own = Arc::clone(&self.connections).try_acquire_owned().map_err(|_| Denial::TooMany)?;
        Ok(((own, self.grant.take_shared()?), half_open))
    }

    /// Takes note of a connection that ended before anything was passed on.
    pub(crate) fn abandoned(&self, mut opened: Opened, why: Denial) {
        if opened.check.as_ref().is_none_or(|check| check.may_deny()) {
            opened.note.record.deny(why);
        }
    }

    /// Takes note of a connection for which the device had no room, nor for so many others.
    pub(crate) fn turned_away(&self, to: SocketAddr, others: u64) {
        let record = Connection { address: Some(to), ..Connection::default() };
        self.note(record).record.deny(Denial::TurnedAway { others });
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
        let heard = check.feed(bytes)?;
        if let Heard::Name(name) = &heard {
            self.note.record.name = Some(name.clone());
        }
        Ok(heard != Heard::Nothing)
    }

    /// Sends the bytes that were taken, and gives the connection to the build.
    pub(crate) async fn pass(self) -> io::Result<Passed> {
        let Self { mut stream, check, mut note, permits, rate } = self;
        note.record.verdict = Verdict::Allowed;
        if let Some(check) = check {
            let received = check.into_received();
            if let Some(rate) = &rate {
                rate.take(received.len()).await;
            }
            // The connection may end before the kernel can be asked.
            note.record.sent = received.len() as u64;
            let sent = timeout(PATIENCE, stream.write_all(&received)).await;
            sent.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))?;
        }
        Ok(Passed { stream: stream.into_std()?, rate, note, _permits: permits })
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

/// Where an address leads. An address of NAT64 leads to where the address in it does.
fn route(address: IpAddr) -> io::Result<Route> {
    let inner = floor::translated(address).map_or(Ok(Route::Other), |inner| own::route(inner.into()))?;
    if inner == Route::Own { Ok(inner) } else { own::route(address) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cofferdam_rpc::Client;

    use super::super::{Limits, Policies, Resolvers, Rules};
    use super::*;

    /// A server, and a broker with these limits that lets its build connect there.
    fn server_and_broker(limits: Limits, total: u32) -> (std::net::TcpListener, SocketAddr, Broker, Recorded) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let allow_addresses = vec![format!("127.0.0.1/32:{}", to.port()).parse().unwrap()];
        let rules = Rules { allow: vec!["a.example".parse().unwrap()], allow_addresses, ..Rules::default() };
        let policy = Policy { limits, ..Policy::new(rules, Resolvers::new(Vec::new())) };
        let grant = Policies::new(policy, BTreeMap::new(), total).grant(&Client::User(1));
        let recorded = Recorded::default();
        let kept = Arc::clone(&recorded);
        (listener, to, Broker::new(grant, Arc::new(move |connection| kept.lock().push(connection))), recorded)
    }

    type Recorded = Arc<Mutex<Vec<Connection>>>;

    /// Connects until that is denied.
    async fn connect_all(broker: &Broker, to: SocketAddr) -> Vec<Opened> {
        let mut opened = Vec::new();
        while let Ok(one) = broker.connect(to).await {
            opened.push(one);
            assert!(opened.len() < 1000, "there is no limit");
        }
        opened
    }

    #[tokio::test]
    async fn each_limit_on_connections_is_denied_with_its_own_reason() {
        let most = Limits { connections: 9, client_connections: 9, opens: 1000, ..Limits::default() };
        for (limits, total, setting) in [
            (Limits { connections: 3, ..most }, 9, "[network] connections"),
            (Limits { client_connections: 3, ..most }, 9, "[network] client_connections"),
            (most, 3, "[network] total_connections"),
        ] {
            let (_server, to, broker, recorded) = server_and_broker(limits, total);
            let mut opened = connect_all(&broker, to).await;
            assert_eq!(opened.len(), 3, "{setting}");
            let denied = recorded.lock().pop().unwrap();
            assert!(denied.to_string().ends_with(&format!("than {setting} allows)")), "{denied}");
            opened.pop();
            assert!(broker.connect(to).await.is_ok(), "{setting}: its place was not given back");
        }
    }

    #[tokio::test]
    async fn builds_that_open_or_ask_too_fast_are_denied_with_the_reason() {
        let limits = Limits { opens: 1, queries: 1, connections: 1000, client_connections: 1000, ..Limits::default() };
        let (_server, to, broker, recorded) = server_and_broker(limits, 1000);
        let _opened = connect_all(&broker, to).await;
        let denied = recorded.lock().pop().unwrap();
        assert!(denied.to_string().contains("than [network] opens allows"), "{denied}");
        // Whoever denies a name says that it doesn't exist, but this one may.
        while broker.resolve("other.example", Family::V4).await.found.is_some() {}
        let denied = recorded.lock().pop().unwrap();
        assert!(denied.to_string().contains("than [network] queries allows"), "{denied}");
    }
}

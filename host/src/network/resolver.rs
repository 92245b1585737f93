//! A client of DNS servers.
//!
//! Each query has a socket and an id of its own, so that an answer can't be forged by someone who sees neither.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::Family;

/// The file that names the host's servers.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The port of DNS.
const PORT: u16 = 53;

/// How long a server may take, and how often each is asked.
const PATIENCE: Duration = Duration::from_secs(2);
const ROUNDS: usize = 2;

/// Most bytes of an answer over UDP.
const MAX_DATAGRAM_BYTES: u16 = 1232;

/// Most addresses of one name that are used.
const MAX_ADDRESSES: usize = 64;

/// Most aliases between a name and its addresses.
const MAX_ALIASES: usize = 16;

/// The servers that resolve names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolvers(Vec<SocketAddr>);

/// What is known of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) addresses: Vec<IpAddr>,
    /// Whether there is such a name, even if it has no addresses.
    pub(super) exists: bool,
}

impl Resolvers {
    /// These servers, to be asked in this order.
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        Self(servers)
    }

    /// The host's, as `/etc/resolv.conf` names them.
    ///
    /// # Errors
    ///
    /// The file can't be read, or names no server.
    pub fn of_host() -> io::Result<Self> {
        let servers = named(&std::fs::read_to_string(RESOLV_CONF)?);
        if servers.is_empty() {
            return Err(io::Error::other(format!("{RESOLV_CONF} names no server")));
        }
        Ok(Self(servers))
    }

    /// Looks a name up. Nothing if no server gives a usable answer.
    pub(super) async fn look_up(&self, name: &str, family: Family) -> Option<Found> {
        let mut name = Name::from_ascii(name).ok()?;
        name.set_fqdn(true);
        for server in self.0.iter().cycle().take(ROUNDS * self.0.len()) {
            match timeout(PATIENCE, ask(*server, &name, family)).await {
                Ok(Ok(Some(found))) => return Some(found),
                Ok(Ok(None)) => tracing::debug!(%server, %name, "a DNS server gave no usable answer"),
                Ok(Err(error)) => tracing::debug!(%server, %name, %error, "a DNS server can't be asked"),
                Err(_) => tracing::debug!(%server, %name, "a DNS server didn't answer in time"),
            }
        }
        None
    }
}

/// The servers in the text of `resolv.conf`.
fn named(text: &str) -> Vec<SocketAddr> {
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    // An address with a zone can't be parsed, and is left out.
    lines.filter_map(|rest| Some(SocketAddr::new(rest.split_ascii_whitespace().next()?.parse().ok()?, PORT))).collect()
}

async fn ask(server: SocketAddr, name: &Name, family: Family) -> io::Result<Option<Found>> {
    let kind = match family {
        Family::V4 => RecordType::A,
        Family::V6 => RecordType::AAAA,
    };
    let mut query = Message::query();
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(name.clone(), kind));
    let mut edns = Edns::new();
    edns.set_max_payload(MAX_DATAGRAM_BYTES);
    query.set_edns(edns);
    let packet = query.to_vec().map_err(io::Error::other)?;

    let any = match server {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(&packet).await?;
    let mut buffer = [0; MAX_DATAGRAM_BYTES as usize];
    let answer = loop {
        let length = socket.recv(&mut buffer).await?;
        // Anything else may be a forgery, which the answer follows.
        if let Some(answer) = answer_to(&query, &buffer[..length]) {
            break answer;
        }
    };
    if !answer.metadata.truncation {
        return Ok(found(&answer, name, kind));
    }
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(packet.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), &packet[..]].concat()).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    Ok(answer_to(&query, &answer).and_then(|answer| found(&answer, name, kind)))
}

/// The message in a packet, if it answers the query.
fn answer_to(query: &Message, packet: &[u8]) -> Option<Message> {
    let answer = Message::from_vec(packet).ok()?;
    let is_answer = answer.metadata.message_type == MessageType::Response && answer.metadata.id == query.metadata.id;
    (is_answer && answer.queries == query.queries).then_some(answer)
}

/// What an answer says of a name. Follows aliases from the name on, and ignores all other records.
fn found(answer: &Message, name: &Name, kind: RecordType) -> Option<Found> {
    let exists = match answer.metadata.response_code {
        ResponseCode::NoError => true,
        ResponseCode::NXDomain => false,
        _ => return None,
    };
    let mut names = vec![name.clone()];
    let mut addresses = BTreeSet::new();
    for _ in 0..MAX_ALIASES {
        let Some(name) = names.pop() else { break };
        for record in answer.answers.iter().filter(|record| record.name == name) {
            match &record.data {
                RData::A(address) if kind == RecordType::A => drop(addresses.insert(IpAddr::V4(address.0))),
                RData::AAAA(address) if kind == RecordType::AAAA => drop(addresses.insert(IpAddr::V6(address.0))),
                RData::CNAME(alias) => names.push(alias.0.clone()),
                _ => {}
            }
        }
    }
    Some(Found { addresses: addresses.into_iter().take(MAX_ADDRESSES).collect(), exists })
}

/// For fuzzing: whether a message answers the query with its id for the IPv4 addresses of a name.
pub(crate) fn is_answer(message: &[u8], name: &str) -> bool {
    let Ok(mut name) = Name::from_ascii(name) else { return false };
    name.set_fqdn(true);
    let mut query = Message::query();
    query.metadata.id = message.first_chunk().map_or(0, |id| u16::from_be_bytes(*id));
    query.add_query(Query::query(name.clone(), RecordType::A));
    let found = answer_to(&query, message).and_then(|answer| found(&answer, &name, RecordType::A));
    found.is_some_and(|found| {
        assert!(found.addresses.len() <= MAX_ADDRESSES && found.addresses.iter().all(IpAddr::is_ipv4));
        true
    })
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::Record;
    use hickory_proto::rr::rdata::{A, CNAME};

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn answer(records: &[(&str, RData)]) -> Message {
        let mut answer = Message::response(1, hickory_proto::op::OpCode::Query);
        answer.add_answers(records.iter().map(|(of, data)| Record::from_rdata(name(of), 60, data.clone())));
        answer
    }

    fn address(text: &str) -> RData {
        RData::A(A(text.parse().unwrap()))
    }

    fn alias(of: &str) -> RData {
        RData::CNAME(CNAME(name(of)))
    }

    #[test]
    fn addresses_are_found_at_the_end_of_aliases_and_nowhere_else() {
        let answer = answer(&[
            ("a.example.", alias("b.example.")),
            ("b.example.", alias("c.example.")),
            ("c.example.", address("93.184.215.14")),
            ("evil.example.", address("10.0.0.5")),
        ]);
        let found = found(&answer, &name("A.example."), RecordType::A).unwrap();
        assert_eq!(found, Found { addresses: vec!["93.184.215.14".parse().unwrap()], exists: true });
    }

    #[test]
    fn aliases_in_a_circle_have_no_address() {
        let answer = answer(&[("a.example.", alias("b.example.")), ("b.example.", alias("a.example."))]);
        assert_eq!(found(&answer, &name("a.example."), RecordType::A).unwrap().addresses.len(), 0);
    }

    #[test]
    fn only_an_answer_to_the_query_counts() {
        let mut query = Message::query();
        query.add_query(Query::query(name("a.example."), RecordType::A));
        let mut answer = Message::response(query.metadata.id, hickory_proto::op::OpCode::Query);
        assert!(answer_to(&query, &answer.to_vec().unwrap()).is_none(), "it has no question");
        answer.add_queries(query.queries.clone());
        assert!(answer_to(&query, &answer.to_vec().unwrap()).is_some());
        answer.metadata.id = answer.metadata.id.wrapping_add(1);
        assert!(answer_to(&query, &answer.to_vec().unwrap()).is_none(), "it has another id");
        assert!(answer_to(&query, &query.to_vec().unwrap()).is_none(), "it is a question");
    }

    #[test]
    fn servers_are_read_from_the_hosts_file() {
        let text = "# nameserver 1.1.1.1\nsearch corp\nnameserver 10.0.0.53\n nameserver\t::1 # local\nnameserver fe80::1%eth0\n";
        assert_eq!(named(text), ["10.0.0.53:53".parse().unwrap(), "[::1]:53".parse().unwrap()]);
    }
}

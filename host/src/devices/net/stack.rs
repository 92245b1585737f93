//! The TCP of the host's side, in user space: smoltcp, between packets of the guest and streams of bytes.
//!
//! It has any address that the guest sends to, and sockets only for connections that the broker has made: it refuses every
//! other packet by itself, with a reset.

use std::collections::VecDeque;
use std::mem;
use std::time::{Duration, Instant};

use cofferdam_protocol::network::{GATEWAY_IPV4, GATEWAY_IPV6, GATEWAY_MAC, GUEST_MAC, IPV4_PREFIX, IPV6_PREFIX, MTU};
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::socket::AnySocket as _;
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::time;
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::packet::Ends;
use super::ring::{FRAME_START, HEADER_BYTES};

/// Each direction of a connection holds so much, in bytes.
pub(super) const BUFFER_BYTES: usize = 256 * 1024;

/// What the guest has not acknowledged yet, on each of the connections that have the most room, in bytes. A guest takes some
/// milliseconds for that, during which its processors would idle for want of more.
const LARGE_BUFFER_BYTES: usize = 2 * 1024 * 1024;

/// Most connections with so much room at a time.
const MAX_LARGE: usize = 2;

/// Each direction of a connection for DNS queries holds so much. Answers that are longer wait elsewhere.
pub(super) const QUERY_BUFFER_BYTES: usize = 4 * 1024;

/// A guest that doesn't acknowledge anything for so long has lost the connection.
const TIMEOUT: time::Duration = time::Duration::from_secs(120);

/// Frames that wait for the guest to take them. Nothing more of the guest's is looked at then.
const MAX_WAITING: usize = 16;

/// Types of Ethernet frames.
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// The stack with its sockets.
pub(super) struct Stack {
    interface: Interface,
    sockets: SocketSet<'static>,
    link: Link,
    started: Instant,
}

impl Stack {
    pub(super) fn new() -> Self {
        let mut link = Link::default();
        let mut config = Config::new(HardwareAddress::Ip);
        // Sequence numbers only have to differ from those of this machine's other connections.
        config.random_seed = u64::from(std::process::id());
        let mut interface = Interface::new(config, &mut link, time::Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            let all = [IpCidr::new(GATEWAY_IPV4.into(), IPV4_PREFIX), IpCidr::new(GATEWAY_IPV6.into(), IPV6_PREFIX)];
            addresses.extend(all);
        });
        interface.set_any_ip(true);
        Self { interface, sockets: SocketSet::new(Vec::new()), link, started: Instant::now() }
    }

    fn now(&self) -> time::Instant {
        let elapsed = i64::try_from(self.started.elapsed().as_micros()).unwrap_or(i64::MAX);
        time::Instant::from_micros(elapsed)
    }

    /// Takes a frame of the guest's, whose packet begins at [`FRAME_START`]. The buffer is given back.
    pub(super) fn take(&mut self, frame: &mut Vec<u8>) {
        mem::swap(&mut self.link.incoming, frame);
        self.link.is_incoming = true;
        let now = self.now();
        self.interface.poll_ingress_single(now, &mut self.link, &mut self.sockets);
        self.link.is_incoming = false;
        mem::swap(&mut self.link.incoming, frame);
    }

    /// Opens the connection that a guest asks for with this packet. Each direction holds so many bytes; that to the guest has
    /// more for a few connections with [`BUFFER_BYTES`]. The socket still listens if the stack can't read the packet.
    pub(super) fn accept(&mut self, ends: Ends, opening: &[u8], buffer_bytes: usize) -> SocketHandle {
        let mut large = 0;
        for (_, socket) in self.sockets.iter_mut() {
            let Some(socket) = Socket::downcast_mut(socket) else { continue };
            large += usize::from(socket.send_capacity() == LARGE_BUFFER_BYTES);
            // One that the guest has reset before it was connected listens again, and would take this packet.
            if socket.is_listening() {
                socket.abort();
            }
        }
        let is_large = buffer_bytes == BUFFER_BYTES && large < MAX_LARGE;
        let to_guest_bytes = if is_large { LARGE_BUFFER_BYTES } else { buffer_bytes };
        let buffer = |bytes| SocketBuffer::new(vec![0; bytes]);
        let mut socket = Socket::new(buffer(buffer_bytes), buffer(to_guest_bytes));
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket.set_timeout(Some(TIMEOUT));
        // A new socket can listen on any port but 0, which no packet has.
        let _ = socket.listen((ends.to.ip(), ends.to.port()));
        let socket = self.sockets.add(socket);
        // No other socket listens now, so this one gets the packet.
        self.pass(opening);
        socket
    }

    /// Takes a packet that has waited. One that no socket wants is refused, with a reset.
    pub(super) fn pass(&mut self, packet: &[u8]) {
        let mut frame = vec![0; FRAME_START];
        frame.extend_from_slice(packet);
        self.take(&mut frame);
    }

    pub(super) fn socket(&mut self, socket: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(socket)
    }

    pub(super) fn remove(&mut self, socket: SocketHandle) {
        self.sockets.remove(socket);
    }

    /// Lets the sockets send. Returns whether any has sent something.
    pub(super) fn send(&mut self) -> bool {
        let now = self.now();
        self.interface.poll_egress(now, &mut self.link, &mut self.sockets) == PollResult::SocketStateChanged
    }

    /// Sends a packet that isn't the stack's.
    pub(super) fn send_packet(&mut self, packet: &[u8]) {
        self.link.waiting.push(packet.len(), |to| to.copy_from_slice(packet));
    }

    /// How long until a socket has something to do by itself.
    pub(super) fn delay(&mut self) -> Option<Duration> {
        let now = self.now();
        self.interface.poll_delay(now, &self.sockets).map(Into::into)
    }

    /// Frames for the guest, oldest first, each with room for virtio's header.
    pub(super) fn waiting(&mut self) -> &mut Waiting {
        &mut self.link.waiting
    }
}

/// Frames that wait for room in the guest's queue.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    frames: VecDeque<Vec<u8>>,
    /// A buffer for the next one.
    spare: Vec<u8>,
}

impl Waiting {
    /// Adds a frame whose packet has this length.
    fn push<R>(&mut self, length: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut frame = mem::take(&mut self.spare);
        frame.resize(FRAME_START + length, 0);
        let filled = fill(&mut frame[FRAME_START..]);
        let is_ipv6 = frame.get(FRAME_START).is_some_and(|first| first >> 4 == 6);
        let ethertype = if is_ipv6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 };
        let header = [&GUEST_MAC[..], &GATEWAY_MAC, &ethertype].concat();
        frame[HEADER_BYTES..FRAME_START].copy_from_slice(&header);
        self.frames.push_back(frame);
        filled
    }

    pub(super) fn first(&mut self) -> Option<&mut Vec<u8>> {
        self.frames.front_mut()
    }

    pub(super) fn remove_first(&mut self) {
        if let Some(frame) = self.frames.pop_front() {
            self.spare = frame;
        }
    }

    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether the guest has to take some first.
    pub(super) fn is_full(&self) -> bool {
        self.frames.len() >= MAX_WAITING
    }
}

/// The link to the guest, as the stack sees it.
#[derive(Debug, Default)]
struct Link {
    incoming: Vec<u8>,
    is_incoming: bool,
    waiting: Waiting,
}

/// A packet from the guest.
struct Incoming<'l>(&'l [u8]);

/// Room for a packet to the guest.
struct Outgoing<'l>(&'l mut Waiting);

impl phy::RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(self.0)
    }
}

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        self.0.push(length, fill)
    }
}

impl phy::Device for Link {
    type RxToken<'l> = Incoming<'l>;
    type TxToken<'l> = Outgoing<'l>;

    fn receive(&mut self, _: time::Instant) -> Option<(Incoming<'_>, Outgoing<'_>)> {
        let is_incoming = mem::take(&mut self.is_incoming);
        let packet = self.incoming.get(FRAME_START..).filter(|_| is_incoming)?;
        Some((Incoming(packet), Outgoing(&mut self.waiting)))
    }

    fn transmit(&mut self, _: time::Instant) -> Option<Outgoing<'_>> {
        (!self.waiting.is_full()).then_some(Outgoing(&mut self.waiting))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU.into();
        // Nothing is lost in memory. The guest is told not to check TCP, but its kernel always checks the headers of IPv4.
        let mut checksum = ChecksumCapabilities::ignored();
        checksum.ipv4 = Checksum::Tx;
        checksum.icmpv4 = Checksum::Tx;
        checksum.icmpv6 = Checksum::Tx;
        capabilities.checksum = checksum;
        capabilities
    }
}

#[cfg(test)]
mod tests {
    use smoltcp::wire::{Icmpv4Packet, Ipv4Packet, TcpPacket};

    use super::super::testing::{Segment, echo, ends, segment};
    use super::*;

    /// The packet that waits for the guest.
    fn sent(stack: &mut Stack) -> Vec<u8> {
        let frame = stack.waiting().first().expect("there is an answer").clone();
        stack.waiting().remove_first();
        assert_eq!(frame[HEADER_BYTES..HEADER_BYTES + 12], [GUEST_MAC, GATEWAY_MAC].concat()[..]);
        frame[FRAME_START..].to_vec()
    }

    #[test]
    fn a_connection_is_accepted_at_any_address_and_others_are_reset() {
        let mut stack = Stack::new();
        let (wanted, other) = (ends("93.184.215.14:443"), ends("93.184.215.15:443"));
        stack.accept(wanted, &segment(wanted, Segment::Syn), BUFFER_BYTES);
        stack.pass(&segment(other, Segment::Syn));
        stack.send();
        let flags = |packet: &[u8]| {
            let ip = Ipv4Packet::new_checked(packet).unwrap();
            assert!(ip.verify_checksum());
            let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
            (ip.src_addr(), tcp.syn(), tcp.ack(), tcp.rst())
        };
        let mut answers = [sent(&mut stack), sent(&mut stack)].map(|packet| flags(&packet));
        answers.sort_unstable();
        let address = |ends: Ends| match ends.to.ip() {
            std::net::IpAddr::V4(address) => address,
            std::net::IpAddr::V6(_) => unreachable!("they are IPv4"),
        };
        assert_eq!(answers, [(address(wanted), true, true, false), (address(other), false, true, true)]);
    }

    #[test]
    fn few_connections_at_a_time_have_much_room() {
        let mut stack = Stack::new();
        let capacity = |stack: &mut Stack, bytes| {
            let ends = ends("93.184.215.14:443");
            let socket = stack.accept(ends, &segment(ends, Segment::Syn), bytes);
            (socket, stack.socket(socket).send_capacity())
        };
        assert_eq!(capacity(&mut stack, QUERY_BUFFER_BYTES).1, QUERY_BUFFER_BYTES);
        let large = [(); MAX_LARGE].map(|()| capacity(&mut stack, BUFFER_BYTES));
        assert_eq!(large.map(|(_, bytes)| bytes), [LARGE_BUFFER_BYTES; MAX_LARGE]);
        assert_eq!(capacity(&mut stack, BUFFER_BYTES).1, BUFFER_BYTES);
        stack.remove(large[0].0);
        assert_eq!(capacity(&mut stack, BUFFER_BYTES).1, LARGE_BUFFER_BYTES);
        assert_eq!(capacity(&mut stack, BUFFER_BYTES).1, BUFFER_BYTES);
    }

    #[test]
    fn the_gateway_answers_an_echo_request() {
        let mut stack = Stack::new();
        stack.pass(&echo(ends("192.0.0.1:0")));
        let answer = sent(&mut stack);
        let ip = Ipv4Packet::new_checked(&answer[..]).unwrap();
        let icmp = Icmpv4Packet::new_checked(ip.payload()).unwrap();
        assert_eq!((ip.src_addr(), icmp.msg_type().into(), icmp.data()), (GATEWAY_IPV4, 0_u8, &b"echo"[..]));
        assert!(icmp.verify_checksum());
    }

    #[test]
    fn a_guest_that_takes_nothing_is_sent_nothing_more() {
        let mut stack = Stack::new();
        let ends = ends("93.184.215.14:443");
        while !stack.waiting().is_full() {
            stack.pass(&segment(ends, Segment::Syn));
        }
        stack.accept(ends, &segment(ends, Segment::Syn), BUFFER_BYTES);
        let before = stack.link.waiting.frames.len();
        assert!(!stack.send(), "there is no room");
        assert_eq!(stack.link.waiting.frames.len(), before);
    }
}

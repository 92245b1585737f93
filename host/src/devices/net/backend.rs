//! The network device, as its VMM sees it.
//!
//! One thread does everything. Whatever wakes it, it takes the guest's frames and the broker's answers, moves bytes between
//! sockets, and gives the guest the frames that come of it, until there is nothing more to do.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::process::exit;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackendMut, VringMutex, VringT as _};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT as _;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::allowance::Allowance;
use super::dns::{self, Received};
use super::events::{Events, Source};
use super::flows::Flows;
use super::packet::Packet;
use super::questions::{Questions, Way};
use super::reply::{Unreachable, datagram, unreachable};
use super::ring::{self, FRAME_START, Given, GuestMemory};
use super::stack::Stack;
use super::wire::Answer;

/// Largest queue, in descriptors.
pub(super) const MAX_QUEUE_SIZE: usize = 1024;

/// Number of queues: the first is for frames to the guest, the second for frames from it.
const QUEUES: usize = 2;

/// Frames of the guest's that are taken before others have their turn.
const BATCH: usize = 64;

/// Turns before the VMM's messages have theirs.
const MAX_TURNS: usize = 256;

/// The exit code of a device that can't go on.
const FAILED: i32 = 1;

/// The number by which the worker knows [`Events`]. Smaller ones are for queues and for ending the worker.
pub(super) const EVENTS_ID: u64 = QUEUES as u64 + 1;

/// The device.
pub(super) struct Backend {
    memory: GuestMemory,
    event_index: bool,
    stack: Stack,
    flows: Flows,
    questions: Questions,
    events: Events,
    allowance: Allowance,
    frame: Vec<u8>,
}

impl Backend {
    pub(super) fn new(memory: GuestMemory, broker: OwnedFd) -> io::Result<Self> {
        let questions = Questions::new(broker);
        let events = Events::new(questions.broker())?;
        let (stack, flows) = (Stack::new(), Flows::default());
        let (allowance, frame) = (Allowance::new(Instant::now()), Vec::new());
        Ok(Self { memory, event_index: false, stack, flows, questions, events, allowance, frame })
    }

    /// What wakes the device beside its queues.
    pub(super) fn events(&self) -> RawFd {
        self.events.as_raw_fd()
    }

    pub(super) fn run(&mut self, vrings: &[VringMutex<GuestMemory>]) -> io::Result<()> {
        let [to_guest, from_guest] = vrings else { return Ok(()) };
        let (mut is_done, mut turns) = (false, 0);
        while !is_done && turns < MAX_TURNS {
            (is_done, turns) = (true, turns + 1);
            let happened = self.events.take()?;
            is_done &= happened.is_empty();
            for source in happened {
                if let Source::Socket { id, readable, writable } = source {
                    self.flows.became(id, readable, writable);
                }
            }
            is_done &= !self.take_answers()?;
            is_done &= !self.take_frames(from_guest)?;
            self.flows.pump(&mut self.stack, &mut self.questions);
            loop {
                let has_sent = self.stack.send();
                if !(self.give_frames(to_guest)? && has_sent) {
                    break;
                }
            }
            self.flows.sweep(&mut self.stack, &mut self.questions);
            self.questions.flush()?;
        }
        let now = Instant::now();
        let deadline = self.flows.deadline().map(|deadline| deadline.saturating_duration_since(now));
        let stack = if self.stack.waiting().is_full() { None } else { self.stack.delay() };
        let soon = (!is_done).then_some(Duration::ZERO);
        self.events.wake_after([deadline, stack, soon, self.allowance.wait(now)].into_iter().flatten().min())
    }

    /// Takes the broker's answers. Returns whether there were any.
    fn take_answers(&mut self) -> io::Result<bool> {
        let mut any = false;
        while let Some((answer, with)) = self.questions.receive()? {
            any = true;
            match (answer, with) {
                (Answer::Connected { id }, Some(with)) => {
                    self.flows.connected(id, with, &mut self.stack, &self.events)?;
                }
                (Answer::Connected { .. }, None) => return Err(io::ErrorKind::UnexpectedEof.into()),
                (Answer::Speak { id }, _) => self.flows.speak(id, &mut self.stack),
                (Answer::Refused { id, why }, _) => self.flows.refused(id, why, &mut self.stack),
                (Answer::Resolved { id, found, exists }, _) => {
                    match self.questions.resolved(id, found.as_deref(), exists) {
                        Some((Way::Datagram(ends), message)) => self.send_datagram(ends, &message),
                        Some((Way::Stream(flow), message)) => self.flows.answer(flow, &message),
                        None => {}
                    }
                }
            }
        }
        Ok(any)
    }

    fn send_datagram(&mut self, ends: super::packet::Ends, message: &[u8]) {
        if let Some(packet) = datagram(ends, message) {
            self.stack.send_packet(&packet);
        }
    }

    /// Takes frames of the guest's. Returns whether there may be more.
    fn take_frames(&mut self, vring: &VringMutex<GuestMemory>) -> io::Result<bool> {
        if !is_usable(vring) || self.must_wait() {
            return Ok(false);
        }
        let mut frame = std::mem::take(&mut self.frame);
        let (mut taken, mut must_wait) = (0, false);
        vring.disable_notification().map_err(io::Error::other)?;
        // A guest that doesn't take what it gets is not answered further.
        while taken < BATCH && !self.stack.waiting().is_full() && !must_wait {
            if !ring::take(vring, &self.memory, &mut frame).map_err(io::Error::other)? {
                break;
            }
            taken += 1;
            let waiting = self.stack.waiting().len();
            if !self.take_frame(&mut frame) || self.stack.waiting().len() > waiting {
                self.allowance.spend(Instant::now());
                must_wait = self.must_wait();
            }
        }
        self.frame = frame;
        if taken > 0 && vring.needs_notification().map_err(io::Error::other)? {
            // The VMM may be gone, and then so is this process.
            let _ = vring.signal_used_queue();
        }
        if must_wait {
            // What the guest sends meanwhile is to wake nobody.
            return Ok(false);
        }
        let has_more = vring.enable_notification().map_err(io::Error::other)?;
        Ok(taken > 0 || (has_more && !self.stack.waiting().is_full()))
    }

    /// Whether the guest has sent so much that led nowhere that it has to wait.
    fn must_wait(&self) -> bool {
        self.allowance.wait(Instant::now()).is_some()
    }

    /// Returns whether anybody takes the packet. One that is answered at once is taken, too.
    fn take_frame(&mut self, frame: &mut Vec<u8>) -> bool {
        let Some(packet) = frame.get(FRAME_START..) else { return false };
        match Packet::of(packet) {
            Packet::Opening(ends) => self.flows.open(ends, packet, &mut self.stack, &mut self.questions),
            Packet::Stack => self.stack.take(frame),
            Packet::Query { ends, message } => match dns::receive(message) {
                // The guest asks again if it isn't taken.
                Received::Query(query) => return self.questions.resolve(query, Way::Datagram(ends)),
                Received::Answer(answer) => self.send_datagram(ends, &answer),
                Received::Nothing => return false,
            },
            Packet::Unreachable => match unreachable(packet, Unreachable::Port) {
                Some(error) => self.stack.send_packet(&error),
                None => return false,
            },
            Packet::Nothing => return false,
        }
        true
    }

    /// Gives the guest the frames that wait for it. Returns whether it has taken all.
    fn give_frames(&mut self, vring: &VringMutex<GuestMemory>) -> io::Result<bool> {
        if !is_usable(vring) {
            return Ok(false);
        }
        while let Some(frame) = self.stack.waiting().first() {
            match ring::give(vring, &self.memory, frame, self.event_index).map_err(io::Error::other)? {
                Given::Whole | Given::Dropped => self.stack.waiting().remove_first(),
                Given::NoRoom => return Ok(false),
            }
        }
        Ok(true)
    }
}

fn is_usable(vring: &VringMutex<GuestMemory>) -> bool {
    let state = vring.get_ref();
    state.is_enabled() && state.get_queue().ready()
}

impl VhostUserBackendMut for Backend {
    type Bitmap = BitmapMmapRegion;
    type Vring = VringMutex<GuestMemory>;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let features = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MTU,
            // Nobody computes the checksums of TCP on a link that is memory.
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
        ];
        features.into_iter().fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |all, bit| all | 1 << bit)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::empty()
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_index = enabled;
    }

    fn update_memory(&mut self, _: GuestMemory) -> io::Result<()> {
        // The one that it has is the same, whose contents have been replaced.
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::CLOEXEC).ok()
    }

    fn handle_event(&mut self, _: u16, _: EventSet, vrings: &[Self::Vring], _: usize) -> io::Result<()> {
        // Without its worker, a process that stayed would only leave the build hanging.
        self.run(vrings).inspect_err(|error| {
            tracing::error!("the network device can't go on: {error}");
            exit(FAILED);
        })
    }
}

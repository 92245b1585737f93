//! The descriptors that the device waits for beside the guest's queues, and its clock, as one descriptor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

/// Events that are looked at in one go.
const BATCH: usize = 64;

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The broker has answered, or takes questions again.
    Broker,
    /// The time is up.
    Clock,
    /// A connection's socket.
    Socket {
        /// The connection.
        id: u32,
        /// It has bytes, or will have no more.
        readable: bool,
        /// It takes bytes, or will take no more.
        writable: bool,
    },
}

const BROKER: u64 = u64::MAX;
const CLOCK: u64 = u64::MAX - 1;

/// All that the device waits for.
#[derive(Debug)]
pub(super) struct Events {
    epoll: OwnedFd,
    clock: TimerFd,
}

impl Events {
    pub(super) fn new(broker: &OwnedFd) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let clock = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
        let edges = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        epoll::add(&epoll, broker, EventData::new_u64(BROKER), edges)?;
        epoll::add(&epoll, clock.as_fd(), EventData::new_u64(CLOCK), EventFlags::IN | EventFlags::ET)?;
        Ok(Self { epoll, clock })
    }

    /// Watches a connection's socket until it is closed.
    pub(super) fn watch(&self, id: u32, socket: impl AsFd) -> io::Result<()> {
        let edges = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        Ok(epoll::add(&self.epoll, socket, EventData::new_u64(id.into()), edges)?)
    }

    /// What has happened since the last call; may be not all of it.
    pub(super) fn take(&self) -> io::Result<Vec<Source>> {
        let mut events = Vec::with_capacity(BATCH);
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&now)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(events.iter().map(Source::of).collect())
    }

    /// Wakes the device after so long.
    pub(super) fn wake_after(&self, delay: Option<Duration>) -> io::Result<()> {
        match delay {
            // Zero would stop the clock.
            Some(delay) => {
                let delay = TimeSpec::from_duration(delay.max(Duration::from_micros(1)));
                Ok(self.clock.set(Expiration::OneShot(delay), TimerSetTimeFlags::empty())?)
            }
            None => Ok(self.clock.unset()?),
        }
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

impl Source {
    fn of(event: &Event) -> Self {
        let (flags, data) = (event.flags, event.data.u64());
        let over = EventFlags::ERR | EventFlags::HUP;
        match data {
            BROKER => Self::Broker,
            CLOCK => Self::Clock,
            id => Self::Socket {
                id: id as u32,
                readable: flags.intersects(EventFlags::IN | EventFlags::RDHUP | over),
                writable: flags.intersects(EventFlags::OUT | over),
            },
        }
    }
}

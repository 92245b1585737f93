//! A file system's queues: takes requests off them and gives the answers back.
//!
//! ```text
//!   kick ──▶ handle_event ──▶ answer_available ──┬──────────────▶ answer ──▶ give_back ──▶ call
//!                                  ▲             └─ jobs ──▶ one of the threads ─┘
//!                                  └── until the queue is empty
//! ```
//!
//! It replaces the backend of the `virtiofsd` crate, of which only what decodes and answers a request is used. That one tries
//! again for ever when a guest's queue makes no sense, takes any number of requests that nobody has answered yet, and lets
//! the VMM migrate the device. Here a queue that makes no sense ends the process: without it the guest would hang.

use std::io;
use std::process;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use parking_lot::Mutex;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringState, VringT as _};
use virtio_queue::{QueueOwnedT as _, QueueT as _};
use virtiofsd::filesystem::FileSystem;
use virtiofsd::server::Server;
use vm_memory::{GuestAddressSpace as _, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;

use super::kind::FS_QUEUE_SIZE;
use super::requests::{Chain, Memory, RequestError, answer};

/// A guest's memory, as it is at the moment.
pub(super) type SharedMemory = GuestMemoryAtomic<Memory>;

/// A queue.
pub(super) type Vring = VringMutex<SharedMemory>;

/// One for FORGET and the like, and one for all other requests (virtio 1.2, section 5.11.2).
const QUEUES: usize = 2;

/// Numbers of feature bits (virtio 1.2, section 6).
const INDIRECT_DESCRIPTORS: u32 = 28;
const EVENT_INDEX: u32 = 29;
const VERSION_1: u32 = 32;

/// Why a queue can't be served any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum QueueError {
    /// Its rings are not in the guest's memory, or one of them makes no sense.
    #[error("a queue's rings make no sense")]
    Rings(#[from] virtio_queue::Error),
    /// The ring of available chains ends outside of the guest's memory, or the guest took chains back.
    #[error("a queue lacks a request that it has announced")]
    Announced,
    /// More requests wait than the queues have room for.
    #[error("a queue has more requests under way than descriptors")]
    TooMany,
    /// A request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The guest can't be notified.
    #[error("can't notify the guest")]
    Notify(#[source] io::Error),
}

/// A request on its way to a thread.
struct Job {
    chain: Chain,
    vring: Vring,
}

/// The device, for the `vhost-user-backend` crate.
pub(super) struct Backend<F: FileSystem + Sync> {
    server: Arc<Server<F>>,
    memory: SharedMemory,
    /// Where requests go; none if they are answered at once.
    jobs: Option<SyncSender<Job>>,
}

impl<F: FileSystem + Send + Sync + 'static> Backend<F> {
    /// Starts the threads that answer requests. Without any, the thread that takes requests off the queue answers them.
    pub(super) fn new(fs: F, memory: SharedMemory, threads: usize) -> io::Result<Self> {
        let server = Arc::new(Server::new(fs));
        let jobs = if threads == 0 { None } else { Some(start(threads, &server)?) };
        Ok(Self { server, memory, jobs })
    }

    /// Answers the requests that are in a queue now, or hands them on. Gives whether there are more by then.
    pub(super) fn answer_available(&self, vring: &Vring) -> Result<bool, QueueError> {
        let mut state = vring.get_mut();
        // The VMM may have stopped it after the kick.
        if !state.get_queue().ready() || !state.is_enabled() {
            return Ok(false);
        }
        let memory = self.memory.memory();
        let announced = state.get_queue().avail_idx(&*memory, Ordering::Acquire)?.0;
        for _ in 0..announced.wrapping_sub(state.get_queue().next_avail()) {
            let chain = state.get_queue_mut().iter(memory.clone())?.next().ok_or(QueueError::Announced)?;
            if let Some(jobs) = &self.jobs {
                let job = Job { chain, vring: vring.clone() };
                jobs.try_send(job).map_err(|_| QueueError::TooMany)?;
            } else {
                let length = answer(&self.server, &chain)?;
                give_back(&mut state, chain.head_index(), length)?;
            }
        }
        Ok(state.get_queue().event_idx_enabled() && state.enable_notification()?)
    }
}

fn give_back(state: &mut VringState<SharedMemory>, head: u16, length: usize) -> Result<(), QueueError> {
    // A chain's buffers have at most 4 GiB.
    state.add_used(head, u32::try_from(length).unwrap_or(u32::MAX))?;
    if state.needs_notification()? {
        state.signal_used_queue().map_err(QueueError::Notify)?;
    }
    Ok(())
}

/// Starts threads that answer requests.
fn start<F>(threads: usize, server: &Arc<Server<F>>) -> io::Result<SyncSender<Job>>
where
    F: FileSystem + Send + Sync + 'static,
{
    let (jobs, waiting) = sync_channel(QUEUES * FS_QUEUE_SIZE as usize);
    let waiting: Arc<Mutex<Receiver<Job>>> = Arc::new(Mutex::new(waiting));
    for _ in 0..threads {
        let (server, waiting) = (Arc::clone(server), Arc::clone(&waiting));
        thread::Builder::new().name("requests".into()).spawn(move || {
            loop {
                let job = waiting.lock().recv();
                let Ok(Job { chain, vring }) = job else { break };
                let answered = answer(&server, &chain).map_err(QueueError::from);
                let given_back =
                    answered.and_then(|length| give_back(&mut vring.get_mut(), chain.head_index(), length));
                given_back.unwrap_or_else(|error| end(&error));
            }
        })?;
    }
    Ok(jobs)
}

/// Ends the process, whose guest has lost its device.
fn end(error: &QueueError) -> ! {
    match std::error::Error::source(error) {
        Some(source) => tracing::error!("{error}: {source}"),
        None => tracing::error!("{error}"),
    }
    process::exit(1)
}

impl<F: FileSystem + Send + Sync + 'static> VhostUserBackend for Backend<F> {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        FS_QUEUE_SIZE as usize
    }

    fn features(&self) -> u64 {
        1 << VERSION_1
            | 1 << INDIRECT_DESCRIPTORS
            | 1 << EVENT_INDEX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.server.destroy();
    }

    /// Queues know it themselves.
    fn set_event_idx(&self, _: bool) {}

    /// It is the memory that this was made with.
    fn update_memory(&self, _: SharedMemory) -> io::Result<()> {
        Ok(())
    }

    fn handle_event(&self, queue: u16, _: EventSet, vrings: &[Vring], _: usize) -> io::Result<()> {
        let vring = vrings.get(usize::from(queue)).ok_or(io::ErrorKind::InvalidInput)?;
        while self.answer_available(vring).unwrap_or_else(|error| end(&error)) {}
        Ok(())
    }
}

#[cfg(test)]
mod tests;

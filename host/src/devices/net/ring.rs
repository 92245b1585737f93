//! The two queues of a network device, and the header in front of each frame.
//!
//! ```text
//!   HEADER_BYTES            14 bytes       from FRAME_START on
//!   virtio_net_hdr_v1 │ Ethernet header │ IP packet
//! ```
//!
//! A frame to the guest takes as many of its buffers as it needs. The guest must see all of them at once, so the used ring is
//! written here, for all of them, before its index is.

use std::io::{Read as _, Write as _};
use std::ops::Deref as _;
use std::sync::atomic::{Ordering, fence};

use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VringMutex, VringT as _};
use virtio_bindings::virtio_net::{VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_GSO_NONE};
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT as _, QueueT as _, Reader, Writer};
use vm_memory::{
    Bytes as _, GuestAddress, GuestAddressSpace as _, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap,
};

use cofferdam_protocol::network::MTU;

/// The length of virtio's header, in bytes.
pub(super) const HEADER_BYTES: usize = 12;

/// Where the packet in a frame begins.
pub(super) const FRAME_START: usize = HEADER_BYTES + 14;

/// Most bytes of a frame with its headers.
const MAX_FRAME_BYTES: usize = FRAME_START + MTU as usize;

/// Most buffers that one frame may take.
const MAX_BUFFERS: usize = 64;

/// Offsets in virtio's header.
const GSO_TYPE: usize = 1;
const BUFFERS: usize = 10;

/// Offsets in the rings: the used ring's index and elements, the available ring's elements.
const USED_INDEX: u64 = 2;
const USED_ELEMENTS: u64 = 4;
const AVAILABLE_ELEMENTS: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;

type Memory = GuestMemoryLoadGuard<GuestMemoryMmap<BitmapMmapRegion>>;

/// The guest's memory.
pub(super) type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;

/// The guest broke the rules of its queues.
#[derive(Debug, thiserror::Error)]
#[error("the guest's queue is broken: {0}")]
pub(super) struct BrokenQueue(Error);

impl From<Error> for BrokenQueue {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

/// Takes the next frame that the guest sends. The buffer then holds the header and the frame; it is empty if the guest sent
/// something else. Returns whether there was one.
pub(super) fn take(
    vring: &VringMutex<GuestMemory>,
    memory: &GuestMemory,
    frame: &mut Vec<u8>,
) -> Result<bool, BrokenQueue> {
    let memory = memory.memory();
    let mut state = vring.get_mut();
    let Some(chain) = state.get_queue_mut().pop_descriptor_chain(memory.clone()) else { return Ok(false) };
    let head = chain.head_index();
    if read(&memory, chain, frame).is_none() {
        frame.clear();
    }
    state.add_used(head, 0)?;
    Ok(true)
}

fn read(memory: &Memory, chain: DescriptorChain<Memory>, frame: &mut Vec<u8>) -> Option<()> {
    let mut reader = Reader::new(memory.deref(), chain).ok()?;
    let length = reader.available_bytes();
    if !(FRAME_START..=MAX_FRAME_BYTES).contains(&length) {
        return None;
    }
    frame.resize(length, 0);
    reader.read_exact(frame).ok()?;
    // Nothing was offered that lets it be another.
    (u32::from(frame[GSO_TYPE]) == VIRTIO_NET_HDR_GSO_NONE).then_some(())
}

/// Gives the guest a frame, behind room for the header. Returns whether its queue had enough buffers.
pub(super) fn give(
    vring: &VringMutex<GuestMemory>,
    memory: &GuestMemory,
    frame: &mut [u8],
    event_index: bool,
) -> Result<Given, BrokenQueue> {
    let memory = memory.memory();
    let mut state = vring.get_mut();
    let queue = state.get_queue_mut();
    let mut buffers: Vec<(u16, Writer<'_, BitmapMmapRegion>)> = Vec::new();
    let mut room = 0;
    while room < frame.len() {
        let chain = match buffers.len() {
            MAX_BUFFERS => return Ok(Given::Dropped),
            _ => queue.pop_descriptor_chain(memory.clone()),
        };
        let Some(chain) = chain else {
            for _ in &buffers {
                queue.go_to_previous_position();
            }
            return Ok(Given::NoRoom);
        };
        let head = chain.head_index();
        let writer = Writer::new(memory.deref(), chain)?;
        room += writer.available_bytes();
        buffers.push((head, writer));
    }
    frame[..HEADER_BYTES].fill(0);
    frame[0] = VIRTIO_NET_HDR_F_DATA_VALID as u8;
    frame[BUFFERS..HEADER_BYTES].copy_from_slice(&(buffers.len() as u16).to_le_bytes());
    let mut rest = &*frame;
    let mut used = Vec::with_capacity(buffers.len());
    for (head, mut writer) in buffers {
        let (now, later) = rest.split_at(rest.len().min(writer.available_bytes()));
        writer.write_all(now).map_err(|_| Error::InvalidChain)?;
        used.push((head, now.len() as u32));
        rest = later;
    }
    let notify = publish(queue, &memory, &used, event_index)?;
    if notify {
        // The VMM may be gone, and then so is this process.
        let _ = state.signal_used_queue();
    }
    Ok(Given::Whole)
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Given {
    /// The guest has it.
    Whole,
    /// The guest's queue lacks buffers.
    NoRoom,
    /// The guest's buffers are so small that it never will.
    Dropped,
}

/// Publishes used buffers, all at once. Returns whether the guest wants to be told.
fn publish(queue: &mut Queue, memory: &Memory, used: &[(u16, u32)], event_index: bool) -> Result<bool, Error> {
    let old = queue.next_used();
    let at = |base: u64, offset: u64| base.checked_add(offset).map(GuestAddress).ok_or(Error::AddressOverflow);
    let size = queue.size();
    let mut new = old;
    for (head, bytes) in used {
        let offset = USED_ELEMENTS + u64::from(new % size) * USED_ELEMENT_BYTES;
        let element = u64::from(*head) | u64::from(*bytes) << 32;
        memory.write_obj(element.to_le(), at(queue.used_ring(), offset)?).map_err(Error::GuestMemory)?;
        new = new.wrapping_add(1);
    }
    let index = at(queue.used_ring(), USED_INDEX)?;
    memory.store(new.to_le(), index, Ordering::Release).map_err(Error::GuestMemory)?;
    queue.set_next_used(new);
    fence(Ordering::SeqCst);
    if !event_index {
        return Ok(true);
    }
    let event = at(queue.avail_ring(), AVAILABLE_ELEMENTS + 2 * u64::from(size))?;
    let event = u16::from_le(memory.load(event, Ordering::Relaxed).map_err(Error::GuestMemory)?);
    Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
}

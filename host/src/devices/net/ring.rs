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
    let Some(chain) = next_chain(state.get_queue_mut(), &memory)? else { return Ok(false) };
    let head = chain.head_index();
    if read(&memory, chain, frame).is_none() {
        frame.clear();
    }
    state.add_used(head, 0)?;
    Ok(true)
}

/// The next chain that the guest offers.
fn next_chain(queue: &mut Queue, memory: &Memory) -> Result<Option<DescriptorChain<Memory>>, Error> {
    if let Some(chain) = queue.pop_descriptor_chain(memory.clone()) {
        return Ok(Some(chain));
    }
    match queue.avail_idx(memory.deref(), Ordering::Acquire)?.0.wrapping_sub(queue.next_avail()) {
        0 => Ok(None),
        offered if offered > queue.size() => Err(Error::InvalidAvailRingIndex),
        _ => offered_meanwhile(queue, memory).map(Some),
    }
}

/// A chain that the guest has offered since the last look. There is none if it takes chains back, or if the ring can't be read.
fn offered_meanwhile(queue: &mut Queue, memory: &Memory) -> Result<DescriptorChain<Memory>, Error> {
    queue.pop_descriptor_chain(memory.clone()).ok_or(Error::InvalidAvailRingIndex)
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

/// Gives the guest a frame, behind room for the header. If its queue has too few buffers, the guest will tell of more.
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
        if buffers.len() >= MAX_BUFFERS {
            return Ok(Given::Dropped);
        }
        let chain = match next_chain(queue, &memory)? {
            Some(chain) => chain,
            // Here, past all that are offered, since the guest tells only of the one at this very place.
            None if queue.enable_notification(memory.deref())? => offered_meanwhile(queue, &memory)?,
            None => {
                for _ in &buffers {
                    queue.go_to_previous_position();
                }
                return Ok(Given::NoRoom);
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u16 = 8;
    const DESCRIPTORS: u64 = 0;
    const AVAILABLE: u64 = 0x1000;
    const USED: u64 = 0x2000;
    const BUFFERS_AT: u64 = 0x1_0000;

    const WRITABLE: u16 = 2;
    const NEXT: u16 = 1;

    /// A guest with one queue.
    struct Guest {
        memory: GuestMemory,
        vring: VringMutex<GuestMemory>,
        offered: u16,
    }

    impl Guest {
        fn new() -> Self {
            let ranges = [(GuestAddress(0), 16 << 20)];
            let memory = GuestMemory::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
            let vring = VringMutex::new(memory.clone(), SIZE).unwrap();
            vring.set_queue_size(SIZE);
            vring.set_queue_info(DESCRIPTORS, AVAILABLE, USED).unwrap();
            vring.set_queue_ready(true);
            Self { memory, vring, offered: 0 }
        }

        fn write<T: vm_memory::ByteValued>(&self, value: T, at: u64) {
            self.memory.memory().write_obj(value, GuestAddress(at)).unwrap();
        }

        /// Where the buffer of a descriptor is.
        fn buffer(index: u16) -> u64 {
            BUFFERS_AT + u64::from(index) * 0x2_0000
        }

        fn describe(&self, index: u16, (at, length): (u64, u32), flags: u16, next: u16) {
            let place = DESCRIPTORS + u64::from(index) * 16;
            self.write(at, place);
            self.write(length, place + 8);
            self.write(flags, place + 12);
            self.write(next, place + 14);
        }

        /// Offers a chain by its first descriptor.
        fn offer(&mut self, head: u16) {
            self.write(head, AVAILABLE + 4 + 2 * u64::from(self.offered % SIZE));
            self.offered += 1;
            self.write(self.offered, AVAILABLE + 2);
        }

        /// The heads and lengths in the used ring.
        fn used(&self) -> Vec<(u32, u32)> {
            let memory = self.memory.memory();
            let read = |at| memory.read_obj::<u32>(GuestAddress(at)).unwrap();
            let count: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
            (0..u64::from(count)).map(|at| (read(USED + 4 + at * 8), read(USED + 8 + at * 8))).collect()
        }

        fn bytes(&self, index: u16, length: u32) -> Vec<u8> {
            let mut bytes = vec![0; length as usize];
            self.memory.memory().read_slice(&mut bytes, GuestAddress(Self::buffer(index))).unwrap();
            bytes
        }
    }

    fn frame(length: usize) -> Vec<u8> {
        (0..length).map(|at| at as u8).collect()
    }

    #[test]
    fn a_frame_fills_as_many_buffers_as_it_needs() {
        let mut guest = Guest::new();
        for index in 0..3 {
            guest.describe(index, (Guest::buffer(index), 100), WRITABLE, 0);
            guest.offer(index);
        }
        let mut sent = frame(250);
        let given = give(&guest.vring, &guest.memory, &mut sent, false).unwrap();
        assert_eq!((given, guest.used()), (Given::Whole, vec![(0, 100), (1, 100), (2, 50)]));
        let received = [guest.bytes(0, 100), guest.bytes(1, 100), guest.bytes(2, 50)].concat();
        assert_eq!(received[HEADER_BYTES..], frame(250)[HEADER_BYTES..]);
        assert_eq!(received[..HEADER_BYTES], [VIRTIO_NET_HDR_F_DATA_VALID as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
    }

    #[test]
    fn a_frame_without_room_takes_no_buffer_and_fits_later() {
        let mut guest = Guest::new();
        let mut sent = frame(150);
        guest.describe(0, (Guest::buffer(0), 100), WRITABLE, 0);
        guest.offer(0);
        for _ in 0..3 {
            let given = give(&guest.vring, &guest.memory, &mut sent, false).unwrap();
            assert_eq!((given, guest.used()), (Given::NoRoom, vec![]));
        }
        guest.describe(1, (Guest::buffer(1), 100), WRITABLE, 0);
        guest.offer(1);
        let given = give(&guest.vring, &guest.memory, &mut sent, false).unwrap();
        assert_eq!((given, guest.used()), (Given::Whole, vec![(0, 100), (1, 50)]));
    }

    /// With few buffers offered, a guest that offers the next one has to tell.
    #[test]
    fn a_guest_tells_of_the_next_buffer_if_there_are_too_few() {
        let mut guest = Guest::new();
        guest.vring.set_queue_event_idx(true);
        for index in 0..3 {
            guest.describe(index, (Guest::buffer(index), 100), WRITABLE, 0);
            guest.offer(index);
        }
        let given = give(&guest.vring, &guest.memory, &mut frame(350), true).unwrap();
        let event: u16 = guest.memory.memory().read_obj(GuestAddress(USED + 4 + 8 * u64::from(SIZE))).unwrap();
        assert_eq!((given, event), (Given::NoRoom, 3));
    }

    #[test]
    fn a_queue_that_offers_more_than_it_has_is_broken() {
        let guest = Guest::new();
        guest.write(SIZE + 1, AVAILABLE + 2);
        assert!(take(&guest.vring, &guest.memory, &mut Vec::new()).is_err());
        assert!(give(&guest.vring, &guest.memory, &mut frame(100), false).is_err());
    }

    /// Its index can be read, and its elements can't.
    #[test]
    fn a_queue_at_the_end_of_memory_is_broken() {
        let guest = Guest::new();
        let available = (16 << 20) - 4;
        guest.vring.set_queue_info(DESCRIPTORS, available, USED).unwrap();
        guest.write(1_u16, available + 2);
        assert!(take(&guest.vring, &guest.memory, &mut Vec::new()).is_err());
        assert!(give(&guest.vring, &guest.memory, &mut frame(100), false).is_err());
    }

    #[test]
    fn a_guest_is_told_when_it_asks_for_it() {
        for (wanted, is_told) in [(0, true), (1, true), (2, false), (u16::MAX, false)] {
            let mut guest = Guest::new();
            for index in 0..2 {
                guest.describe(index, (Guest::buffer(index), 100), WRITABLE, 0);
                guest.offer(index);
            }
            guest.write(wanted, AVAILABLE + 4 + 2 * u64::from(SIZE));
            let memory = guest.memory.memory();
            let mut state = guest.vring.get_mut();
            let told = publish(state.get_queue_mut(), &memory, &[(0, 100), (1, 50)], true).unwrap();
            assert_eq!(told, is_told, "{wanted}");
        }
    }

    #[test]
    fn a_frame_of_the_guests_is_read_from_its_pieces() {
        let mut guest = Guest::new();
        let sent = [vec![0; HEADER_BYTES], frame(300)].concat();
        guest.describe(0, (Guest::buffer(0), 12), NEXT, 1);
        guest.describe(1, (Guest::buffer(1), 300), 0, 0);
        let memory = guest.memory.memory();
        memory.write_slice(&sent[..12], GuestAddress(Guest::buffer(0))).unwrap();
        memory.write_slice(&sent[12..], GuestAddress(Guest::buffer(1))).unwrap();
        guest.offer(0);
        let mut taken = Vec::new();
        assert!(take(&guest.vring, &guest.memory, &mut taken).unwrap());
        assert_eq!((taken == sent, guest.used()), (true, vec![(0, 0)]));
        assert!(!take(&guest.vring, &guest.memory, &mut taken).unwrap(), "there is no other");
    }

    #[test]
    fn what_is_no_frame_is_given_back_unread() {
        let far = 1 << 40;
        for (at, length, flags, header) in [
            (Guest::buffer(0), (FRAME_START - 1) as u32, 0, 0_u16),
            (Guest::buffer(0), (MAX_FRAME_BYTES + 1) as u32, 0, 0),
            (Guest::buffer(0), u32::MAX, 0, 0),
            (far, 100, 0, 0),
            (Guest::buffer(0), 100, WRITABLE, 0),
            // A TCP segment that is to be cut.
            (Guest::buffer(0), 100, 0, 0x0100),
        ] {
            let mut guest = Guest::new();
            guest.describe(0, (at, length), flags, 0);
            guest.write(header, Guest::buffer(0));
            guest.offer(0);
            let mut taken = frame(10);
            assert!(take(&guest.vring, &guest.memory, &mut taken).unwrap());
            assert_eq!((taken.len(), guest.used()), (0, vec![(0, 0)]), "{at:x} {length} {flags}");
        }
    }

    #[test]
    fn buffers_without_room_for_anything_are_no_place_to_wait_for() {
        let mut guest = Guest::new();
        for index in 0..SIZE {
            guest.describe(index, (Guest::buffer(index), 0), WRITABLE, 0);
            guest.offer(index);
        }
        let given = give(&guest.vring, &guest.memory, &mut frame(100), false).unwrap();
        assert_eq!(given, Given::NoRoom);
    }
}

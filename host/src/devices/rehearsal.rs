//! Devices whose guest's memory is known: for fuzzing.
//!
//! Each device is real from its queues on: the rings, the requests, the file system and, for inputs, the connection to a server
//! that serves a small tree. Only the VMM's messages are left out, which say where the memory and the rings are.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::sync::Arc;

use cofferdam_castore::directoryservice::DirectoryMemory;
use cofferdam_castore::{Directory, Node, PathComponent, Store, SymlinkTarget};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt as _;
use tokio::runtime::Handle;
use vhost_user_backend::VringT as _;
use virtiofsd::filesystem::FileSystem;
use vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::backend::{Backend, SharedMemory, Vring};
use super::inputs::{Host, InputsFs, Server, resolve};
use super::kind::FS_QUEUE_SIZE;
use super::paths::{
    PathsFs,
    testing::{is_contained, paths_fs},
};
use super::requests::Memory;

/// Where a queue's rings are in the guest's memory.
#[derive(Debug, Clone, Copy)]
pub struct Rings {
    /// Number of descriptors.
    pub size: u16,
    /// Address of the table of descriptors.
    pub descriptors: u64,
    /// Address of the ring of available chains.
    pub available: u64,
    /// Address of the ring of used chains.
    pub used: u64,
    /// The first entry of the ring of available chains that counts.
    pub next_available: u16,
    /// Whether each side tells the other when it wants to be notified.
    pub event_index: bool,
}

/// What the devices serve.
#[derive(Debug)]
pub struct Stage {
    host: Arc<Host>,
    _server: Server,
}

impl Stage {
    /// Prepares the inputs, which are `directory/file`, `directory/link` and `program`.
    pub fn new(runtime: &Handle) -> Self {
        let store = Store::memory();
        let tree = runtime.block_on(async {
            let file = file(&store, b"contents", false).await;
            let directory = directory([("file", file), ("link", link())]);
            let node = directory.to_node();
            store.directories.put(directory).await.expect("memory has room");
            let program = self::file(&store, b"#!/bin/sh\n", true).await;
            let inputs = BTreeMap::from([(name("directory"), node), (name("program"), program)]);
            resolve(&store, &inputs, DirectoryMemory::unlimited()).await.expect("everything is in the store")
        });
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .expect("sockets can be made");
        let (server, inputs) = Server::start(vec![ours], &store, runtime).expect("threads can be started");
        inputs.bind(Arc::new(tree));
        Self { host: Arc::new(Host::new(vec![theirs])), _server: server }
    }

    /// A new device for inputs, whose guest has no memory yet.
    pub fn inputs(&self) -> Device {
        let memory = SharedMemory::new(Memory::new());
        let serving = Serving::Inputs(backend(InputsFs::new(Arc::clone(&self.host)), &memory));
        Device { serving, memory, _paths: None }
    }

    /// A new device for a directory and a file of the host, whose guest has no memory yet.
    pub fn paths(&self) -> Device {
        let memory = SharedMemory::new(Memory::new());
        let (directory, shown) = shown();
        Device { serving: Serving::Paths(backend(paths_fs(shown), &memory)), memory, _paths: Some(directory) }
    }
}

/// Whether a packet is a request to the opener of paths. One that is survives encoding, and opens nothing that isn't shown.
pub(crate) fn opens_only_what_is_shown(packet: &[u8]) -> bool {
    let (place, shown) = shown();
    let directory = place.path().canonicalize().expect("it is there").join("directory");
    is_contained(packet, &directory, &shown)
}

enum Serving {
    Inputs(Backend<InputsFs>),
    Paths(Backend<PathsFs>),
}

/// A device that no process serves.
pub struct Device {
    serving: Serving,
    memory: SharedMemory,
    _paths: Option<TempDir>,
}

impl Device {
    /// Tells it of a queue.
    pub fn queue(&self, rings: Rings) -> Queue<'_> {
        Queue { device: self, vring: vring(&self.memory, rings, FS_QUEUE_SIZE) }
    }

    /// Replaces the guest's memory by regions that begin at these addresses and hold these bytes.
    pub fn replace(&self, regions: &[(u64, &[u8])]) {
        self.memory.lock().expect("nothing panics with it").replace(memory(regions));
    }

    /// Writes to the guest's memory.
    pub fn write(&self, bytes: &[u8], address: u64) {
        self.memory.memory().write_slice(bytes, GuestAddress(address)).expect("it is memory");
    }

    /// Reads from the guest's memory.
    pub fn read(&self, bytes: &mut [u8], address: u64) {
        self.memory.memory().read_slice(bytes, GuestAddress(address)).expect("it is memory");
    }
}

/// A queue of a device.
pub struct Queue<'a> {
    device: &'a Device,
    vring: Vring,
}

impl Queue<'_> {
    /// Has the device answer the requests that are in the queue. Gives whether there are more by then, and nothing if the device
    /// ends.
    pub fn kick(&self) -> Option<bool> {
        match &self.device.serving {
            Serving::Inputs(backend) => backend.answer_available(&self.vring),
            Serving::Paths(backend) => backend.answer_available(&self.vring),
        }
        .ok()
    }
}

fn backend<F: FileSystem + Send + Sync + 'static>(fs: F, memory: &SharedMemory) -> Backend<F> {
    Backend::new(fs, memory.clone(), 0).expect("it has no threads")
}

/// A queue of at most so many descriptors, as a device knows it.
pub(super) fn vring(memory: &SharedMemory, rings: Rings, max_size: u32) -> Vring {
    let max_size = u16::try_from(max_size).expect("it is small");
    let vring = Vring::new(memory.clone(), max_size).expect("it is a power of two");
    // The rings stay at 0 if one of them isn't aligned.
    let _ = vring.set_queue_info(rings.descriptors, rings.available, rings.used);
    vring.set_queue_size(rings.size);
    vring.set_queue_next_avail(rings.next_available);
    vring.set_queue_event_idx(rings.event_index);
    vring.set_queue_ready(true);
    vring.set_enabled(true);
    vring
}

pub(super) fn memory(regions: &[(u64, &[u8])]) -> Memory {
    let ranges: Vec<_> = regions.iter().map(|(start, bytes)| (GuestAddress(*start), bytes.len())).collect();
    let memory = Memory::from_ranges(&ranges).expect("regions don't overlap, and the host has memory");
    for (start, bytes) in regions {
        memory.write_slice(bytes, GuestAddress(*start)).expect("it is memory");
    }
    memory
}

fn name(name: &str) -> PathComponent {
    PathComponent::try_from(name).expect("it is a name")
}

fn link() -> Node {
    Node::Symlink { target: SymlinkTarget::try_from("file").expect("it is a target") }
}

fn directory<const N: usize>(entries: [(&str, Node); N]) -> Directory {
    Directory::try_from_iter(entries.map(|(at, node)| (name(at), node))).expect("names are different")
}

async fn file(store: &Store, contents: &[u8], executable: bool) -> Node {
    let mut blob = store.blobs.open_write().await;
    blob.write_all(contents).await.expect("memory has room");
    let digest = blob.close().await.expect("memory has room");
    Node::File { digest, size: contents.len() as u64, executable }
}

/// A directory with `file`, `link` and `private`, which has `secret` beside it, and a file of its own.
fn shown() -> (TempDir, Vec<File>) {
    let place = TempDir::new().expect("a temporary directory can be made");
    let directory = place.path().join("directory");
    fs::create_dir(&directory).expect("a temporary directory can be written");
    let mut single = tempfile::tempfile_in(place.path()).expect("a temporary directory can be written");
    single.write_all(b"a file alone").expect("a temporary directory can be written");
    for (name, mode) in [("file", 0o644), ("private", 0o600)] {
        let path = directory.join(name);
        fs::write(&path, name).expect("a temporary directory can be written");
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("it is ours");
    }
    fs::write(place.path().join("secret"), "secret").expect("a temporary directory can be written");
    symlink("file", directory.join("link")).expect("a temporary directory can be written");
    fs::set_permissions(&directory, Permissions::from_mode(0o755)).expect("it is ours");
    single.set_permissions(Permissions::from_mode(0o644)).expect("it is ours");
    let directory = File::open(directory).expect("it is ours");
    (place, vec![directory, single])
}

//! Conversations in memory, without a scheduler.

use std::{
    collections::BTreeSet,
    io::{self, Read},
    path::Path,
    sync::Arc,
};

use cofferdam_castore::{
    Directory, Node, PathComponent, Store, SymlinkTarget, Views,
    grpc::{Admission, Puts},
    nar::{self, NarInfo},
};
use cofferdam_nix::{
    ContentAddress, Hash, Method, PathInfo, StorePath,
    protocol::{CLIENT_MAGIC, Operation, SERVER_MAGIC, Version},
    wire::{Reader, WireError, Writer},
};
use cofferdam_proto::snix::build::v1 as wire;
use futures::executor::block_on;
use parking_lot::Mutex;

use super::{
    builds::{Builds, Tell},
    session::Stop,
    *,
};
use crate::{build::failure::Failure, provenance::SigningKey, records::Record};

mod build;
mod collection;
mod graph;
mod hostile;
mod paths;
mod realisations;
mod serve;

const ALICE: Client = Client::User(1);
const BOB: Client = Client::User(2);

/// Fails every build, and keeps its request.
#[derive(Default)]
struct Refusing(Arc<Mutex<Vec<wire::BuildRequest>>>);

impl Builds for Refusing {
    fn cpus(&self) -> u32 {
        3
    }

    fn build(&self, request: wire::BuildRequest, _tell: Tell<'_>) -> Result<Result<Arc<Record>, Failure>, Stop> {
        self.0.lock().push(request);
        Ok(Err(Failure::executor("queue_full", "too many builds wait").advised("try again later")))
    }
}

/// Lets everybody put, while there is room.
#[derive(Debug)]
struct Room(bool);

impl Admission for Room {
    fn may_put(&self, client: &Client, _: u64) -> io::Result<()> {
        let full = || io::Error::new(io::ErrorKind::StorageFull, format!("the disk is full for {client}"));
        self.0.then_some(()).ok_or_else(full)
    }
}

/// A server with nothing in it.
struct Server {
    nix: Arc<Nix>,
    requests: Arc<Mutex<Vec<wire::BuildRequest>>>,
    _dir: tempfile::TempDir,
}

impl Server {
    fn new() -> Self {
        Self::with_room(true)
    }

    fn with_room(room: bool) -> Self {
        Self::with(Store::memory(), room, false)
    }

    /// One that trusts nobody's word if signatures are `required`.
    fn with(store: Store, room: bool, required: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths = Arc::new(StorePaths::open(dir.path()).unwrap());
        let own = SigningKey::open_or_create(&dir.path().join("key")).unwrap();
        let keys = Keys::new(own, "test-1".to_owned(), Vec::new(), required);
        Self {
            nix: Arc::new(Nix {
                finish_abandoned: false,
                keep_alive: Duration::MAX,
                impure_env: [("http_proxy".to_owned(), "http://proxy".to_owned())].into(),
                keep_logs: true,
                keys,
                speakers: BTreeSet::new(),
                paths,
                views: Views::whole(store),
                puts: Puts::new(Arc::new(Room(room))),
            }),
            requests: Arc::default(),
            _dir: dir,
        }
    }

    /// What a client gets that sends this.
    fn raw(&self, client: Client, input: impl Read) -> Vec<u8> {
        let mut output = Vec::new();
        let tenant = Tenant::new(client, Arc::clone(&self.nix));
        Session::new(tenant, Refusing(Arc::clone(&self.requests)), input, &mut output).run();
        output
    }

    /// What a client of this version gets after the hello.
    fn talk(&self, client: Client, version: Version, say: impl FnOnce(&mut Said) -> io::Result<()>) -> Heard {
        let mut said = Writer(Vec::new());
        hello(&mut said, version).and_then(|()| say(&mut said)).unwrap();
        let heard = self.raw(client, &*said.0);
        let mut reader = Reader::new(io::Cursor::new(heard));
        check_hello(&mut reader, version).unwrap();
        Heard(reader)
    }
}

type Said = Writer<Vec<u8>>;

/// The answers of a server.
struct Heard(Reader<io::Cursor<Vec<u8>>>);

impl Heard {
    fn integer(&mut self) -> u64 {
        self.0.integer().unwrap()
    }

    /// The operation succeeded, and its answer follows.
    fn last(&mut self) -> &mut Self {
        assert_eq!(self.integer(), 0x616c_7473, "{:?}", self.0.texts("an error"));
        self
    }

    /// The operation failed, with this text.
    fn error(&mut self) -> String {
        assert_eq!(self.integer(), 0x6378_7470);
        assert_eq!((self.0.text("a type").unwrap(), self.integer()), ("Error".to_owned(), 0));
        assert_eq!(self.0.text("a name").unwrap(), "Error");
        let text = self.0.text("a message").unwrap();
        assert_eq!([self.integer(), self.integer()], [0, 0]);
        text
    }

    /// The server has said nothing more.
    fn end(mut self) {
        let mut rest = Vec::new();
        self.0.input().read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"");
    }
}

fn hello(said: &mut Said, version: Version) -> io::Result<()> {
    said.integer(CLIENT_MAGIC)?;
    said.integer(version.0)?;
    if version >= Version::minor(38) {
        said.texts(["a-feature"])?;
    }
    // No processor, and no reserved space.
    said.integer(0_u64)?;
    said.integer(0_u64)
}

fn check_hello(reader: &mut Reader<impl Read>, version: Version) -> Result<(), WireError> {
    assert_eq!([reader.integer()?, reader.integer()?], [SERVER_MAGIC, 0x126]);
    if version >= Version::minor(38) {
        assert_eq!(reader.texts("the features")?, [""; 0]);
    }
    if version >= Version::minor(33) {
        assert!(reader.text("the version")?.starts_with("Cofferdam "));
    }
    if version >= Version::minor(35) {
        assert_eq!(reader.integer()?, 1, "clients are trusted with their own paths");
    }
    assert_eq!(reader.integer()?, 0x616c_7473);
    Ok(())
}

fn ask(said: &mut Said, operation: Operation) -> io::Result<()> {
    said.integer(operation as u64)
}

/// A tree, its NAR, and the path that its contents give it.
struct Tree {
    nar: Vec<u8>,
    path: StorePath,
    info: PathInfo,
}

/// A directory with one symbolic link.
fn tree(target: &str) -> Tree {
    let store = Store::memory();
    let target = SymlinkTarget::try_from(target.as_bytes().to_vec()).unwrap();
    let name = PathComponent::try_from(&b"link"[..]).unwrap();
    let directory = Directory::try_from_iter([(name, Node::Symlink { target })]).unwrap();
    let node = directory.to_node();
    block_on(store.directories.put(directory)).unwrap();
    let mut bytes = Vec::new();
    nar::write(&store, &node, Path::new("tree"), &mut bytes, &|| false).unwrap();
    let NarInfo { sha256, size } = nar::info(&store, &node, Path::new("tree"), &|| false).unwrap();
    let address = ContentAddress { method: Method::Recursive, hash: Hash::sha256(sha256) };
    let path = address.path("tree", &BTreeSet::new(), false).unwrap();
    let info = PathInfo {
        deriver: None,
        nar_hash: Hash::sha256(sha256),
        nar_size: size,
        references: BTreeSet::new(),
        registration_time: 7,
        ultimate: false,
        signatures: BTreeSet::new(),
        content_address: Some(address),
    };
    Tree { nar: bytes, path, info }
}

/// Asks to take paths, in frames of 100 bytes.
fn add_multiple(said: &mut Said, dont_check_signatures: bool, trees: &[&Tree]) -> io::Result<()> {
    ask(said, Operation::AddMultipleToStore)?;
    said.integer(false)?;
    said.integer(dont_check_signatures)?;
    let mut source = Writer(Vec::new());
    source.integer(trees.len() as u64)?;
    for Tree { nar, path, info } in trees {
        source.text(path)?;
        info.write(&mut source)?;
        source.0.extend(nar);
    }
    frames(said, &source.0)
}

fn frames(said: &mut Said, bytes: &[u8]) -> io::Result<()> {
    for frame in bytes.chunks(100) {
        said.integer(frame.len() as u64)?;
        said.0.extend(frame);
    }
    said.integer(0_u64)
}

fn query_valid(said: &mut Said, paths: &[&StorePath]) -> io::Result<()> {
    ask(said, Operation::QueryValidPaths)?;
    said.texts(paths)?;
    said.integer(false)
}

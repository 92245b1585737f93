use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, BufWriter, Read, Write},
    sync::Arc,
};

use cofferdam_castore::{Node, Store};
use cofferdam_nix::{
    StorePath,
    protocol::{CLIENT_MAGIC, Message, Operation, SERVER_MAGIC, Version},
    wire::{Reader, WireError, Writer},
};
use cofferdam_rpc::Client;
use parking_lot::Mutex;

use super::{Nix, builds::Builds, roots::Roots};
use crate::{
    build::failure::causes,
    store_paths::{self, Known, StorePathsError},
};

/// Bytes of an answer that are collected before they are sent.
const BUFFER_BYTES: usize = 64 * 1024;

/// The client is trusted with its own paths, or not even with these.
const TRUSTED: u64 = 1;
const NOT_TRUSTED: u64 = 2;

/// Whose session it is.
pub(super) struct Tenant {
    pub(super) client: Client,
    pub(super) nix: Arc<Nix>,
    roots: Mutex<Roots>,
}

impl Tenant {
    pub(super) fn new(client: Client, nix: Arc<Nix>) -> Self {
        Self { client, nix, roots: Mutex::default() }
    }

    /// The store as the client sees it.
    pub(super) fn store(&self) -> Store {
        self.nix.views.of(&self.client.to_string())
    }

    /// Keeps these nodes in the store until the connection ends, if they are there.
    pub(super) fn keep<'a>(&self, nodes: impl IntoIterator<Item = &'a Node>) -> Result<(), Stop> {
        self.roots.lock().keep(&self.store(), nodes).map_err(|error| Stop::failed(&error))
    }

    /// Those of these paths that are valid, and everything that they refer to. They stay until the connection ends.
    pub(super) fn closure(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeMap<StorePath, Known>, Stop> {
        let registered = self.nix.paths.registered(&self.client, paths)?;
        self.keep(registered.values().map(|known| &known.node))?;
        Ok(store_paths::valid(&self.store(), registered)?)
    }

    /// Registers paths, which stay until the connection ends.
    pub(super) fn register(&self, paths: &[(StorePath, Known)]) -> Result<(), Stop> {
        self.keep(paths.iter().map(|(_, known)| &known.node))?;
        let store = self.store();
        for (path, known) in paths {
            if !store_paths::is_there(&store, &known.node).map_err(|error| Stop::failed(&error))? {
                let text = format!("path '{path}' was removed by a garbage collection just now: try again");
                return Err(Stop::Refused(text));
            }
        }
        Ok(self.nix.paths.register(&self.client, paths)?)
    }
}

/// One connection of Nix.
pub(super) struct Session<B, R, W: Write> {
    pub(super) tenant: Tenant,
    pub(super) builds: B,
    pub(super) reader: Reader<R>,
    pub(super) writer: Writer<BufWriter<W>>,
    pub(super) version: Version,
    /// Whether builds are begun after one has failed.
    pub(super) keep_going: bool,
}

/// Why an operation has no answer.
#[derive(Debug)]
pub(super) enum Stop {
    /// The client is told this, and may go on.
    Refused(String),
    /// The client is told this. What follows can't be read.
    Broken(String),
    /// The client has gone.
    Gone,
}

impl Stop {
    /// As it is where the rest of a client's message can't be skipped.
    pub(super) fn broken(self) -> Self {
        match self {
            Self::Refused(text) => Self::Broken(text),
            other => other,
        }
    }

    /// An error of this host, with its causes.
    pub(super) fn failed(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::Refused(causes(error).fold(error.to_string(), |text, cause| format!("{text}: {cause}")))
    }
}

impl From<io::Error> for Stop {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

impl From<WireError> for Stop {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Io(_) => Self::Gone,
            WireError::Broken { .. } => Self::Broken(error.to_string()),
        }
    }
}

impl From<StorePathsError> for Stop {
    fn from(error: StorePathsError) -> Self {
        Self::failed(&error)
    }
}

impl<B: Builds, R: Read, W: Write> Session<B, R, W> {
    pub(super) fn new(tenant: Tenant, builds: B, input: R, output: W) -> Self {
        let writer = Writer(BufWriter::with_capacity(BUFFER_BYTES, output));
        Self { tenant, builds, reader: Reader::new(input), writer, version: Version::OLDEST, keep_going: false }
    }

    /// Speaks until the client ends the conversation or breaks the protocol.
    pub(super) fn run(mut self) {
        let Err(stop) = self.converse() else { return };
        if let Stop::Refused(text) | Stop::Broken(text) = stop {
            tracing::info!(client = %self.tenant.client, why = text, "a session of Nix ends");
            // The client may be gone.
            let _ = self.say(&Message::Error(&text));
        }
    }

    fn converse(&mut self) -> Result<(), Stop> {
        self.hello()?;
        loop {
            self.reader.begin_message();
            let number = self.reader.integer()?;
            let Some(operation) = Operation::numbered(number) else {
                return Err(Stop::Broken(format!("operation {number} of Nix's protocol is not supported here")));
            };
            match self.operate(operation) {
                Ok(()) => self.writer.0.flush()?,
                Err(Stop::Refused(text)) => {
                    tracing::info!(client = %self.tenant.client, ?operation, why = text, "refused");
                    self.say(&Message::Error(&text))?;
                }
                Err(stop) => return Err(stop),
            }
        }
    }

    fn hello(&mut self) -> Result<(), Stop> {
        let magic = self.reader.integer()?;
        if magic != CLIENT_MAGIC {
            return Err(Stop::Gone);
        }
        self.writer.integer(SERVER_MAGIC)?;
        self.writer.integer(Version::NEWEST.0)?;
        self.writer.0.flush()?;
        self.version = Version::with_client(self.reader.integer()?).map_err(Stop::Broken)?;
        if self.version >= Version::minor(38) {
            let _features = self.reader.texts("the features")?;
            self.writer.texts([""; 0])?;
            self.writer.0.flush()?;
        }
        // Obsolete: a processor, and reserved space.
        if self.reader.integer()? != 0 {
            self.reader.integer()?;
        }
        self.reader.integer()?;
        if self.version >= Version::minor(33) {
            self.writer.text(concat!("Cofferdam ", env!("CARGO_PKG_VERSION")))?;
        }
        if self.version >= Version::minor(35) {
            let trust = if self.tenant.nix.keys.required { NOT_TRUSTED } else { TRUSTED };
            self.writer.integer(trust)?;
        }
        self.say(&Message::Last)
    }

    fn operate(&mut self, operation: Operation) -> Result<(), Stop> {
        match operation {
            Operation::IsValidPath => self.is_valid_path(),
            Operation::EnsurePath => self.ensure_path(),
            Operation::AddTempRoot => self.add_temp_root(),
            Operation::SetOptions => self.set_options(),
            Operation::QueryPathInfo => self.query_path_info(),
            Operation::QueryPathFromHashPart => self.query_path_from_hash_part(),
            Operation::QueryValidPaths => self.query_valid_paths(),
            Operation::QuerySubstitutablePaths => self.query_substitutable_paths(),
            Operation::NarFromPath => self.nar_from_path(),
            Operation::AddToStoreNar => self.add_to_store_nar(),
            Operation::AddMultipleToStore => self.add_multiple_to_store(),
            Operation::BuildDerivation => self.build_derivation(),
            Operation::BuildPaths => self.build_paths(),
            Operation::BuildPathsWithResults => self.build_paths_with_results(),
            Operation::QueryMissing => self.query_missing(),
            Operation::QueryDerivationOutputMap => self.query_derivation_output_map(),
            Operation::RegisterDrvOutput => self.register_drv_output(),
            Operation::QueryRealisation => self.query_realisation(),
            Operation::AddToStore if self.version < Version::minor(25) => self.add_to_store_of_old(),
            Operation::AddToStore => self.add_to_store(),
            Operation::AddTextToStore => self.add_text_to_store(),
            Operation::AddSignatures => self.add_signatures(),
            Operation::CollectGarbage => self.collect_garbage(),
        }
    }

    /// Sends a message at once.
    pub(super) fn say(&mut self, message: &Message<'_>) -> Result<(), Stop> {
        message.write(&mut self.writer, self.version)?;
        Ok(self.writer.0.flush()?)
    }

    /// Begins the answer of an operation.
    pub(super) fn answer(&mut self) -> Result<&mut Writer<BufWriter<W>>, Stop> {
        Message::Last.write(&mut self.writer, self.version)?;
        Ok(&mut self.writer)
    }
}

//! Operations that bring paths.

use std::{
    io::{self, Read, Write},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use cofferdam_castore::{
    Store,
    archive::{ArchiveError, Limits},
    grpc::Put,
    nar,
};
use cofferdam_nix::{
    Algorithm, Hash, Method, PathInfo, StorePath,
    protocol::{Message, Version},
    wire::{Framed, Reader, WireError, Writer},
};
use sha2::{Digest as _, Sha256};

use super::{
    add::check_signatures,
    builds::Builds,
    content::{self, ContentError},
    keys::Keys,
    session::{Session, Stop, Tenant},
};
use crate::{build::failure::causes, store_paths::Known};

/// Bytes that an old client is asked for at a time.
const ASKED_BYTES: u64 = 64 * 1024;

/// Bytes on their way, and their hash.
struct Arriving<R> {
    input: R,
    hasher: Sha256,
    put: Put,
}

impl<R: Read> Read for Arriving<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buffer)?;
        self.put.more(read as u64)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

/// Data that an old client sends in pieces, each after it has been asked for.
struct Asked<'a, R, W: Write> {
    reader: &'a mut Reader<R>,
    writer: &'a mut Writer<io::BufWriter<W>>,
    version: Version,
    piece: io::Cursor<Vec<u8>>,
}

impl<R: Read, W: Write> Read for Asked<'_, R, W> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.piece.read(buffer)?;
        if read > 0 || buffer.is_empty() {
            return Ok(read);
        }
        Message::Read(ASKED_BYTES).write(self.writer, self.version)?;
        self.writer.0.flush()?;
        self.reader.begin_message();
        let piece = self.reader.string("a piece of the NAR").map_err(io::Error::other)?;
        if piece.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.piece = io::Cursor::new(piece);
        self.piece.read(buffer)
    }
}

/// Imports the NAR of a path, which must be what the client says.
pub(super) fn import(tenant: &Tenant, path: &StorePath, info: &PathInfo, input: impl Read) -> Result<Known, Stop> {
    let store = &tenant.store();
    let refused = |error: &io::Error| Stop::Refused(format!("path '{path}' can't be taken: {error}"));
    let put = tenant.nix.puts.begin(&tenant.client).map_err(|error| refused(&error))?;
    let mut archive = Arriving { input: input.take(info.nar_size), hasher: Sha256::new(), put };
    let node = nar::import(store, &mut archive, Limits::default()).map_err(|error| match error {
        ArchiveError::Read { source, .. }
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
        {
            refused(&source)
        }
        ArchiveError::Read { .. } => Stop::Gone,
        error => {
            let why = causes(&error).fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
            let size = info.nar_size;
            Stop::Refused(format!(
                "path '{path}' can't be taken: its NAR, which has {size} bytes by its metadata: {why}"
            ))
        }
    })?;
    let found = Hash::sha256(archive.hasher.finalize().into());
    if found != info.nar_hash {
        return Err(Stop::Refused(format!(
            "hash mismatch importing path '{path}';\n  specified: {}\n  got:       {found}",
            info.nar_hash
        )));
    }
    let known = Known { node, info: info.clone() };
    check_content_address(store, path, &known)?;
    Ok(known)
}

/// A content address must be right, since nobody vouches for it.
fn check_content_address(store: &Store, path: &StorePath, known: &Known) -> Result<(), Stop> {
    let Some(address) = &known.info.content_address else { return Ok(()) };
    let refused = |why: String| Err(Stop::Refused(format!("path '{path}' can't be taken: {why}")));
    let mut references = known.info.references.clone();
    let refers_to_itself = references.remove(path);
    match address.path(path.name(), &references, refers_to_itself) {
        Ok(right) if right == *path => {}
        Ok(right) => return refused(format!("its content address {address} is that of {right}")),
        Err(error) => return refused(format!("its content address {address}: its name {error}")),
    }
    let hashes = match (address.method, address.hash.algorithm()) {
        // Only a hash of SHA-256 over a NAR can have such a path.
        _ if refers_to_itself => content::hash_of_itself(store, path, &known.node).map(Vec::from),
        // It was checked while the NAR arrived.
        (Method::Recursive, Algorithm::Sha256) => Ok(vec![known.info.nar_hash.clone()]),
        (method, algorithm) => {
            let name = path.to_string();
            content::hash(store, Path::new(&name), method, algorithm, &known.node).map(|hash| vec![hash])
        }
    };
    match hashes {
        Ok(hashes) if hashes.contains(&address.hash) => Ok(()),
        Ok(hashes) => {
            let (got, right) = (&hashes[0], &address.hash);
            refused(format!("its contents have the hash {got}, not {right} as its content address says"))
        }
        Err(ContentError::Store(error)) => Err(Stop::failed(&error)),
        Err(error) => refused(error.to_string()),
    }
}

/// Refuses metadata that are not to be believed.
pub(super) fn check(
    keys: &Keys,
    path: &StorePath,
    info: &mut PathInfo,
    dont_check_signatures: bool,
) -> Result<(), Stop> {
    check_signatures(&format!("path '{path}'"), &info.signatures)?;
    info.ultimate = false;
    // How long it is kept depends on this time.
    info.registration_time = now();
    let is_believed = dont_check_signatures && !keys.required;
    if !is_believed && info.content_address.is_none() && !keys.trust(path, info) {
        return Err(Stop::Refused(format!("cannot add path '{path}' because it lacks a signature by a trusted key")));
    }
    Ok(())
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl<B: Builds, R: Read, W: Write> Session<B, R, W> {
    pub(super) fn add_to_store_nar(&mut self) -> Result<(), Stop> {
        let path = self.reader.path("the path")?;
        let mut info = PathInfo::read(&mut self.reader)?;
        let _repair = self.reader.boolean("repair")?;
        let dont_check_signatures = self.reader.boolean("dontCheckSigs")?;
        let tenant = &self.tenant;
        let checked = check(&tenant.nix.keys, &path, &mut info, dont_check_signatures);
        let known = if self.version >= Version::minor(23) {
            let mut framed = Framed::new(self.reader.input());
            let known = checked.and_then(|()| import(tenant, &path, &info, &mut framed));
            framed.skip()?;
            known
        } else {
            checked?;
            let piece = io::Cursor::default();
            let (reader, writer) = (&mut self.reader, &mut self.writer);
            import(tenant, &path, &info, Asked { reader, writer, version: self.version, piece })
        };
        self.tenant.register(&[(path, known?)])?;
        self.answer().map(drop)
    }

    pub(super) fn add_multiple_to_store(&mut self) -> Result<(), Stop> {
        let _repair = self.reader.boolean("repair")?;
        let dont_check_signatures = self.reader.boolean("dontCheckSigs")?;
        let tenant = &self.tenant;
        let mut framed = Framed::new(self.reader.input());
        let taken = add_all(tenant, &mut framed, dont_check_signatures);
        framed.skip()?;
        taken?;
        self.answer().map(drop)
    }
}

/// Takes the paths in a framed source.
fn add_all(tenant: &Tenant, framed: &mut impl Read, dont_check_signatures: bool) -> Result<(), Stop> {
    // Frames keep what follows apart, so the connection can go on after an error.
    let refused = |error: WireError| match error {
        WireError::Io(_) => Stop::Refused("the paths are cut short".to_owned()),
        WireError::Broken { .. } => Stop::Refused(error.to_string()),
    };
    let mut reader = Reader::new(framed);
    let count = reader.integer().map_err(refused)?;
    for _ in 0..count {
        reader.begin_message();
        let path = reader.path("the path").map_err(refused)?;
        let mut info = PathInfo::read(&mut reader).map_err(refused)?;
        check(&tenant.nix.keys, &path, &mut info, dont_check_signatures)?;
        let known = import(tenant, &path, &info, reader.input())?;
        tenant.register(&[(path, known)])?;
    }
    Ok(())
}

//! Operations that bring single paths and signatures, and the one that removes paths.

use std::{
    collections::BTreeSet,
    io::{self, Read, Write},
    path::Path,
};

use cofferdam_castore::{
    Node, Store,
    archive::{ArchiveError, Limits},
    nar::{self, NarInfo},
};
use cofferdam_nix::{Algorithm, ContentAddress, Hash, Method, PathInfo, StorePath, wire::Framed};
use futures::executor::block_on;
use tokio::io::AsyncWriteExt as _;

use super::{
    builds::Builds,
    content,
    session::{Session, Stop, Tenant},
    upload::now,
};
use crate::store_paths::Known;

/// Bytes of a file that are in memory at a time.
const BUFFER_BYTES: usize = 64 * 1024;

/// Signatures that a path or a realisation may have.
const MAX_SIGNATURES: usize = 32;

/// Bytes of one.
const MAX_SIGNATURE_BYTES: usize = 512;

/// What a client says of contents whose path isn't known before they are.
struct Added {
    name: String,
    method: Method,
    algorithm: Algorithm,
    references: BTreeSet<StorePath>,
}

/// How contents are sent.
#[derive(Clone, Copy)]
enum Form {
    /// As an archive.
    Nar,
    /// As an archive, after which other things follow.
    NextNar,
    /// As the bytes of a file.
    File,
}

impl<B: Builds, R: Read, W: Write> Session<B, R, W> {
    pub(super) fn add_to_store(&mut self) -> Result<(), Stop> {
        let name = self.reader.text("the name")?;
        let method = self.reader.text("the content address")?;
        let references = self.reader.paths("the references")?;
        let _repair = self.reader.boolean("repair")?;
        let mut framed = Framed::new(self.reader.input());
        let parsed = Method::parse_address(&method);
        let added = parsed.map_err(|rule| Stop::Refused(format!("the content address {rule}")));
        let added = added.map(|(method, algorithm)| Added { name, method, algorithm, references });
        let known = added.and_then(|added| {
            let form = if added.method == Method::Recursive { Form::Nar } else { Form::File };
            add(&self.tenant, added, form, &mut framed)
        });
        framed.skip()?;
        let (path, known) = known?;
        self.tenant.register(&[(path.clone(), known.clone())])?;
        let writer = self.answer()?;
        writer.text(path)?;
        Ok(known.info.write(writer)?)
    }

    /// As clients before version 1.25 of the protocol ask for it. The contents follow as an archive, even those of a single file.
    pub(super) fn add_to_store_of_old(&mut self) -> Result<(), Stop> {
        let name = self.reader.text("the name")?;
        let is_named = self.reader.boolean("whether the method is named")?;
        let is_recursive = self.reader.boolean("whether the method is recursive")?;
        let algorithm = self.reader.text("the hash's function")?;
        let (method, algorithm) = match (is_named, Algorithm::named(&algorithm)) {
            (false, _) => (Method::Recursive, Algorithm::Sha256),
            (true, Some(algorithm)) if is_recursive => (Method::Recursive, algorithm),
            (true, Some(algorithm)) => (Method::Flat, algorithm),
            (true, None) => return Err(Stop::Broken(format!("the hash's function is not known: {algorithm:?}"))),
        };
        let added = Added { name, method, algorithm, references: BTreeSet::new() };
        // What follows can't be read if the archive hasn't been read to its end.
        let known = add(&self.tenant, added, Form::NextNar, self.reader.input()).map_err(Stop::broken)?;
        self.added(known)
    }

    /// As clients before version 1.25 of the protocol bring derivations.
    pub(super) fn add_text_to_store(&mut self) -> Result<(), Stop> {
        let name = self.reader.text("the name")?;
        let text = self.reader.string("the text")?;
        let references = self.reader.paths("the references")?;
        let added = Added { name, method: Method::Text, algorithm: Algorithm::Sha256, references };
        let known = add(&self.tenant, added, Form::File, &mut &*text)?;
        self.added(known)
    }

    /// Registers a path of which old clients are told nothing else.
    fn added(&mut self, (path, known): (StorePath, Known)) -> Result<(), Stop> {
        self.tenant.register(&[(path.clone(), known)])?;
        Ok(self.answer()?.text(path)?)
    }

    pub(super) fn add_signatures(&mut self) -> Result<(), Stop> {
        let path = self.reader.path("the path")?;
        let signatures = self.reader.texts("the signatures")?;
        let mut known = self.tenant.require(&path)?;
        known.info.signatures.extend(signatures);
        check_signatures(&format!("path '{path}'"), &known.info.signatures)?;
        self.tenant.register(&[(path, known)])?;
        Ok(self.answer()?.integer(1_u64)?)
    }

    /// Only the daemon removes contents, and by its own rules: a client can forget its paths.
    pub(super) fn collect_garbage(&mut self) -> Result<(), Stop> {
        const DELETE_SPECIFIC: u64 = 3;
        let action = self.reader.integer()?;
        let paths = self.reader.paths("the paths")?;
        let _ignore_liveness = self.reader.boolean("ignoreLiveness")?;
        let _max_freed = self.reader.integer()?;
        for _ in 0..3 {
            self.reader.integer()?;
        }
        if action != DELETE_SPECIFIC {
            return Err(Stop::Refused("garbage is collected by the daemon alone, by `cofferdam store gc`".to_owned()));
        }
        let Tenant { client, nix, .. } = &self.tenant;
        nix.paths.forget(client, &paths)?;
        let writer = self.answer()?;
        writer.texts(&paths)?;
        let (bytes_freed, obsolete) = (0_u64, 0_u64);
        writer.integer(bytes_freed)?;
        Ok(writer.integer(obsolete)?)
    }
}

/// Refuses more signatures than a path or a realisation may have. Errors call it `what`.
pub(super) fn check_signatures(what: &str, signatures: &BTreeSet<String>) -> Result<(), Stop> {
    let count = signatures.len();
    if count > MAX_SIGNATURES {
        return Err(Stop::Refused(format!("{what} must have at most {MAX_SIGNATURES} signatures, not {count}")));
    }
    match signatures.iter().map(String::len).find(|&length| length > MAX_SIGNATURE_BYTES) {
        Some(length) => {
            let limit = MAX_SIGNATURE_BYTES;
            Err(Stop::Refused(format!("a signature of {what} must have at most {limit} bytes, not {length}")))
        }
        None => Ok(()),
    }
}

/// Takes contents, and computes their path.
fn add(tenant: &Tenant, added: Added, form: Form, input: &mut impl Read) -> Result<(StorePath, Known), Stop> {
    let Added { name, method, algorithm, references } = added;
    let refused = |why: &dyn std::fmt::Display| Stop::Refused(format!("'{name}' can't be added: {why}"));
    let store = tenant.store();
    let mut put = tenant.nix.puts.begin(&tenant.client).map_err(|error| refused(&error))?;
    let mut counted = Counted { input, take: |read| put.more(read) };
    let import: fn(&Store, _, Limits) -> _ = if matches!(form, Form::NextNar) { nar::import_next } else { nar::import };
    let node = match form {
        Form::Nar | Form::NextNar => import(&store, &mut counted, Limits::default()).map_err(|error| match error {
            ArchiveError::Read { source, .. } => refused(&source),
            error => refused(&error),
        })?,
        Form::File => {
            let batch = store.blobs.batch();
            let mut writer = block_on(batch.open_write());
            let mut piece = vec![0; BUFFER_BYTES];
            let mut size = 0;
            loop {
                let read = counted.read(&mut piece).map_err(|error| refused(&error))?;
                if read == 0 {
                    break;
                }
                size += read as u64;
                block_on(writer.write_all(&piece[..read])).map_err(|error| Stop::failed(&error))?;
            }
            let digest = block_on(writer.close()).map_err(|error| Stop::failed(&error))?;
            block_on(batch.commit()).map_err(|error| Stop::failed(&error))?;
            Node::File { digest, size, executable: false }
        }
    };
    let hash = content::hash(&store, Path::new(&name), method, algorithm, &node).map_err(|error| refused(&error))?;
    let address = ContentAddress { method, hash };
    let path = address.path(&name, &references, false).map_err(|error| refused(&error))?;
    let info = nar::info(&store, &node, Path::new(path.base_name()), &|| false).map_err(|error| Stop::failed(&error));
    let NarInfo { sha256, size } = info?;
    let info = PathInfo {
        deriver: None,
        nar_hash: Hash::sha256(sha256),
        nar_size: size,
        references,
        registration_time: now(),
        ultimate: false,
        signatures: BTreeSet::new(),
        content_address: Some(address),
    };
    Ok((path, Known { node, info }))
}

/// Bytes that are counted as they come.
struct Counted<R, F> {
    input: R,
    take: F,
}

impl<R: Read, F: FnMut(u64) -> io::Result<()>> Read for Counted<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buffer)?;
        (self.take)(read as u64)?;
        Ok(read)
    }
}

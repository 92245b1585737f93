//! The serve protocol, which Nix speaks over `ssh://`.

use std::{
    io::{BufWriter, Read, Write},
    path::Path,
};

use cofferdam_castore::nar;
use cofferdam_nix::{
    Derivation, PathInfo,
    protocol::{SERVE_CLIENT_MAGIC, SERVE_SERVER_MAGIC, ServeVersion},
    wire::{Reader, Writer},
};

use super::{
    building::{self, Job, Told},
    builds::Builds,
    content::SelfHash,
    session::{Stop, Tenant},
    upload,
};

/// One connection. It has no way to tell an error but its log and its end.
pub(super) struct Serve<B, R, W: Write, L> {
    tenant: Tenant,
    builds: B,
    reader: Reader<R>,
    writer: Writer<BufWriter<W>>,
    log: L,
    version: ServeVersion,
}

impl<B: Builds, R: Read, W: Write, L: Write> Serve<B, R, W, L> {
    pub(super) fn new(tenant: Tenant, builds: B, input: R, output: W, log: L) -> Self {
        let writer = Writer(BufWriter::with_capacity(64 * 1024, output));
        Self { tenant, builds, reader: Reader::new(input), writer, log, version: ServeVersion::NEWEST }
    }

    /// Speaks until the client ends the conversation, or an operation fails.
    pub(super) fn run(mut self) {
        if let Err(Stop::Refused(text) | Stop::Broken(text)) = self.converse() {
            tracing::info!(client = %self.tenant.client, why = text, "a session of Nix ends");
            // The client may be gone.
            let _ = writeln!(self.log, "error: {text}");
        }
    }

    fn converse(&mut self) -> Result<(), Stop> {
        if self.reader.integer()? != SERVE_CLIENT_MAGIC {
            return Err(Stop::Gone);
        }
        self.writer.integer(SERVE_SERVER_MAGIC)?;
        self.writer.integer(ServeVersion::NEWEST.0)?;
        self.writer.0.flush()?;
        self.version = ServeVersion::with_client(self.reader.integer()?).map_err(Stop::Broken)?;
        loop {
            self.reader.begin_message();
            match self.reader.integer()? {
                1 => self.query_valid_paths(),
                2 => self.query_path_infos(),
                3 => self.dump_store_path(),
                7 => self.query_closure(),
                8 => self.build_derivation(),
                9 => self.add_to_store_nar(),
                other => Err(Stop::Broken(format!("command {other} of Nix's serve protocol is not supported here"))),
            }?;
            self.writer.0.flush()?;
        }
    }

    fn query_valid_paths(&mut self) -> Result<(), Stop> {
        let (_lock, _substitute) = (self.reader.boolean("lock")?, self.reader.boolean("substitute")?);
        let paths = self.reader.paths("the paths")?;
        let valid = self.tenant.valid(&paths)?;
        Ok(self.writer.texts(&valid)?)
    }

    fn query_path_infos(&mut self) -> Result<(), Stop> {
        let paths = self.reader.paths("the paths")?;
        let closure = self.tenant.closure(&paths)?;
        for (path, known) in paths.iter().filter_map(|path| closure.get_key_value(path)) {
            self.writer.text(path)?;
            write_info(&mut self.writer, &known.info, self.version)?;
        }
        Ok(self.writer.string(b"")?)
    }

    fn dump_store_path(&mut self) -> Result<(), Stop> {
        let path = self.reader.path("the path")?;
        let known = self.tenant.require(&path)?;
        let (store, name) = (&self.tenant.store(), Path::new(path.base_name()));
        nar::write(store, &known.node, name, &mut self.writer.0, &|| false).map_err(|error| Stop::failed(&error))
    }

    fn query_closure(&mut self) -> Result<(), Stop> {
        let _include_outputs = self.reader.boolean("includeOutputs")?;
        let paths = self.reader.paths("the paths")?;
        let closure = self.tenant.closure(&paths)?;
        Ok(self.writer.texts(closure.keys().collect::<Vec<_>>())?)
    }

    fn build_derivation(&mut self) -> Result<(), Stop> {
        let path = self.reader.path("the derivation's path")?;
        let derivation = Derivation::read(&mut self.reader)?;
        // Times, sizes and repetitions: limits are the daemon's.
        for _ in 0..self.version.build_settings() {
            self.reader.integer()?;
        }
        self.tenant.nix.keys.check_build(&path, &derivation)?;
        let log = &mut self.log;
        let self_hash = SelfHash::of_served(self.version);
        let job = Job { path: &path, derivation: &derivation, logged_as: &path, self_hash };
        let result = building::build(&self.tenant, &self.builds, &job, &mut |told| {
            match told {
                Told::Begun | Told::Ended => Ok(()),
                Told::Line(line) => log.write_all(&[line, b"\n"].concat()),
                Told::Notice(text) => log.write_all(text.as_bytes()),
            }?;
            Ok(log.flush()?)
        })?;
        Ok(result.write_served(&mut self.writer, self.version)?)
    }

    fn add_to_store_nar(&mut self) -> Result<(), Stop> {
        let path = self.reader.path("the path")?;
        let mut info = PathInfo::read(&mut self.reader)?;
        // This protocol has no word for checking signatures.
        upload::check(&self.tenant.nix.keys, &path, &mut info, true)?;
        let known = upload::import(&self.tenant, &path, &info, self.reader.input())?;
        self.tenant.register(&[(path, known)])?;
        Ok(self.writer.integer(1_u64)?)
    }
}

fn write_info<W: Write>(writer: &mut Writer<W>, info: &PathInfo, version: ServeVersion) -> Result<(), Stop> {
    writer.optional(info.deriver.as_ref())?;
    writer.texts(&info.references)?;
    let download_size = info.nar_size;
    writer.integer(download_size)?;
    writer.integer(info.nar_size)?;
    if version >= ServeVersion::minor(4) {
        writer.text(format!("sha256:{}", info.nar_hash.base32()))?;
        writer.optional(info.content_address.as_ref())?;
        writer.texts(&info.signatures)?;
    }
    Ok(())
}

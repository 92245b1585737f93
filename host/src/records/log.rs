//! The files of logs, from the first byte to the packed whole.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufReader, Read as _, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::PathBuf,
};

use bytes::Bytes;
use tokio::sync::watch;
use zstd::stream::read::Decoder;

use super::{
    BuildId, Log, RecordsError,
    error::{Result, failed},
};

/// Most bytes that a reader gets at once.
pub const MAX_CHUNK_BYTES: usize = 64 * 1024;

/// zstd's own default.
const LEVEL: i32 = 3;

/// Greatest window of a packed log that is read, as a power of two; at our level it is 21.
const MAX_WINDOW_LOG: u32 = 23;

/// Where logs are.
#[derive(Debug, Clone)]
pub(super) struct Logs {
    dir: PathBuf,
}

/// What the name of a log's file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Plain,
    Packed,
    /// To be a packed one.
    Unfinished,
}

impl Logs {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    pub(super) fn path(&self, id: BuildId, form: Form) -> PathBuf {
        self.dir.join(match form {
            Form::Plain => format!("{id}.log"),
            Form::Packed => format!("{id}.log.zst"),
            Form::Unfinished => format!("{id}.log.zst.new"),
        })
    }

    /// All files; those with other names are no logs.
    pub(super) fn list(&self) -> Result<Vec<(BuildId, Form)>> {
        let parse = |name: &str| {
            let (id, suffix) = name.split_once('.')?;
            let form = match suffix {
                "log" => Form::Plain,
                "log.zst" => Form::Packed,
                "log.zst.new" => Form::Unfinished,
                _ => return None,
            };
            Some((id.parse().ok()?, form))
        };
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed("read", &self.dir))? {
            let entry = entry.map_err(failed("read", &self.dir))?;
            found.extend(entry.file_name().to_str().and_then(parse));
        }
        Ok(found)
    }

    pub(super) fn remove(&self, id: BuildId, form: Form) -> Result<()> {
        let path = self.path(id, form);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Bytes in a file; 0 when there is none.
    pub(super) fn size(&self, id: BuildId, form: Form) -> Result<u64> {
        let path = self.path(id, form);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(metadata.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(failed("examine", &path)(error)),
        }
    }

    /// Makes the packed file of a plain one, which stays; tells the bytes of both. `None` when there is no plain one.
    pub(super) fn pack(&self, id: BuildId) -> Result<Option<(u64, u64)>> {
        let (from, to) = (self.path(id, Form::Plain), self.path(id, Form::Unfinished));
        let mut plain = match File::open(&from) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", &from)(error)),
        };
        let packed = self.path(id, Form::Packed);
        let mut pack = || {
            let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&to)?;
            let mut encoder = zstd::stream::write::Encoder::new(file, LEVEL)?;
            let plain_bytes = io::copy(&mut plain, &mut encoder)?;
            let file = encoder.finish()?;
            file.sync_all()?;
            fs::rename(&to, &packed)?;
            File::open(&self.dir)?.sync_all()?;
            Ok((plain_bytes, file.metadata()?.len()))
        };
        let done = pack();
        if done.is_err() {
            // The space may be what was missing.
            let _ = fs::remove_file(&to);
        }
        done.map(Some).map_err(failed("pack a log as", &packed))
    }
}

/// How far a log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) bytes: u64,
    pub(super) ended: bool,
}

/// Appends to one build's log.
#[derive(Debug)]
pub(super) struct LogWriter {
    path: PathBuf,
    file: Option<File>,
    pub(super) log: Log,
    limit: u64,
    /// Why there can't be more.
    closed: Option<io::ErrorKind>,
}

impl LogWriter {
    pub(super) fn new(path: PathBuf, limit: u64) -> Self {
        Self { path, file: None, log: Log::default(), limit, closed: None }
    }

    /// Writes what the limit allows. After an error nothing is written any more, so that the log has no gap.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let room = usize::try_from(self.limit - self.log.bytes).unwrap_or(usize::MAX);
        self.log.truncated |= bytes.len() > room;
        let mut rest = &bytes[..bytes.len().min(room)];
        while !rest.is_empty() {
            match self.write(rest) {
                Ok(written) => {
                    self.log.bytes += written as u64;
                    rest = &rest[written..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.log.truncated = true;
                    self.closed = Some(error.kind());
                    return Err(failed("write the log", &self.path)(error));
                }
            }
        }
        Ok(())
    }

    /// Ends it; whoever writes more is told.
    pub(super) fn close(&mut self) {
        self.file = None;
        self.closed.get_or_insert(io::ErrorKind::BrokenPipe);
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(kind) = self.closed {
            return Err(kind.into());
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let mut options = OpenOptions::new();
                none.insert(options.append(true).create_new(true).mode(0o600).open(&self.path)?)
            }
        };
        match file.write(bytes) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            written => written,
        }
    }
}

/// Reads one log from an offset, at its own pace, while it is written, packed or both.
///
/// Futures of its methods may be dropped: nothing is lost then.
#[derive(Debug)]
pub struct LogReader {
    id: BuildId,
    logs: Logs,
    position: u64,
    progress: watch::Receiver<Progress>,
    source: Option<Source>,
}

enum Source {
    Plain(File),
    Packed(Decoder<'static, BufReader<File>>),
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain(_) => "Plain",
            Self::Packed(_) => "Packed",
        })
    }
}

impl LogReader {
    pub(super) fn new(id: BuildId, logs: Logs, offset: u64, progress: watch::Receiver<Progress>) -> Result<Self> {
        let length = progress.borrow().bytes;
        if offset > length {
            return Err(RecordsError::BeyondEnd { id, offset, length });
        }
        Ok(Self { id, logs, position: offset, progress, source: None })
    }

    /// Where the next bytes are from.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next bytes, at most [`MAX_CHUNK_BYTES`]; waits for them while the build runs. `None` at the end.
    ///
    /// # Errors
    ///
    /// The log can't be read, or is gone: removed by the retention.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            let ended = self.progress.borrow_and_update().ended;
            let available = self.available().await?;
            if available.is_some() || ended {
                return Ok(available);
            }
            if self.progress.changed().await.is_err() {
                return self.available().await;
            }
        }
    }

    /// The next bytes that are there, at most [`MAX_CHUNK_BYTES`]; `None` when there are no more yet.
    ///
    /// # Errors
    ///
    /// As for [`next`](Self::next).
    pub async fn available(&mut self) -> Result<Option<Bytes>> {
        let length = self.progress.borrow().bytes;
        let most = usize::try_from(length - self.position).unwrap_or(usize::MAX).min(MAX_CHUNK_BYTES);
        if most == 0 {
            return Ok(None);
        }
        let (id, position, logs, source) = (self.id, self.position, self.logs.clone(), self.source.take());
        let read = tokio::task::spawn_blocking(move || {
            let mut source = source.map_or_else(|| Source::open(&logs, id, position), Ok)?;
            let mut bytes = vec![0; most];
            let read =
                source.read_at(position, &mut bytes).map_err(failed("read the log", &logs.path(id, Form::Plain)))?;
            bytes.truncate(read);
            Ok((source, bytes))
        });
        let (source, bytes) =
            read.await.map_err(|error| failed("read the log", &self.logs.path(id, Form::Plain))(error.into()))??;
        if bytes.is_empty() {
            return Err(RecordsError::LogCut { id, found: position, length });
        }
        // Many may wait to be read on; one that is plain is opened again for what comes next.
        self.source = Some(source).filter(|source| matches!(source, Source::Packed(_)));
        self.position += bytes.len() as u64;
        Ok(Some(bytes.into()))
    }
}

impl Source {
    /// The file that there is. Where a packed one is, nothing is missing in it; so the plain one goes only after it has come.
    fn open(logs: &Logs, id: BuildId, position: u64) -> Result<Self> {
        match File::open(logs.path(id, Form::Plain)) {
            Ok(file) => return Ok(Self::Plain(file)),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("open the log", &logs.path(id, Form::Plain))(error));
            }
            Err(_) => {}
        }
        let path = logs.path(id, Form::Packed);
        let open = || {
            let mut decoder = Decoder::new(File::open(&path)?)?;
            decoder.window_log_max(MAX_WINDOW_LOG)?;
            io::copy(&mut decoder.by_ref().take(position), &mut io::sink())?;
            Ok(Self::Packed(decoder))
        };
        open().map_err(failed("open the log", &path))
    }

    /// Bytes from a position, which is where the last ones ended.
    fn read_at(&mut self, position: u64, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(file) => file.read_at(bytes, position),
            Self::Packed(decoder) => decoder.read(bytes),
        }
    }
}

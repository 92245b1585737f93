//! Log files: written plain, compressed when complete.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufReader, Read as _, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::PathBuf,
};

use bytes::Bytes;
use cofferdam_castore::durable::{create_whole, remove_if_there};
use cofferdam_rpc::Line;
use tokio::sync::watch;
use zstd::stream::read::Decoder;

use super::{
    BuildId, Log, RecordsError,
    error::{Result, failed},
    seekable,
};

/// Most bytes that a reader returns at a time.
pub(crate) const MAX_CHUNK_BYTES: usize = 64 * 1024;

/// Base-2 logarithm of the largest zstd window that is accepted. Our compression level needs 21.
const MAX_WINDOW_LOG: u32 = 23;

/// The directory of log files.
#[derive(Debug, Clone)]
pub(super) struct Logs {
    dir: PathBuf,
}

/// The form of a log file, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Plain,
    Packed,
    /// Compressed, but not complete yet.
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

    /// All log files. Files with other names are ignored.
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
        remove_if_there(&path).map_err(failed("remove", &path))
    }

    /// The size of a file in bytes; 0 if there is none.
    pub(super) fn size(&self, id: BuildId, form: Form) -> Result<u64> {
        let path = self.path(id, form);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(metadata.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(failed("examine", &path)(error)),
        }
    }

    /// Compresses a plain file into a new one, and keeps the plain one. Returns the sizes of both, or `None` if there is no
    /// plain file.
    pub(super) fn pack(&self, id: BuildId) -> Result<Option<(u64, u64)>> {
        let from = self.path(id, Form::Plain);
        let mut plain = match File::open(&from) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", &from)(error)),
        };
        let packed = self.path(id, Form::Packed);
        let done = create_whole(&packed, |mut file| {
            let plain_bytes = seekable::compress(&mut plain, &mut file)?;
            Ok((plain_bytes, file.metadata()?.len()))
        });
        done.map(Some).map_err(failed("pack a log as", &packed))
    }
}

/// How much of a log has been written.
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
    /// Why no more can be written.
    closed: Option<io::ErrorKind>,
}

impl LogWriter {
    pub(super) fn new(path: PathBuf, limit: u64) -> Self {
        Self { path, file: None, log: Log::default(), limit, closed: None }
    }

    /// Writes as much as the limit allows. After an error it writes nothing more, so the log has no gap.
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

    /// Closes the log. Later writes are errors.
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

/// Reads one log from an offset while it is written or compressed.
///
/// Its methods are cancel safe.
#[derive(Debug)]
pub(crate) struct LogReader {
    id: BuildId,
    logs: Logs,
    position: u64,
    progress: watch::Receiver<Progress>,
    source: Option<Source>,
    /// Where it waits for its turns to read.
    line: Option<Line>,
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
        Ok(Self { id, logs, position: offset, progress, source: None, line: None })
    }

    /// The same reader, which waits for its turn in this line each time that it reads.
    pub(crate) fn in_turns(self, line: Line) -> Self {
        Self { line: Some(line), ..self }
    }

    /// The offset of the next bytes.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// The next bytes, at most [`MAX_CHUNK_BYTES`]. Waits for them while the build runs. `None` at the end.
    ///
    /// # Errors
    ///
    /// The log can't be read, or has been deleted.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>> {
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

    /// The next bytes without waiting, at most [`MAX_CHUNK_BYTES`]. `None` if there are none yet.
    ///
    /// # Errors
    ///
    /// As for [`next`](Self::next).
    pub(crate) async fn available(&mut self) -> Result<Option<Bytes>> {
        let length = self.progress.borrow().bytes;
        let most = usize::try_from(length - self.position).unwrap_or(usize::MAX).min(MAX_CHUNK_BYTES);
        if most == 0 {
            return Ok(None);
        }
        let turn = match &self.line {
            Some(line) => Some(line.turn().await),
            None => None,
        };
        let (id, position, logs, source) = (self.id, self.position, self.logs.clone(), self.source.take());
        let read = tokio::task::spawn_blocking(move || {
            let _turn = turn;
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
        // Many readers may wait, so a plain file isn't kept open; it is opened again for the next bytes.
        self.source = Some(source).filter(|source| matches!(source, Source::Packed(_)));
        self.position += bytes.len() as u64;
        Ok(Some(bytes.into()))
    }
}

impl Source {
    /// Opens the log's file. A compressed file is complete: the plain one is deleted only after it exists.
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
            let mut file = File::open(&path)?;
            let before = seekable::seek(&mut file, position)?;
            let mut decoder = Decoder::new(file)?;
            decoder.window_log_max(MAX_WINDOW_LOG)?;
            io::copy(&mut decoder.by_ref().take(before), &mut io::sink())?;
            Ok(Self::Packed(decoder))
        };
        open().map_err(failed("open the log", &path))
    }

    /// Reads from a position, which must be the end of the last read.
    fn read_at(&mut self, position: u64, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(file) => file.read_at(bytes, position),
            Self::Packed(decoder) => decoder.read(bytes),
        }
    }
}

//! Import and export of archives: tar, compressed or not, and NAR.

use std::{
    fs::{self, File, Permissions},
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use clap::{Args, ValueEnum};
use cofferdam_castore::{
    Node, Store,
    archive::{ArchiveError, Compression, Compressor, Limits, decompress},
    export::{Existing, ExportError},
    nar, tar,
};

use super::{CliError, node_text, quantity};
use crate::build::failure::blames_path;

/// The kind of an import.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ImportFormat {
    /// The file, directory or symbolic link at the path
    Path,
    /// The directory in a tar archive, uncompressed or compressed with gzip or zstd; the name doesn't matter
    Tar,
    /// The contents of a NAR, Nix's archive, uncompressed or compressed with gzip or zstd
    Nar,
    /// An image in an OCI layout, a directory or a tar archive of it, or in a registry: oci://HOST/NAME:TAG
    Oci,
    /// An image saved by `docker save`
    Docker,
    /// A root in a directory or a tar archive, without its device nodes
    Rootfs,
}

/// The kind of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ExportFormat {
    /// Files and directories
    Path,
    /// A tar archive of a directory's contents
    Tar,
    /// A tar archive, compressed with gzip
    #[value(name = "tar.gz")]
    TarGz,
    /// A tar archive, compressed with zstd
    #[value(name = "tar.zst")]
    TarZst,
    /// A NAR, Nix's archive
    Nar,
}

/// Limits on an archive's contents.
#[derive(Debug, Clone, Args)]
pub(super) struct LimitArgs {
    /// Maximum size of all files in an archive, such as 100G [default: 64G]
    #[arg(long, value_name = "SIZE", value_parser = quantity::size)]
    archive_limit: Option<u64>,
    /// Maximum number of files, directories and symlinks in an archive
    #[arg(long, value_name = "N", default_value_t = Limits::default().entries)]
    archive_files: u64,
}

impl LimitArgs {
    pub(super) fn limits(&self) -> Limits {
        Limits { entries: self.archive_files, bytes: self.archive_limit.unwrap_or(Limits::default().bytes) }
    }
}

/// The name of stdin and stdout on the command line.
pub(super) const STANDARD: &str = "-";

impl Default for LimitArgs {
    fn default() -> Self {
        Self { archive_limit: None, archive_files: Limits::default().entries }
    }
}

/// The error of an archive at `path`.
pub(super) fn refused(path: &Path, error: ArchiveError) -> CliError {
    let message = format!("{path:?} can't be imported");
    let advice = match &error {
        ArchiveError::Limit { what: "bytes", .. } => Some("--archive-limit"),
        ArchiveError::Limit { .. } => Some("--archive-files"),
        _ => None,
    };
    let error = match &error {
        ArchiveError::Store { .. } => CliError::failed(message, error),
        ArchiveError::Read { source, .. } if source.raw_os_error().is_some() && !blames_path(source) => {
            CliError::failed(message, error)
        }
        _ => CliError::wrong_because(message, error),
    };
    match advice {
        Some(flag) => error.try_this(format!("{flag} with a larger value, if you trust the archive's author")),
        None => error,
    }
}

/// Imports an archive, from stdin where `path` is `-`.
pub(super) fn import(store: &Store, path: &Path, format: ImportFormat, limits: Limits) -> Result<Node, CliError> {
    let refused = |error| refused(path, error);
    let source: Box<dyn Read> = if path == Path::new(STANDARD) {
        Box::new(io::stdin().lock())
    } else {
        Box::new(File::open(path).map_err(|error| CliError::at_path(format!("{path:?} can't be opened"), error))?)
    };
    let source = decompress(source).map_err(refused)?;
    match format {
        ImportFormat::Nar => nar::import(store, source, limits),
        _ => tar::import(store, source, limits),
    }
    .map_err(refused)
}

/// Writes a node as an archive to a new file, or to stdout where `dest` is `-`.
pub(super) fn export(
    store: &Store,
    node: &Node,
    format: ExportFormat,
    dest: &Path,
    existing: Existing,
    interrupted: &dyn Fn() -> bool,
) -> Result<(), CliError> {
    if format != ExportFormat::Nar && !matches!(node, Node::Directory { .. }) {
        let node = node_text::format(node);
        return Err(CliError::wrong(format!("a tar archive needs a directory, and {node} is not one"))
            .try_this("--format nar, or no --format to export it as it is"));
    }
    if dest == Path::new(STANDARD) {
        return match write(store, node, format, dest, &mut io::stdout().lock(), interrupted) {
            // The reader has closed the pipe.
            Err(ExportError::Write { source, .. }) if source.kind() == ErrorKind::BrokenPipe => Ok(()),
            written => Ok(written?),
        };
    }
    if existing == Existing::Refused && fs::symlink_metadata(dest).is_ok() {
        return Err(ExportError::Exists(dest.to_owned()).into());
    }
    let parent = dest.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    let failed = |action, source| ExportError::Write { path: dest.to_owned(), action, source };
    let mut file = tempfile::Builder::new()
        .prefix(".cofferdam-export-")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(parent)
        .map_err(|source| failed("make it", source))?;
    write(store, node, format, dest, file.as_file_mut(), interrupted)?;
    let persisted = match existing {
        Existing::Refused => file.persist_noclobber(dest),
        Existing::Replaced => file.persist(dest),
    };
    match persisted {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == ErrorKind::AlreadyExists => {
            Err(ExportError::Exists(dest.to_owned()).into())
        }
        Err(error) => Err(failed("give the export its name", error.error).into()),
    }
}

fn write(
    store: &Store,
    node: &Node,
    format: ExportFormat,
    name: &Path,
    out: &mut dyn Write,
    interrupted: &dyn Fn() -> bool,
) -> Result<(), ExportError> {
    let failed = |source| ExportError::Write { path: name.to_owned(), action: "write it", source };
    let compression = match format {
        ExportFormat::TarGz => Compression::Gzip,
        ExportFormat::TarZst => Compression::Zstd,
        ExportFormat::Path | ExportFormat::Tar | ExportFormat::Nar => Compression::None,
    };
    let mut out = Compressor::new(out, compression).map_err(failed)?;
    match format {
        ExportFormat::Nar => nar::write(store, node, name, &mut out, interrupted)?,
        _ => tar::write(store, node, name, &mut out, interrupted)?,
    }
    out.finish().map(drop).map_err(failed)
}

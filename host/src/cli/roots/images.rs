//! Images and archives of roots, which are imported once: a second time costs reading what identifies them.

use std::{fs::File, path::Path, sync::Arc};

use clap::Args;
use cofferdam_castore::{
    B3Digest, Node, Store,
    archive::{Limits, decompress},
    import::Lost,
    tar,
};
use tokio::runtime::Handle;

use super::{memo::Memo, source::ImageSource};
use crate::{
    build::failure::blames_path,
    cli::{
        CliError,
        archive::{self, LimitArgs},
        progress::Progress,
    },
    oci::{self, Files, OciError, Platform, Reference, Registry},
};

/// How images are imported.
#[derive(Debug, Clone, Default, Args)]
pub(in crate::cli) struct ImageArgs {
    /// The platform of an image, such as linux/arm64 [default: this host's]
    #[arg(long, value_name = "OS/ARCHITECTURE")]
    platform: Option<Platform>,
    /// Speak HTTP, not HTTPS, with a registry that is not on this host
    #[arg(long)]
    plain_http: bool,
    #[command(flatten)]
    pub(in crate::cli) limits: LimitArgs,
}

/// One import. It blocks, on a thread that may.
pub(super) struct Import<'a> {
    pub(super) store: &'a Store,
    pub(super) memo: &'a Memo,
    pub(super) platform: Platform,
    pub(super) plain_http: bool,
    pub(super) limits: Limits,
    pub(super) runtime: Handle,
    pub(super) progress: Arc<Progress>,
}

impl<'a> Import<'a> {
    pub(super) fn new(args: &ImageArgs, store: &'a Store, memo: &'a Memo, progress: &Arc<Progress>) -> Self {
        Self {
            store,
            memo,
            platform: args.platform.clone().unwrap_or_else(Platform::host),
            plain_http: args.plain_http,
            limits: args.limits.limits(),
            runtime: Handle::current(),
            progress: Arc::clone(progress),
        }
    }

    pub(super) fn run(&self, source: &ImageSource) -> Result<Node, CliError> {
        match source {
            ImageSource::Tar(path) => self.tar(path),
            ImageSource::Docker(path) => {
                let files = self.open(path)?;
                let refused = |error| refused(&format!("{path:?}"), error);
                let saved = oci::saved(&files, &self.platform).map_err(refused)?;
                self.once("docker", &saved.digest, || {
                    oci::import_saved(self.store, &files, &saved, self.limits).map_err(refused)
                })
            }
            ImageSource::Layout(path, name) => {
                let files = self.open(path)?;
                let refused = |error| refused(&format!("{path:?}"), error);
                let manifest = oci::in_layout(&files, name.as_deref(), &self.platform).map_err(refused)?;
                self.once("oci", &manifest.digest, || {
                    oci::import(self.store, &files, &manifest, self.limits).map_err(refused)
                })
            }
            ImageSource::Registry(text) => self.registry(text),
        }
    }

    fn open(&self, path: &Path) -> Result<Files, CliError> {
        Files::open(path, self.limits.bytes).map_err(|error| refused(&format!("{path:?}"), error))
    }

    fn registry(&self, text: &str) -> Result<Node, CliError> {
        let reference = Reference::parse(text, self.plain_http)
            .map_err(|rule| CliError::wrong(format!("the reference \"oci://{text}\" is wrong: {rule}")))?;
        let shown = reference.to_string();
        let refused = |error| refused(&shown, error);
        let registry = Registry::new(reference.clone(), oci::login_file(), self.runtime.clone()).map_err(refused)?;
        let (digest, manifest) = registry.resolve(&self.platform).map_err(refused)?;
        if reference.digest().is_none() {
            self.progress.clear();
            self.progress.note(&format!("{shown} is {digest}"));
        }
        self.once("oci", &manifest.digest, || {
            oci::import(self.store, &registry, &manifest, self.limits).map_err(refused)
        })
    }

    fn tar(&self, path: &Path) -> Result<Node, CliError> {
        let refused = |error| archive::refused(path, error);
        if path == Path::new(archive::STANDARD) {
            let source = decompress(std::io::stdin().lock()).map_err(refused)?;
            return tar::import_root(self.store, source, self.limits).map(|done| self.tell(done)).map_err(refused);
        }
        let open = || File::open(path).map_err(|error| CliError::at_path(format!("{path:?} can't be opened"), error));
        // By its contents: whatever else identifies a file, another one can have it, too.
        let digest = digest_of(open()?).map_err(|error| CliError::at_path(format!("{path:?} can't be read"), error))?;
        self.once("tar", &digest, || {
            let source = decompress(open()?).map_err(refused)?;
            tar::import_root(self.store, source, self.limits).map_err(refused)
        })
    }

    /// Imports what a digest identifies, unless it was imported before.
    fn once(
        &self,
        kind: &str,
        digest: &dyn std::fmt::Display,
        import: impl FnOnce() -> Result<(Node, Lost), CliError>,
    ) -> Result<Node, CliError> {
        let key = format!("{kind} {digest}");
        if let Some(node) = self.memo.find(self.store, &key) {
            return Ok(node);
        }
        let node = self.tell(import()?);
        self.memo.remember(&key, &node);
        Ok(node)
    }

    fn tell(&self, (node, lost): (Node, Lost)) -> Node {
        tell(&self.progress, lost);
        node
    }
}

/// Prints what a root lost.
pub(super) fn tell(progress: &Progress, lost: Lost) {
    let files = |count: u64, what: &str| match count {
        0 => None,
        _ => Some(format!("{count} {what}")),
    };
    let parts = [
        files(lost.devices, "device nodes, fifos and sockets were left out"),
        files(lost.set_id, "files are no longer set-user-ID or set-group-ID"),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    if !parts.is_empty() {
        progress.clear();
        progress.note(&format!("of the root, {}", parts.join(", and ")));
    }
}

fn digest_of(file: File) -> std::io::Result<B3Digest> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file)?;
    Ok(hasher.finalize().into())
}

fn refused(what: &str, error: OciError) -> CliError {
    let message = format!("{what} can't be imported");
    match error {
        OciError::Layer { number, of, source } => {
            let refused = archive::refused(Path::new(""), source);
            refused.about(format!("{message}: layer {number} of {of} is refused"))
        }
        OciError::Login { .. } => {
            let file = oci::login_file().map_or_else(String::new, |file| format!(", which writes {}", file.display()));
            CliError::wrong_because(message, error).try_this(format!("`docker login` or `skopeo login`{file}"))
        }
        OciError::Platform { .. } => {
            CliError::wrong_because(message, error).try_this("--platform with one that it has")
        }
        OciError::Choice { .. } => CliError::wrong_because(message, error)
            .try_this("oci:PATH:NAME with one of them, or an archive of one image"),
        OciError::Read { ref source, .. } if blames_path(source) => CliError::wrong_because(message, error),
        OciError::Refused { status, .. } if status < 500 && status != 429 => CliError::wrong_because(message, error),
        OciError::Read { .. } | OciError::Refused { .. } | OciError::Unreachable { .. } => {
            CliError::failed(message, error)
        }
        OciError::Malformed { .. } | OciError::Digest { .. } => CliError::wrong_because(message, error),
    }
}

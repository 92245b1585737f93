//! Roots of builds: named ones, nodes, directories, archives and images.
//!
//! ```text
//!   --root ─▶ Source ─▶ node in the store ─┐
//!   --input, --source ─────────────────────┴▶ Composed ─▶ inputs of the request, at the build's root
//! ```
//!
//! A request has no notion of a root: the root's entries are its inputs, and its `inputs_dir` is the build's root. So every
//! daemon can build it.

mod accounts;
mod compose;
mod images;
mod memo;
mod named;
mod source;
#[cfg(test)]
mod tests;

use std::{path::Path, sync::Arc};

use cofferdam_castore::{
    Node, Store,
    import::{Options, import_with},
};
use tokio_util::sync::CancellationToken;

use super::{
    CliError, ClientArgs, import,
    interrupt::blocking,
    progress::{Counter, Progress},
    store,
};
pub(super) use compose::{Composed, has};
pub(super) use images::ImageArgs;
pub(super) use source::{HELP, ImageSource, Source};

use images::Import;
use memo::Memo;

/// Brings roots into the store.
pub(super) struct Roots<'a> {
    pub(super) args: &'a ImageArgs,
    pub(super) client: &'a ClientArgs,
    pub(super) store: &'a Store,
    pub(super) progress: &'a Arc<Progress>,
    pub(super) cancel: &'a CancellationToken,
}

impl Roots<'_> {
    /// The node of a root, which is in the store then.
    pub(super) async fn load(&self, source: &Source) -> Result<Node, CliError> {
        self.progress.step("importing the root");
        let node = match source {
            Source::Store(reference) => store::find(self.store, reference, self.client).await,
            Source::Directory(path) => self.directory(path).await,
            Source::Image(image) => self.image(image).await,
            Source::Named(name) => match named::find(self, name).await {
                Ok(None) if Path::new(name).exists() => self.directory(Path::new(name)).await,
                Ok(None) => Err(named::unknown(self.client, name)),
                Ok(Some(node)) => Ok(node),
                Err(error) => Err(error),
            },
        };
        node.inspect_err(|_| self.progress.clear())
    }

    /// Imports an image, or finds it in the store.
    pub(super) async fn image(&self, source: &ImageSource) -> Result<Node, CliError> {
        let memo = Memo::new(self.client)?;
        let (args, store, progress, source) =
            (self.args.clone(), self.store.clone(), Arc::clone(self.progress), source.clone());
        blocking(self.cancel, move || Import::new(&args, &store, &memo, &progress).run(&source)).await
    }

    /// Imports a directory of this host.
    pub(super) async fn directory(&self, path: &Path) -> Result<Node, CliError> {
        let path = import::followed(path.to_owned())?;
        if path.is_file() {
            let message = format!("a root must be a directory, and {path:?} is a file");
            return Err(CliError::wrong(message)
                .try_this(format!("tar:{0}, docker-archive:{0} or oci:{0}, if it is an archive", path.display())));
        }
        let (store, counter) = (self.store.clone(), Counter::new("importing the root", self.progress));
        let work = move || {
            let observe = |files, bytes| counter.add(files, bytes);
            import_with(
                &store,
                &path,
                &Options { without_devices: true, observe: Some(&observe), ..Options::default() },
            )
        };
        let (node, lost) = blocking(self.cancel, work).await?;
        images::tell(self.progress, lost);
        Ok(node)
    }

    /// Imports a root from a file or directory.
    pub(super) async fn rootfs(&self, path: &Path) -> Result<Node, CliError> {
        if path != Path::new("-") && path.is_dir() {
            return self.directory(path).await;
        }
        self.image(&ImageSource::Tar(path.to_owned())).await
    }
}

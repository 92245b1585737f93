//! `import`: puts paths of this host into the store.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Args;
use cofferdam_castore::{
    Node, PathComponent, Store,
    import::{ImportError, Options, import_with},
    proto::{Entry, EntryExt as _},
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{
    CliError, ClientArgs,
    archive::{self, ImportFormat},
    interrupt::blocking,
    node_text, print,
    progress::{Counter, Progress},
    roots::{ImageArgs, ImageSource, Roots},
};
use crate::build::failure::blames_path;
use crate::request::entry_to_json;

const EXAMPLES: &str = "\
Examples:
  cofferdam import ./lua-5.4
  dir:blake3-…:62\t./lua-5.4
  The node alone, for another command:
    cofferdam run --input src=$(cofferdam import ./lua-5.4 | cut -f1) -- …
  Into the store of a daemon, for builds there:
    cofferdam import --daemon grpc+unix:///run/cofferdam/daemon.sock ./lua-5.4
  The contents of an archive, without unpacking it:
    curl … | cofferdam import --format tar -
  A root, without its device nodes; the layers of an image, one over the other:
    cofferdam import --format rootfs debian.tar
    cofferdam import --format oci oci://registry.example/debian:12";

/// Puts files, directories and symbolic links, or the contents of archives, into the store
///
/// Prints one line for each path: its node and the path, with a tab between. Of a file's metadata, only the owner's execute
/// bit is kept. With --json each line is an object: path, node and entry (a snix.castore.v1.Entry in ProtoJSON). With a
/// daemon, the daemon's store is used.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, after_long_help = format!("{}\n\n{EXAMPLES}", node_text::HELP))]
pub(super) struct ImportArgs {
    /// The paths to import; a symbolic link is imported as a link. With another --format than path, - is stdin
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// The kind of import
    #[arg(long, value_enum, default_value_t = ImportFormat::Path)]
    format: ImportFormat,
    #[command(flatten)]
    images: ImageArgs,
}

impl ImportArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let store = client.open_store()?;
        let progress = Arc::new(client.progress());
        let roots = Roots { args: &self.images, client, store: &store, progress: &progress, cancel };
        for path in self.paths {
            progress.step("importing");
            let imported = match self.format {
                ImportFormat::Path => import(&store, path.clone(), "importing", &progress, cancel).await,
                ImportFormat::Oci => roots.image(&ImageSource::oci(path.as_os_str())?).await,
                ImportFormat::Docker => roots.image(&ImageSource::Docker(path.clone())).await,
                ImportFormat::Rootfs => roots.rootfs(&path).await,
                format @ (ImportFormat::Tar | ImportFormat::Nar) => {
                    let (store, path, limits) = (store.clone(), path.clone(), self.images.limits.limits());
                    blocking(cancel, move || archive::import(&store, &path, format, limits)).await
                }
            };
            progress.clear();
            let node = imported?;
            // An archive's contents don't have the archive's name.
            let name = path.file_name().filter(|_| self.format == ImportFormat::Path);
            print(&if client.json { json_line(&path, name, &node) } else { line(&path, &node) })?;
        }
        Ok(())
    }
}

/// The path that a link leads to: the link itself leads nowhere in the build.
pub(super) fn followed(path: PathBuf) -> Result<PathBuf, CliError> {
    if !path.is_symlink() {
        return Ok(path);
    }
    path.canonicalize().map_err(|error| CliError::wrong(format!("{} leads nowhere: {error}", path.display())))
}

/// Imports one path, and shows how far it has come.
pub(super) async fn import(
    store: &Store,
    path: PathBuf,
    step: &'static str,
    progress: &Arc<Progress>,
    cancel: &CancellationToken,
) -> Result<Node, CliError> {
    let (store, counter) = (store.clone(), Counter::new(step, progress));
    let work = move || {
        let observe = |files, bytes| counter.add(files, bytes);
        import_with(&store, &path, &Options { observe: Some(&observe), ..Options::default() })
    };
    Ok(blocking(cancel, work).await?.0)
}

impl From<ImportError> for CliError {
    fn from(error: ImportError) -> Self {
        match &error {
            ImportError::Store { .. } => Self::failed("the import failed", error),
            ImportError::Read { source, .. } if !blames_path(source) => Self::failed("the import failed", error),
            _ => Self::wrong_because("this can't be imported", error),
        }
    }
}

fn line(path: &Path, node: &Node) -> String {
    format!("{}\t{}\n", node_text::format(node), shown(path))
}

/// The path, quoted and escaped if it isn't plain text.
fn shown(path: &Path) -> String {
    match path.to_str() {
        Some(text) if format!("{text:?}").len() == text.len() + 2 => text.to_owned(),
        _ => format!("{path:?}"),
    }
}

fn json_line(path: &Path, name: Option<&OsStr>, node: &Node) -> String {
    let name = name.and_then(|name| PathComponent::try_from(name.as_bytes()).ok());
    let entry = match name {
        Some(name) => Entry::named(name, node.clone()),
        None => Entry::unnamed(node.clone()),
    };
    let path = path.to_string_lossy();
    format!("{}\n", json!({ "path": path, "node": node_text::format(node), "entry": entry_to_json(&entry) }))
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;

    #[test]
    fn host_errors_differ_from_errors_of_the_imported_path() {
        for (errno, code) in [(Errno::ENOENT, 2), (Errno::EACCES, 2), (Errno::EIO, 3), (Errno::EMFILE, 3)] {
            let error = ImportError::Read { path: "p".into(), action: "open the file", source: errno.into() };
            assert_eq!(CliError::from(error).exit().code(), code, "{errno}");
        }
    }

    #[test]
    fn a_line_can_not_be_broken_by_its_path() {
        let node = Node::Symlink { target: "t".try_into().unwrap() };
        for (path, expected) in [
            (b"a b".as_slice(), "link:t\ta b\n"),
            (b"a\tb\nc", "link:t\t\"a\\tb\\nc\"\n"),
            (b"a\xff", "link:t\t\"a\\xFF\"\n"),
            (b"\"", "link:t\t\"\\\"\"\n"),
        ] {
            assert_eq!(line(Path::new(OsStr::from_bytes(path)), &node), expected);
        }
    }

    #[test]
    fn json_has_the_entry_with_its_name() {
        let node = Node::Symlink { target: "t".try_into().unwrap() };
        assert_eq!(
            json_line(Path::new("a/b"), Some(OsStr::new("b")), &node),
            "{\"entry\":{\"symlink\":{\"name\":\"Yg==\",\"target\":\"dA==\"}},\"node\":\"link:t\",\"path\":\"a/b\"}\n"
        );
        assert!(json_line(Path::new("/"), None, &node).contains("{\"symlink\":{\"target\":\"dA==\"}}"));
    }
}

//! `store ls`, `store cat` and `store stat`: a node's properties and contents.

use std::{
    io::{self, ErrorKind, Write as _},
    path::Path,
};

use clap::Args;
use cofferdam_castore::{
    B3Digest, Directory, Node, Store,
    archive::read_blob,
    export::ExportError,
    nar::{self, NarInfo},
};
use data_encoding::BASE64;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{find, missing};
use crate::cli::{
    CliError, ClientArgs,
    interrupt::blocking,
    node_text::{self, Reference},
};

/// A node of the store, or something below it.
#[derive(Debug, Args)]
struct Place {
    /// What to look at, as `import` and `run` print it
    #[arg(value_name = "NODE|DIGEST")]
    reference: Reference,
    /// What to look at below it, as in lib/lua
    #[arg(value_name = "PATH")]
    path: Option<String>,
}

impl Place {
    async fn find(&self, store: &Store, client: &ClientArgs) -> Result<Node, CliError> {
        let mut node = find(store, &self.reference, client).await?;
        let path = self.path.as_deref().unwrap_or_default();
        for name in path.split('/').filter(|name| !matches!(*name, "" | ".")) {
            let found = match &node {
                Node::Directory { digest, .. } => directory(store, digest, client).await?.get(name.as_bytes()).cloned(),
                Node::File { .. } | Node::Symlink { .. } => None,
            };
            node = found.ok_or_else(|| {
                let above = node_text::format(&node);
                CliError::wrong(format!("there is no {name:?} in {above}, on the way to {path:?}"))
                    .try_this(format!("cofferdam store ls {above}"))
            })?;
        }
        Ok(node)
    }

    /// The place's name in messages.
    fn name(&self) -> String {
        let reference = match &self.reference {
            Reference::Digest(digest) => digest.to_string(),
            Reference::Node(node) => node_text::format(node),
        };
        match &self.path {
            Some(path) => format!("{reference}/{path}"),
            None => reference,
        }
    }
}

async fn directory(store: &Store, digest: &B3Digest, client: &ClientArgs) -> Result<Directory, CliError> {
    let found = store.directories.get(digest).await;
    let found = found.map_err(|error| CliError::failed("can't read from the store", error))?;
    // A store has the empty directory without storing it.
    let found = found.or_else(|| (*digest == B3Digest::EMPTY).then(Directory::new));
    found.ok_or_else(|| missing(&Reference::Digest(*digest), client))
}

/// A name on one line.
fn shown(name: &[u8]) -> String {
    match str::from_utf8(name) {
        Ok(text) if format!("{text:?}").len() == text.len() + 2 => text.to_owned(),
        _ => format!("\"{}\"", name.escape_ascii()),
    }
}

const LS_EXAMPLES: &str = "\
Examples:
  cofferdam store ls dir:blake3-…:62
  dir:blake3-…:1\tbin
  file:blake3-…:1100\tREADME
  cofferdam store ls --recursive dir:blake3-…:62 share";

/// Lists a directory: one line for each entry, its node and its name, with a tab between
#[derive(Debug, Args)]
#[command(after_help = LS_EXAMPLES)]
pub(super) struct LsArgs {
    #[command(flatten)]
    place: Place,
    /// List subdirectories, too, with paths
    #[arg(long, short = 'R')]
    recursive: bool,
}

impl LsArgs {
    pub(super) async fn execute(self, client: &ClientArgs) -> Result<(), CliError> {
        let store = client.open_store()?;
        let node = self.place.find(&store, client).await?;
        let Node::Directory { digest, .. } = node else {
            return print_line(client, self.place.name().as_bytes(), &node);
        };
        // Directories that are still to be listed, with their paths, the next one last.
        let mut waiting = vec![(Vec::new(), digest)];
        while let Some((path, digest)) = waiting.pop() {
            let mut below = Vec::new();
            for (name, node) in directory(&store, &digest, client).await?.nodes() {
                let path = [&path, name.as_bytes()].concat();
                print_line(client, &path, node)?;
                if let (true, Node::Directory { digest, .. }) = (self.recursive, node) {
                    below.push(([&path, b"/".as_slice()].concat(), *digest));
                }
            }
            waiting.extend(below.into_iter().rev());
        }
        Ok(())
    }
}

fn print_line(client: &ClientArgs, name: &[u8], node: &Node) -> Result<(), CliError> {
    let node = node_text::format(node);
    let object = json!({ "name": String::from_utf8_lossy(name), "node": node });
    client.print(&format!("{node}\t{}\n", shown(name)), &object)
}

const CAT_EXAMPLES: &str = "\
Examples:
  cofferdam store cat file:blake3-…:1100
  cofferdam store cat dir:blake3-…:62 README | less";

/// Writes the contents of a file to stdout
#[derive(Debug, Args)]
#[command(after_help = CAT_EXAMPLES)]
pub(super) struct CatArgs {
    #[command(flatten)]
    place: Place,
}

impl CatArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        client.refuse_json("the contents of the file")?;
        let store = client.open_store()?;
        let node = self.place.find(&store, client).await?;
        let Node::File { digest, size, .. } = node else {
            return Err(CliError::wrong(format!("{} is no file", node_text::format(&node)))
                .try_this("cofferdam store ls, or cofferdam export"));
        };
        print_blob(&store, digest, size, self.place.name(), cancel).await
    }
}

/// Writes the contents of a file to stdout. Errors name it so.
pub(in crate::cli) async fn print_blob(
    store: &Store,
    digest: B3Digest,
    size: u64,
    name: String,
    cancel: &CancellationToken,
) -> Result<(), CliError> {
    let store = store.clone();
    let work = move || {
        let mut out = io::stdout().lock();
        let write_error = |source| ExportError::Write { path: "stdout".into(), action: "write to it", source };
        let mut take = |bytes: &[u8]| out.write_all(bytes).map_err(write_error);
        match read_blob(&store, &digest, size, Path::new(&name), &|| false, &mut take) {
            // The reader has closed the pipe.
            Err(ExportError::Write { source, .. }) if source.kind() == ErrorKind::BrokenPipe => Ok(()),
            read => read.and_then(|()| out.flush().map_err(write_error)),
        }
    };
    blocking(cancel, work).await
}

const STAT_EXAMPLES: &str = "\
Examples:
  cofferdam store stat dir:blake3-…:62
  The hash that Nix knows it by:
    cofferdam store stat --json dir:blake3-…:62 | jq -r .nar_hash";

/// Prints a node's kind, digest and size, and the hash and size of its NAR
#[derive(Debug, Args)]
#[command(after_help = STAT_EXAMPLES, after_long_help = format!("{}\n\n{STAT_EXAMPLES}", node_text::HELP))]
pub(super) struct StatArgs {
    #[command(flatten)]
    place: Place,
}

impl StatArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let store = client.open_store()?;
        let node = self.place.find(&store, client).await?;
        let progress = client.progress();
        progress.step("hashing");
        let (name, of) = (self.place.name(), node.clone());
        let info = blocking(cancel, move || nar::info(&store, &of, Path::new(&name), &|| false)).await;
        progress.clear();
        let fields = fields(&node, &info?);
        let line = |(key, value): (&str, Value)| match value {
            Value::String(text) => format!("{key}\t{text}\n"),
            value => format!("{key}\t{value}\n"),
        };
        let object: serde_json::Map<_, _> =
            fields.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        client.print(&fields.into_iter().map(line).collect::<String>(), &Value::Object(object))
    }
}

fn fields(node: &Node, info: &NarInfo) -> Vec<(&'static str, Value)> {
    let mut fields = vec![("node", json!(node_text::format(node)))];
    match node {
        Node::Directory { digest, size } => {
            fields.extend([("kind", json!("directory")), ("digest", json!(digest.to_string())), ("size", json!(size))]);
        }
        Node::File { digest, size, executable } => fields.extend([
            ("kind", json!("file")),
            ("digest", json!(digest.to_string())),
            ("bytes", json!(size)),
            ("executable", json!(executable)),
        ]),
        Node::Symlink { target } => {
            fields.extend([("kind", json!("symlink")), ("target", json!(shown(target.as_bytes())))]);
        }
    }
    fields.extend([
        ("nar_hash", json!(format!("sha256-{}", BASE64.encode(&info.sha256)))),
        ("nar_bytes", json!(info.size)),
    ]);
    fields
}

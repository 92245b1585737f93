//! What a build has made, to browse and to download.

use askama::Template;
use cofferdam_castore::{B3Digest, Directory, Node, PathComponent, Store};
use cofferdam_rpc::Page;
use tonic::codegen::http::StatusCode;

use super::{
    Ask, Site,
    answer::{self, Frame, Problem},
    build::{self, OutputLine, kind_and_size, shown},
    download::Form,
    path,
};
use crate::records::{BuildId, Outcome, Record};

/// Entries of a directory on a page.
const LISTED: usize = 1000;

/// Most parts of a path below an output.
const MAX_DEPTH: usize = 512;

#[derive(Template)]
#[template(path = "output.html")]
struct OutputPage {
    frame: Frame,
    id: String,
    /// The output and the directories in it down to here: name and address.
    trail: Vec<(String, String)>,
    here: String,
    name: String,
    kind: &'static str,
    size: String,
    node: String,
    is_directory: bool,
    is_file: bool,
    entries: Vec<OutputLine>,
    more: Option<String>,
}

impl Site {
    pub(super) async fn output(&self, ask: &Ask, id: BuildId, parts: &[&str]) -> Result<Page, Problem> {
        let client = &ask.guest.client;
        let (root, below) = parts.split_first().ok_or_else(|| Problem::unknown("there is no such output"))?;
        // A slash at the end changes nothing.
        let below = below.strip_suffix(&[""]).unwrap_or(below);
        if below.len() > MAX_DEPTH {
            return Err(Problem::wrong(format!("a path has at most {MAX_DEPTH} parts")));
        }
        let names = below.iter().map(|part| path::name(part)).collect::<Result<Vec<_>, _>>()?;
        let (turn, (record, _)) = (self.turn(&self.pages, client).await?, self.record(client, id).await?);
        let (root_name, node) = root_of(&record, root)?;
        let store = self.views.of(&client.to_string());
        let node = descend(&store, node, &names).await?;
        let name = names.last().map_or_else(|| root_name.clone().into_bytes(), |name| name.as_bytes().to_vec());
        if let Some(form) = Form::of(&ask.question)? {
            drop(turn);
            check_there(&store, &node).await?;
            let turn = self.turn(&self.streams, client).await?;
            // The last part of an output's path.
            let name = name.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
            return form.page(store, node, name, turn);
        }
        let mut address = format!("/builds/{id}/outputs/{root}");
        let mut trail = vec![(shown(&root_name), address.clone())];
        for name in &names {
            address = format!("{address}/{}", path::encoded(name.as_bytes()));
            trail.push((text(name), address.clone()));
        }
        trail.pop();
        let from = usize::try_from(ask.question.number("from")?.unwrap_or(0)).unwrap_or(usize::MAX);
        let (entries, more) = entries(&store, &node, &address, from).await?;
        let (kind, size) = kind_and_size(&node);
        let page = OutputPage {
            frame: Frame::of(&ask.guest),
            id: id.to_string(),
            trail,
            here: address,
            name: shown(&String::from_utf8_lossy(&name)),
            kind,
            size,
            node: build::node(&node),
            is_directory: matches!(node, Node::Directory { .. }),
            is_file: matches!(node, Node::File { .. }),
            entries,
            more,
        };
        Ok(answer::page(StatusCode::OK, &page))
    }
}

fn text(name: &PathComponent) -> String {
    shown(&String::from_utf8_lossy(name.as_bytes()))
}

/// An output by its number, or what a failed build left.
fn root_of(record: &Record, part: &str) -> Result<(String, Node), Problem> {
    let unknown = || Problem::unknown("the build has no such output");
    if part == "kept" {
        let kept = record.kept.clone().ok_or_else(unknown)?;
        return Ok(("kept".to_owned(), kept));
    }
    let Some(Outcome::Built(outputs)) = &record.outcome else { return Err(unknown()) };
    let index: usize = part.parse().map_err(|_| unknown())?;
    let node = outputs.get(index).ok_or_else(unknown)?.node.clone();
    let name = record.output_paths.get(index).cloned();
    Ok((name.unwrap_or_else(|| format!("output-{index}")), node))
}

async fn descend(store: &Store, mut node: Node, names: &[PathComponent]) -> Result<Node, Problem> {
    for name in names {
        let none = || Problem::unknown(format!("there is no \"{}\" in this output", text(name)));
        let Node::Directory { digest, .. } = &node else { return Err(none()) };
        let found = directory(store, digest).await?.get(name.as_bytes()).cloned();
        node = found.ok_or_else(none)?;
    }
    Ok(node)
}

async fn directory(store: &Store, digest: &B3Digest) -> Result<Directory, Problem> {
    store.directories.get(digest).await.map_err(|error| unreadable(&error))?.ok_or_else(gone)
}

fn unreadable(error: &std::io::Error) -> Problem {
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, format!("the store can't be read: {error}"))
}

fn gone() -> Problem {
    Problem::new(
        StatusCode::GONE,
        "the store doesn't have this for you: it was collected, or it is another client's build; build it again",
    )
}

async fn check_there(store: &Store, node: &Node) -> Result<(), Problem> {
    match node {
        Node::Directory { digest, .. } => directory(store, digest).await.map(drop),
        Node::File { digest, .. } => {
            let has = store.blobs.has(digest).await.map_err(|error| unreadable(&error))?;
            has.then_some(()).ok_or_else(gone)
        }
        Node::Symlink { .. } => Ok(()),
    }
}

/// Entries of a directory from a number on, and the address of the next ones.
async fn entries(
    store: &Store,
    node: &Node,
    address: &str,
    from: usize,
) -> Result<(Vec<OutputLine>, Option<String>), Problem> {
    let Node::Directory { digest, .. } = node else { return Ok((Vec::new(), None)) };
    let directory = directory(store, digest).await?;
    let line = |(name, node): (&PathComponent, &Node)| {
        let (kind, size) = kind_and_size(node);
        let href = format!("{address}/{}", path::encoded(name.as_bytes()));
        OutputLine { href, name: text(name), kind, size }
    };
    let lines = directory.nodes().skip(from).take(LISTED).map(line).collect();
    let next = from.saturating_add(LISTED);
    Ok((lines, (next < directory.len()).then(|| format!("{address}?from={next}"))))
}

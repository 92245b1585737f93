use std::{
    collections::HashMap,
    future::poll_fn,
    io,
    sync::{Arc, OnceLock},
};

use async_trait::async_trait;
use futures::{StreamExt as _, TryStreamExt as _, stream, stream::BoxStream};
use tokio::time::{Instant, timeout_at};
use tonic::Code;

use super::{
    super::{EncodedDirectory, Package, chain, decode_checked, message},
    download::{Download, Outlet},
    peer::{Peer, Readdressed},
    upload::{Outgoing, Upload},
};
use crate::{
    B3Digest, Directory, DirectoryMemory, DirectoryPutter, DirectoryService,
    directory::MAX_DIRECTORY_BYTES,
    directoryservice::{LeavesFirst, RootFirst, check_tree_size},
    proto::{GetDirectoryRequest, directory_service_client::DirectoryServiceClient, get_directory_request::ByWhat},
    runtime::spawn,
};

/// The directories of a peer, over gRPC.
///
/// Every directory is checked against its digest. A peer takes whole trees only: to put a single directory, everything
/// below it is got from the peer and put again.
#[derive(Debug, Clone)]
pub struct GrpcDirectoryService {
    peer: Peer,
    package: Arc<OnceLock<Package>>,
}

impl GrpcDirectoryService {
    /// The directories of this peer.
    pub fn new(peer: Peer) -> Self {
        Self { peer, package: Arc::default() }
    }

    /// A client for the package under which the peer has the service. The first call asks the peer.
    async fn client(&self) -> io::Result<DirectoryServiceClient<Readdressed>> {
        let package = match self.package.get() {
            Some(package) => *package,
            None => {
                let asked = self.ask_package().await?;
                *self.package.get_or_init(|| asked)
            }
        };
        Ok(self.client_of(package))
    }

    async fn ask_package(&self) -> io::Result<Package> {
        let mut client = self.client_of(Package::Snix);
        let asked = async {
            match client.get(request(&B3Digest::EMPTY, false)).await {
                Ok(messages) => messages.into_inner().message().await.err(),
                Err(status) => Some(status),
            }
        };
        self.peer.package_by(asked).await
    }

    fn client_of(&self, package: Package) -> DirectoryServiceClient<Readdressed> {
        DirectoryServiceClient::new(self.peer.channel(package)).max_decoding_message_size(MAX_DIRECTORY_BYTES)
    }

    async fn fetch(self, digest: B3Digest) -> io::Result<Option<Directory>> {
        let mut client = self.client().await?;
        let asked = async {
            let mut messages = client.get(request(&digest, false)).await?.into_inner();
            let message = messages.message().await?;
            let more = if message.is_some() { messages.message().await? } else { None };
            Ok((message, more))
        };
        let message = match self.peer.answer(asked).await {
            Ok((Some(message), None)) => message,
            Ok((None, _)) => return Ok(None),
            Ok((_, Some(_))) => {
                return Err(self.peer.wrong(format_args!("more than one directory came for {digest}")));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let actual = B3Digest::of(message.as_bytes());
        if actual != digest {
            return Err(self.peer.wrong(format_args!("what came as the directory {digest} has the digest {actual}")));
        }
        self.decode(&digest, &message).map(Some)
    }

    fn decode(&self, digest: &B3Digest, message: &EncodedDirectory) -> io::Result<Directory> {
        let wrong = |error| self.peer.wrong(format_args!("the directory {digest}: {}", chain(&error)));
        decode_checked(message).map_err(wrong)
    }

    async fn fetch_tree(
        self,
        root: B3Digest,
        memory: DirectoryMemory,
        mut outlet: Outlet<Directory>,
    ) -> io::Result<()> {
        let mut client = self.client().await?;
        let mut order = RootFirst::new(root);
        let mut messages = match self.peer.answer(client.get(request(&root, true))).await {
            Ok(answered) => answered.into_inner(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        // Repeated directories do not extend the deadline.
        let mut deadline = Instant::now() + self.peer.idle_timeout;
        let (mut directories, mut bytes) = (0, 0);
        loop {
            let message = match timeout_at(deadline, messages.message()).await {
                Err(_) => return Err(self.peer.silent()),
                Ok(Err(status)) if status.code() == Code::NotFound && order.is_empty() => return Ok(()),
                Ok(Err(status)) => return Err(self.peer.refused(&status)),
                Ok(Ok(None)) if order.is_empty() => return Ok(()),
                Ok(Ok(None)) => return order.close().map_err(|error| self.in_tree(&root, &error)),
                Ok(Ok(Some(message))) => message,
            };
            let digest = B3Digest::of(message.as_bytes());
            if order.expects(&digest).map_err(|error| self.in_tree(&root, &error))? {
                (directories, bytes) = (directories + 1, bytes + message.as_bytes().len());
                check_tree_size(directories, bytes).map_err(|error| self.in_tree(&root, &error))?;
                memory.take(message.as_bytes())?;
                let directory = self.decode(&digest, &message)?;
                order.admit(&digest, &directory).map_err(|error| self.in_tree(&root, &error))?;
                outlet.send(directory, message.as_bytes().len()).await?;
                deadline = Instant::now() + self.peer.idle_timeout;
            }
        }
    }

    fn in_tree(&self, root: &B3Digest, error: &io::Error) -> io::Error {
        io::Error::new(error.kind(), self.peer.wrong(format_args!("the tree {root}: {error}")).to_string())
    }
}

/// The directories of a tree, each after those that it refers to.
fn leaves_first(root: B3Digest, mut tree: HashMap<B3Digest, Directory>) -> Vec<Directory> {
    enum Step {
        Visit(B3Digest),
        Leave(Directory),
    }
    let mut sorted = Vec::with_capacity(tree.len());
    let mut steps = vec![Step::Visit(root)];
    while let Some(step) = steps.pop() {
        match step {
            Step::Leave(directory) => sorted.push(directory),
            Step::Visit(digest) => {
                if let Some(directory) = tree.remove(&digest) {
                    let children: Vec<_> = directory.children().map(|(child, _)| Step::Visit(child)).collect();
                    steps.push(Step::Leave(directory));
                    steps.extend(children);
                }
            }
        }
    }
    sorted
}

fn request(digest: &B3Digest, recursive: bool) -> GetDirectoryRequest {
    GetDirectoryRequest { by_what: Some(ByWhat::Digest((*digest).into())), recursive }
}

#[async_trait]
impl DirectoryService for GrpcDirectoryService {
    async fn get(&self, digest: &B3Digest) -> io::Result<Option<Directory>> {
        spawn(self.clone().fetch(*digest)).await
    }

    async fn put(&self, directory: Directory) -> io::Result<B3Digest> {
        let digest = directory.digest();
        let (mut below, mut bytes) = (HashMap::new(), 0);
        for (child, _) in directory.children() {
            if !below.contains_key(&child) {
                let mut tree = self.get_recursive(&child);
                while let Some(found) = tree.try_next().await? {
                    let encoded = found.encode();
                    if below.insert(B3Digest::of(&encoded), found).is_none() {
                        bytes += encoded.len();
                        check_tree_size(below.len(), bytes)?;
                    }
                }
            }
            if !below.contains_key(&child) {
                let message =
                    format!("the directory {digest} can't be put before its child {child}: put the whole tree");
                return Err(io::Error::new(io::ErrorKind::NotFound, message));
            }
        }
        below.insert(digest, directory);
        let mut putter = self.put_multiple_start();
        for directory in leaves_first(digest, below) {
            putter.put(directory).await?;
        }
        putter.close().await
    }

    fn get_recursive(&self, root: &B3Digest) -> BoxStream<'_, io::Result<Directory>> {
        self.get_recursive_within(root, &DirectoryMemory::unlimited())
    }

    fn get_recursive_within(&self, root: &B3Digest, memory: &DirectoryMemory) -> BoxStream<'_, io::Result<Directory>> {
        let (service, root, memory) = (self.clone(), *root, memory.clone());
        let started = Download::start(move |outlet| async move { service.fetch_tree(root, memory, outlet).await });
        stream::unfold(Some(started), |download| async move {
            let mut download = download?;
            match download.next().await {
                Ok(Some(directory)) => Some((Ok(directory), Some(download))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed()
    }

    fn put_multiple_start(&self) -> Box<dyn DirectoryPutter + '_> {
        Box::new(GrpcDirectoryPutter { service: self, order: LeavesFirst::default(), upload: None })
    }
}

struct GrpcDirectoryPutter<'a> {
    service: &'a GrpcDirectoryService,
    order: LeavesFirst,
    /// Started with the first directory. `None` again after a failure.
    upload: Option<Upload<EncodedDirectory>>,
}

#[async_trait]
impl DirectoryPutter for GrpcDirectoryPutter<'_> {
    async fn put(&mut self, directory: Directory) -> io::Result<()> {
        let message =
            message::encode(&directory).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, chain(&error)))?;
        let first = self.order.is_empty();
        if !self.order.admit(B3Digest::of(message.as_bytes()), &directory)? {
            return Ok(());
        }
        let mut upload = match self.upload.take() {
            Some(upload) => upload,
            None if first => {
                let service = self.service.clone();
                Upload::start(&self.service.peer, |messages| put(service, messages))
            }
            None => return Err(broken()),
        };
        poll_fn(|context| upload.poll_ready(context)).await?;
        upload.send(message);
        self.upload = Some(upload);
        Ok(())
    }

    async fn close(&mut self) -> io::Result<B3Digest> {
        let root = self.order.close()?;
        let answered = self.upload.take().ok_or_else(broken)?.finish().await?;
        if answered != root.as_slice() {
            let answered = crate::escape(&answered);
            return Err(self
                .service
                .peer
                .wrong(format_args!("the peer says {answered:?} is the root of the tree {root}")));
        }
        Ok(root)
    }
}

fn broken() -> io::Error {
    io::Error::other("sending this tree failed: put it again")
}

/// Sends a tree, and returns the digest that the peer answers.
async fn put(service: GrpcDirectoryService, messages: Outgoing<EncodedDirectory>) -> io::Result<Vec<u8>> {
    let answered = service.client().await?.put(messages).await;
    Ok(answered.map_err(|status| service.peer.refused(&status))?.into_inner().root_digest.into())
}

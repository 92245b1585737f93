use std::io;

use async_trait::async_trait;
use cofferdam_rpc::{Answers, Client, Clients, Outlet, Turns, Work};
use futures::StreamExt as _;
use tonic::{Request, Response, Status, Streaming};

use super::{
    super::{EncodedDirectory, MAX_TREE_BYTES, chain, decode_checked, message},
    Puts, digest, status,
};
use crate::{
    B3Digest, Views,
    directoryservice::RootFirst,
    proto::{GetDirectoryRequest, PutDirectoryResponse, directory_service_server, get_directory_request::ByWhat},
};

/// Trees that clients put at a time; further requests wait. Each may take [`MAX_TREE_BYTES`] of memory.
const MAX_PUTS: usize = 8;

/// Whole trees that clients get at a time; further requests wait. Each keeps a batch of directories in memory, and several copies of
/// up to [`RootFirst::MAX_DIRECTORIES`] digests.
const MAX_TREE_GETS: usize = 16;

/// Serves a directory service.
pub(in super::super) struct Directories {
    views: Views,
    work: Work,
    turns: Turns,
    tree_gets: Turns,
    puts: Puts,
}

impl Directories {
    pub(super) fn new(views: Views, work: Work, clients: &Clients, puts: Puts) -> Self {
        let (turns, tree_gets) = (Turns::new(MAX_PUTS, clients), Turns::new(MAX_TREE_GETS, clients));
        Self { views, work, turns, tree_gets, puts }
    }
}

fn encoded(directory: &crate::Directory) -> Result<EncodedDirectory, Status> {
    message::encode(directory).map_err(|error| Status::out_of_range(chain(&error)))
}

#[async_trait]
impl directory_service_server::DirectoryService for Directories {
    type GetStream = Answers<EncodedDirectory>;

    async fn get(&self, request: Request<GetDirectoryRequest>) -> Result<Response<Self::GetStream>, Status> {
        let client = Client::of(&request)?;
        let request = request.into_inner();
        let Some(ByWhat::Digest(asked)) = request.by_what else {
            return Err(Status::invalid_argument("by_what: not set; set by_what.digest to the directory's digest"));
        };
        let digest = digest("by_what.digest", &asked)?;
        let directories = self.views.of(&client.to_string()).directories;
        let tree_gets = request.recursive.then(|| self.tree_gets.clone());
        let get = move |mut outlet: Outlet<EncodedDirectory>| async move {
            if !request.recursive {
                let directory = directories.get(&digest).await.map_err(|error| status(&error))?;
                let missing = || Status::not_found(format!("the directory {digest} is not in the store"));
                return outlet.send(encoded(&directory.ok_or_else(missing)?)?).await;
            }
            let mut order = RootFirst::new(digest);
            let mut tree = directories.get_recursive(&digest);
            while let Some(directory) = tree.next().await {
                let directory = directory.map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound if !order.is_empty() => Status::not_found(chain(&error)),
                    _ => status(&error),
                })?;
                let message = encoded(&directory)?;
                let digest = B3Digest::of(message.as_bytes());
                if order.expects(&digest).map_err(|error| status(&error))? {
                    order.admit(&digest, &directory).map_err(|error| status(&error))?;
                    outlet.send(message).await?;
                }
            }
            if order.is_empty() { Ok(()) } else { order.close().map_err(|error| status(&error)) }
        };
        self.work.stream(client, tree_gets, get).await
    }

    async fn put(
        &self,
        request: Request<Streaming<EncodedDirectory>>,
    ) -> Result<Response<PutDirectoryResponse>, Status> {
        let client = Client::of(&request)?;
        let mut messages = self.work.inlet(request.into_inner());
        let store = self.views.of(&client.to_string());
        let (puts, owner) = (self.puts.clone(), client.clone());
        let put = async move {
            let mut admitted = puts.begin(&owner).map_err(|error| status(&error))?;
            let mut putter = store.directories.put_multiple_start();
            let (mut count, mut bytes) = (0, 0);
            while let Some(message) = messages.next().await? {
                count += 1;
                let length = message.as_bytes().len();
                admitted.more(length as u64).map_err(|error| status(&error))?;
                bytes += length;
                if bytes > MAX_TREE_BYTES || count > RootFirst::MAX_DIRECTORIES {
                    return Err(Status::out_of_range(format!(
                        "the tree has more than {} directories or {MAX_TREE_BYTES} bytes, which are the limits of this server",
                        RootFirst::MAX_DIRECTORIES
                    )));
                }
                let wrong =
                    |error| Status::invalid_argument(format!("directory {count} of the stream: {}", chain(&error)));
                let directory = decode_checked(&message).map_err(wrong)?;
                putter.put(directory).await.map_err(|error| status(&error))?;
            }
            // The blobs in these directories may have been put a moment ago, and must be durable first.
            store.blobs.commit().await.map_err(|error| status(&error))?;
            let root = putter.close().await.map_err(|error| status(&error))?;
            Ok(PutDirectoryResponse { root_digest: root.as_slice().to_vec().into() })
        };
        self.work.run(&client, Some(&self.turns), put).await.map(Response::new)
    }
}

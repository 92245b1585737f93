//! `cofferdam.v1`, our own protocol.

mod convert;
mod events;
mod limits;
mod network;
mod shell;

use std::{sync::Arc, time::SystemTime};

use cofferdam_proto::cofferdam::v1::{
    Accepted, BuildInfo, BuildRequest, CancelRequest, CancelResponse, Event, GetRequest, ListRequest, ListResponse,
    LogChunk, LogRequest, ProvenanceRequest, ProvenanceResponse, ShellInput, ShellOutput, UsageRequest, UsageResponse,
    WatchRequest, WebTokenRequest, WebTokenResponse, build_service_server,
};
use cofferdam_rpc::{Client, MAX_QUESTION_BYTES, Takes};
use futures::{StreamExt as _, stream::BoxStream};
use prost::Message as _;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::{
    Origin, Shared,
    outlet::{self, Outlet},
    status::status,
};
use crate::{
    build::{
        failure::Failure,
        secrets::{MAX_SECRET_BYTES, MAX_SECRETS},
    },
    records::{self, BuildId, LogReader, MAX_PAGE, Record, RecordsError},
    request::MAX_ENCODED_BYTES,
    scheduler::{Found, Listed, State, Submission, Submitted, Subscription, unknown},
};
use events::{tell_active, tell_record};

/// Builds in a list if the client names no limit.
const LISTED: u32 = 100;

/// Pages of records that are read for a list. Few records are on a page where they are large, or where others own them.
const MAX_PAGES: usize = 16;

/// Bytes of all outcomes in a list. The rest of it is small, and many clients take no message of more than 4 MiB.
const MAX_LISTED_BYTES: usize = 2 * 1024 * 1024;

/// Bytes that a message of `Build` may have beside the request in it.
const MAX_AROUND_BYTES: usize = 64 * 1024 + MAX_SECRETS * (MAX_SECRET_BYTES + 512);

/// Bytes of the largest message of `Build`.
pub(super) const MAX_BUILD_BYTES: usize = MAX_ENCODED_BYTES + MAX_AROUND_BYTES;

/// Bytes of the largest message of `Shell`: a terminal is typed at.
const MAX_TYPED_BYTES: usize = 64 * 1024;

/// What a method takes.
pub(super) fn takes(method: &str) -> Takes {
    match method {
        "Build" => Takes::Message(MAX_BUILD_BYTES),
        "Shell" => Takes::Stream(MAX_TYPED_BYTES),
        _ => Takes::Message(MAX_QUESTION_BYTES),
    }
}

type Answers<T> = BoxStream<'static, Result<T, Status>>;

pub(super) struct BuildService(pub(super) Arc<Shared>);

#[async_trait]
impl build_service_server::BuildService for BuildService {
    type BuildStream = Answers<Event>;
    type WatchStream = Answers<Event>;
    type LogStream = Answers<LogChunk>;
    type ShellStream = Answers<ShellOutput>;

    async fn build(&self, request: Request<BuildRequest>) -> Result<Response<Self::BuildStream>, Status> {
        let origin = Origin::of(&request)?;
        let (client, message) = (origin.client.clone(), request.into_inner());
        let options = limits::within(&self.0.allowed, &client, &message);
        let options = options.map_err(|error| failed(&self.0.refused(&client, error)))?;
        let decoded = self.0.decode(&client, message.request.unwrap_or_default()).await;
        let decoded = decoded.map_err(|failure| failed(&failure))?;
        let asks = decoded.request.constraints.as_ref().is_some_and(|constraints| constraints.network_access);
        if message.network.is_some() && !asks {
            return Err(failed(&self.0.refused(&client, network::without_access())));
        }
        let BuildRequest { detached, rebuild, without_log, compare_with, .. } = message;
        let compare_with = (!compare_with.is_empty()).then(|| parse(&compare_with)).transpose()?;
        let submission = Submission { detached, rebuild, compare_with, ..origin.submits(decoded, options) };
        match self.0.scheduler.submit(submission).await.map_err(|failure| failed(&failure))? {
            Submitted::Active(subscription) => {
                let id = subscription.build.id();
                let log = self.log_of(&client, &subscription, 0, without_log)?;
                let accepted = Accepted { id: id.to_string(), joined: subscription.joined, from_record: false };
                Ok(stream(move |outlet| tell_active(subscription, accepted, log, outlet)))
            }
            Submitted::Earlier { record, is_visible } => {
                // An id that the client may not use would only be refused later.
                let id = if is_visible { record.id.to_string() } else { String::new() };
                let accepted = Accepted { id, joined: false, from_record: true };
                // Like its log, its connections are told by Watch alone, to those who may see the build.
                let record = Record { connections: Vec::new(), ..*record };
                Ok(stream(move |outlet| tell_record(record, accepted, None, outlet)))
            }
        }
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (client, WatchRequest { id, log_offset, without_log }) = (Client::of(&request)?, request.into_inner());
        let id = parse(&id)?;
        let accepted = |joined| Accepted { id: id.to_string(), joined, from_record: !joined };
        match self.find(&client, id).await? {
            Found::Active(subscription) => {
                let log = self.log_of(&client, &subscription, log_offset, without_log)?;
                Ok(stream(move |outlet| tell_active(subscription, accepted(true), log, outlet)))
            }
            Found::Ended(record) => {
                let log = self.log(&client, id, log_offset, without_log).await?;
                Ok(stream(move |outlet| tell_record(*record, accepted(false), log, outlet)))
            }
        }
    }

    async fn cancel(&self, request: Request<CancelRequest>) -> Result<Response<CancelResponse>, Status> {
        let (client, message) = (Client::of(&request)?, request.into_inner());
        let cancelled = self.0.scheduler.cancel(&client, parse(&message.id)?).await;
        cancelled.map_err(|failure| failed(&failure))?;
        Ok(Response::new(CancelResponse {}))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<BuildInfo>, Status> {
        let (client, message) = (Client::of(&request)?, request.into_inner());
        Ok(Response::new(match self.find(&client, parse(&message.id)?).await? {
            Found::Active(subscription) => {
                let state = subscription.build.state().borrow().clone();
                self.info(&client, &subscription.build.record(), Some(&state))
            }
            Found::Ended(record) => self.info(&client, &record, None),
        }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let (client, message) = (Client::of(&request)?, request.into_inner());
        let limit = (if message.limit == 0 { LISTED } else { message.limit } as usize).min(MAX_PAGE);
        let (mut builds, mut room, mut before) = (Vec::new(), MAX_LISTED_BYTES, None);
        for _ in 0..MAX_PAGES {
            let wanted = move |record: &Record| !message.active || record.status() == records::Status::Unfinished;
            let page = self.0.scheduler.list(&client, wanted, before, limit - builds.len()).await;
            let page = page.map_err(|failure| failed(&failure))?;
            let info =
                |Listed { record, state }: Listed| shortened(self.info(&client, &record, state.as_ref()), &mut room);
            builds.extend(page.builds.into_iter().map(info));
            before = page.next;
            if before.is_none() || builds.len() >= limit {
                break;
            }
        }
        Ok(Response::new(ListResponse { builds, of_all_clients: self.0.scheduler.is_operator(&client) }))
    }

    async fn provenance(&self, request: Request<ProvenanceRequest>) -> Result<Response<ProvenanceResponse>, Status> {
        let (client, ProvenanceRequest { id }) = (Client::of(&request)?, request.into_inner());
        let scheduler = &self.0.scheduler;
        let envelope = match id.is_empty() {
            true => Vec::new(),
            false => scheduler.proof(&client, parse(&id)?).await.map_err(|failure| failed(&failure))?,
        };
        Ok(Response::new(ProvenanceResponse { envelope: envelope.into(), public_key: scheduler.public_key() }))
    }

    async fn usage(&self, request: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        let client = Client::of(&request)?;
        let usages = self.0.scheduler.usage(&client).await.map_err(|failure| failed(&failure))?;
        Ok(Response::new(UsageResponse { clients: usages.into_iter().map(convert::client_usage).collect() }))
    }

    async fn web_token(&self, request: Request<WebTokenRequest>) -> Result<Response<WebTokenResponse>, Status> {
        let client = Client::of(&request)?;
        let none = || {
            let message = "this daemon serves no page: its configuration lacks [web] listen";
            failed(&Failure::wrong("unsupported", message))
        };
        let door = self.0.door.as_ref().ok_or_else(none)?;
        let (token, expires_unix_s) = door.token(&client, SystemTime::now());
        Ok(Response::new(WebTokenResponse { token, address: door.address.clone(), expires_unix_s }))
    }

    async fn log(&self, request: Request<LogRequest>) -> Result<Response<Self::LogStream>, Status> {
        let (client, LogRequest { id, offset, follow }) = (Client::of(&request)?, request.into_inner());
        let reader = self.0.scheduler.read_log(&client, parse(&id)?, offset).await;
        let mut reader = reader.map_err(|failure| failed(&failure))?;
        Ok(stream(move |outlet: Outlet<LogChunk>| async move {
            loop {
                let offset = reader.position();
                let bytes = tokio::select! {
                    () = outlet.closed() => return,
                    bytes = async { if follow { reader.next().await } else { reader.available().await } } => bytes,
                };
                let said = match bytes {
                    Ok(None) => return,
                    Ok(Some(data)) => outlet.say(LogChunk { offset, data }).await,
                    Err(error) => outlet.refuse(records_status(&error)),
                };
                if said.is_err() {
                    return;
                }
            }
        }))
    }

    async fn shell(&self, request: Request<Streaming<ShellInput>>) -> Result<Response<Self::ShellStream>, Status> {
        let (client, mut inputs) = (Client::of(&request)?, request.into_inner());
        let start = shell::start(&mut inputs).await?;
        let id = parse(&start.id)?;
        let (terminal, typed, mut shown) = shell::terminal(start);
        let subscription = self.0.scheduler.use_shell(&client, id, terminal).await;
        let subscription = subscription.map_err(|failure| failed(&failure))?;
        tokio::spawn(async move {
            shell::pass(inputs, typed).await;
            drop(subscription);
        });
        Ok(stream(move |outlet: Outlet<ShellOutput>| async move {
            while let Some(data) = shown.recv().await {
                if outlet.say(ShellOutput { data }).await.is_err() {
                    return;
                }
            }
        }))
    }
}

impl BuildService {
    async fn find(&self, client: &Client, id: BuildId) -> Result<Found, Status> {
        self.0.scheduler.find(client, id).await.map_err(|failure| failed(&failure))
    }

    /// What a client may know of a build.
    fn info(&self, client: &Client, record: &Record, state: Option<&State>) -> BuildInfo {
        BuildInfo { client: self.0.scheduler.owner_for(client, record), ..convert::info(record, state) }
    }

    /// The log of a build that the client waits for, for its events.
    fn log_of(
        &self,
        client: &Client,
        subscription: &Subscription,
        offset: u64,
        without_log: bool,
    ) -> Result<Option<LogReader>, Status> {
        if without_log {
            return Ok(None);
        }
        let reader = self.0.scheduler.read_log_of(client, subscription, offset);
        reader.map(Some).map_err(|failure| failed(&failure))
    }

    /// The log of a build that has ended, for its events.
    async fn log(
        &self,
        client: &Client,
        id: BuildId,
        offset: u64,
        without_log: bool,
    ) -> Result<Option<LogReader>, Status> {
        if without_log {
            return Ok(None);
        }
        let reader = self.0.scheduler.read_log(client, id, offset).await;
        reader.map(Some).map_err(|failure| failed(&failure))
    }
}

/// Starts a task that sends a stream's messages.
fn stream<T, F>(tell: impl FnOnce(Outlet<T>) -> F) -> Response<Answers<T>>
where
    T: Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let (outlet, stream) = outlet::outlet(outlet::IDLE_TIMEOUT);
    tokio::spawn(tell(outlet));
    Response::new(stream.boxed())
}

/// Leaves out a build's connections, and its outcome if there is no room for it.
fn shortened(mut info: BuildInfo, room: &mut usize) -> BuildInfo {
    info.connections.clear();
    info.done = info.done.filter(|done| {
        let bytes = done.encoded_len();
        let fits = bytes <= *room;
        *room -= if fits { bytes } else { 0 };
        fits
    });
    info
}

/// Malformed ids are answered like unknown ones.
fn parse(id: &str) -> Result<BuildId, Status> {
    id.parse().map_err(|_| failed(&unknown()))
}

fn failed(failure: &Failure) -> Status {
    status(failure, None, b"")
}

fn records_status(error: &RecordsError) -> Status {
    failed(&error.into())
}

#[cfg(test)]
mod tests {
    use cofferdam_proto::cofferdam::v1::{Done, Failure, done::Outcome};

    use super::*;

    #[test]
    fn a_bounded_list_names_every_build() {
        let info = |letters| {
            let failure = Failure { message: "x".repeat(letters), ..Failure::default() };
            BuildInfo { done: Some(Done { outcome: Some(Outcome::Failure(failure)) }), ..BuildInfo::default() }
        };
        let mut room = 1000;
        let list = [500, 900, 300].map(|letters| shortened(info(letters), &mut room));
        assert_eq!(list.map(|info| info.done.is_some()), [true, false, true]);
    }
}

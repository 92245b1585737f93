//! `cofferdam.v1`, our own protocol.

mod convert;
mod events;
mod limits;
mod outlet;
mod shell;

use std::collections::HashMap;

use cofferdam_proto::cofferdam::v1::{
    Accepted, BuildInfo, BuildRequest, CancelRequest, CancelResponse, Event, GetRequest, ListRequest, ListResponse,
    LogChunk, LogRequest, ShellInput, ShellOutput, WatchRequest, build_service_server,
};
use cofferdam_rpc::{Client, MAX_QUESTION_BYTES, MemoryPermit, Takes};
use futures::{StreamExt as _, stream::BoxStream};
use prost::Message as _;
use tokio::task::spawn_blocking;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::{Service, status};
use crate::{
    records::{BuildId, Filter, LogReader, MAX_PAGE, Record, Records, RecordsError, Status as RecordStatus},
    request::MAX_ENCODED_BYTES,
    scheduler::{Scheduler, Submission, Submitted},
    telemetry,
};
pub(super) use convert::response;
use events::{tell_active, tell_record};
use outlet::Outlet;

/// Builds in a list when its client doesn't say.
const LISTED: u32 = 100;

/// How many pages of records are looked at for a list: few hold what is large, or what others have built.
const MAX_PAGES: usize = 16;

/// Bytes of how listed builds ended; the rest of a list is small, and many clients take no message of more than 4 MiB.
const MAX_LISTED_BYTES: usize = 2 * 1024 * 1024;

/// Bytes of what may be around a request.
const MAX_AROUND_BYTES: usize = 64 * 1024;

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

#[async_trait]
impl build_service_server::BuildService for Service {
    type BuildStream = Answers<Event>;
    type WatchStream = Answers<Event>;
    type LogStream = Answers<LogChunk>;
    type ShellStream = Answers<ShellOutput>;

    async fn build(&self, request: Request<BuildRequest>) -> Result<Response<Self::BuildStream>, Status> {
        let (client, context, memory) =
            (Client::of(&request)?, telemetry::context(request.metadata()), MemoryPermit::of(&request));
        let message = request.into_inner();
        let options = limits::within(&self.allowed, &message).map_err(|error| self.refused(&client, error))?;
        let (request, digest) = self.decode(&client, message.request.unwrap_or_default()).await?;
        let (detached, rebuild) = (message.detached, message.rebuild);
        let submission = Submission { client, request, digest, options, detached, rebuild, context, memory };
        let submitted = self.scheduler.submit(submission).await.map_err(|failure| status(&failure, None, b""))?;
        let with_log = !message.without_log;
        match submitted {
            Submitted::Active(subscription) => {
                let id = subscription.build.id();
                let log = if with_log { self.reader(id, 0).await? } else { None };
                let accepted = Accepted { id: id.to_string(), joined: subscription.joined, from_record: false };
                Ok(stream(move |outlet| tell_active(subscription, accepted, log, outlet)))
            }
            Submitted::Earlier(record) => {
                let accepted = Accepted { id: record.id.to_string(), joined: false, from_record: true };
                Ok(stream(move |outlet| tell_record(*record, accepted, None, outlet)))
            }
        }
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (client, message) = (Client::of(&request)?, request.into_inner());
        let id = parse(&message.id)?;
        let subscription = self.scheduler.find(id).await;
        if let Some(subscription) = subscription.filter(|subscription| subscription.build.is_known_to(&client)) {
            let log = if message.without_log { None } else { self.reader(id, message.log_offset).await? };
            let accepted = Accepted { id: id.to_string(), joined: true, from_record: false };
            return Ok(stream(move |outlet| tell_active(subscription, accepted, log, outlet)));
        }
        let record = self.record(id, &client).await?;
        let log = if message.without_log { None } else { self.reader(id, message.log_offset).await? };
        let accepted = Accepted { id: id.to_string(), joined: false, from_record: true };
        Ok(stream(move |outlet| tell_record(record, accepted, log, outlet)))
    }

    async fn cancel(&self, request: Request<CancelRequest>) -> Result<Response<CancelResponse>, Status> {
        let (client, message) = (Client::of(&request)?, request.into_inner());
        let id = parse(&message.id)?;
        let builds = self.scheduler.list().await;
        match builds.iter().find(|build| build.id() == id && client.sees(build.client())) {
            Some(build) => build.cancel(),
            None => drop(self.record(id, &client).await?),
        }
        Ok(Response::new(CancelResponse {}))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<BuildInfo>, Status> {
        let (client, message) = (Client::of(&request)?, request.into_inner());
        let id = parse(&message.id)?;
        let builds = self.scheduler.list().await;
        if let Some(build) = builds.iter().find(|build| build.id() == id && build.is_known_to(&client)) {
            let state = build.state().borrow().clone();
            return Ok(Response::new(convert::info(&build.record(), Some(&state))));
        }
        Ok(Response::new(convert::info(&self.record(id, &client).await?, None)))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let (client, message) = (Client::of(&request)?, request.into_inner());
        let filter = Filter {
            client: (!client.is_operator()).then(|| client.to_string()),
            status: message.active.then_some(RecordStatus::Unfinished),
            since: None,
        };
        let limit = (if message.limit == 0 { LISTED } else { message.limit } as usize).min(MAX_PAGE);
        let active: HashMap<_, _> =
            self.scheduler.list().await.into_iter().map(|build| (build.id(), build.state().borrow().clone())).collect();
        let (mut builds, mut room, mut before) = (Vec::new(), MAX_LISTED_BYTES, None);
        for _ in 0..MAX_PAGES {
            let (filter, most) = (filter.clone(), limit - builds.len());
            let page = self.ask(move |records| records.list(&filter, before, most)).await?;
            let infos = page.records.iter().map(|record| convert::info(record, active.get(&record.id)));
            builds.extend(infos.map(|info| shortened(info, &mut room)));
            before = page.next;
            if before.is_none() || builds.len() >= limit {
                break;
            }
        }
        Ok(Response::new(ListResponse { builds }))
    }

    async fn log(&self, request: Request<LogRequest>) -> Result<Response<Self::LogStream>, Status> {
        let (client, LogRequest { id, offset, follow }) = (Client::of(&request)?, request.into_inner());
        let id = parse(&id)?;
        let builds = self.scheduler.list().await;
        if !builds.iter().any(|build| build.id() == id && build.is_known_to(&client)) {
            self.record(id, &client).await?;
        }
        let mut reader = self.reader(id, offset).await?.ok_or_else(unknown)?;
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
        let subscription = self.scheduler.find(parse(&start.id)?).await;
        let subscription =
            subscription.filter(|subscription| subscription.build.is_known_to(&client)).ok_or_else(unknown)?;
        let (terminal, typed, mut shown) = shell::terminal(start);
        let lent = subscription.build.lend(terminal);
        lent.map_err(|_| {
            Status::failed_precondition("the build offers no shell now; an event does when it has failed")
        })?;
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

impl Service {
    /// The record of a build that a client may know of.
    async fn record(&self, id: BuildId, client: &Client) -> Result<Record, Status> {
        let record = self.ask(move |records| records.get(id)).await?;
        record.filter(|record| client.is_operator() || record.client == client.to_string()).ok_or_else(unknown)
    }

    pub(super) async fn reader(&self, id: BuildId, offset: u64) -> Result<Option<LogReader>, Status> {
        self.ask(move |records| records.read_log(id, offset)).await
    }

    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Records) -> Result<T, RecordsError> + Send + 'static,
    ) -> Result<T, Status> {
        let scheduler: Scheduler = self.scheduler.clone();
        let answered = spawn_blocking(move || question(scheduler.records())).await;
        let answered = answered.map_err(|_| Status::internal("the server failed at this request"))?;
        answered.map_err(|error| records_status(&error))
    }
}

/// Has a task tell what a stream is to say.
fn stream<T, F>(tell: impl FnOnce(Outlet<T>) -> F) -> Response<Answers<T>>
where
    T: Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let (outlet, stream) = outlet::outlet(outlet::IDLE_TIMEOUT);
    tokio::spawn(tell(outlet));
    Response::new(stream.boxed())
}

/// Leaves out how a build ended where there is no room for it.
fn shortened(mut info: BuildInfo, room: &mut usize) -> BuildInfo {
    info.done = info.done.filter(|done| {
        let bytes = done.encoded_len();
        let fits = bytes <= *room;
        *room -= if fits { bytes } else { 0 };
        fits
    });
    info
}

/// What is no id names no build either.
fn parse(id: &str) -> Result<BuildId, Status> {
    id.parse().map_err(|_| unknown())
}

fn unknown() -> Status {
    Status::not_found("you have no build of this id; `cofferdam builds list` shows those that you have")
}

fn records_status(error: &RecordsError) -> Status {
    let mut message = error.to_string();
    for cause in crate::build::failure::causes(error) {
        message = format!("{message}: {cause}");
    }
    match error {
        RecordsError::BeyondEnd { .. } => Status::out_of_range(message),
        _ => Status::internal(message),
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_proto::cofferdam::v1::{Done, Failure, done::Outcome};

    use super::*;

    #[test]
    fn a_list_names_every_build_and_is_bounded_all_the_same() {
        let info = |letters| {
            let failure = Failure { message: "x".repeat(letters), ..Failure::default() };
            BuildInfo { done: Some(Done { outcome: Some(Outcome::Failure(failure)) }), ..BuildInfo::default() }
        };
        let mut room = 1000;
        let list = [500, 900, 300].map(|letters| shortened(info(letters), &mut room));
        assert_eq!(list.map(|info| info.done.is_some()), [true, false, true]);
    }
}

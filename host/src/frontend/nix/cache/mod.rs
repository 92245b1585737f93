//! A binary cache over HTTP, from which Nix reads the paths and logs of clients.
//!
//! ```text
//!   GET, HEAD ─▶ Access: whose paths ─▶ Route ─┬─ NAME.narinfo ─▶ StorePaths
//!                  └─ 401                      ├─ realisations/ID.doi ─▶ StorePaths
//!                                              ├─ nar/…        ─▶ the store, on a thread
//!                                              ├─ log/NAME.drv ─▶ records
//!                                              └─ 404: absent, or another client's
//! ```

mod access;
mod nar;
mod route;

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use cofferdam_castore::Store;
use cofferdam_nix::{Hash, OutputId, StorePath};
use cofferdam_rpc::{Client, HttpBody, HttpOptions, Turn, Turns, serve_http};
use futures::stream;
use http_body_util::{BodyExt as _, Empty, Full, StreamBody};
use hyper::{
    Method, Response, StatusCode,
    body::Frame,
    header::{ALLOW, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, RETRY_AFTER, VARY, WWW_AUTHENTICATE},
    http::request::Parts,
};
use tokio::{net::TcpListener, time::timeout};
use tokio_util::sync::CancellationToken;

use self::route::Route;
pub(crate) use self::{
    access::{Access, TokenDigest},
    route::Compression,
};
use super::Nix;
use crate::{
    build::failure::{Failure, FailureKind},
    records::LogReader,
    scheduler::Scheduler,
    store_paths::{self, Known, StorePathsError},
};

/// Archives and logs on their way at a time. Each archive has a thread.
const STREAMS: usize = 64;

/// How long a request waits for its turn.
const TURN_TIMEOUT: Duration = Duration::from_secs(30);

/// How often the logs are forgotten whose builds aren't on record any more.
const PRUNE_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// A cache.
pub(crate) struct Cache {
    nix: Arc<Nix>,
    scheduler: Scheduler,
    access: Access,
    compression: Compression,
    streams: Turns,
}

/// Why a request isn't answered with what it asks for.
#[derive(Debug)]
enum Refusal {
    /// Its token is missing or wrong.
    Stranger,
    /// It names nothing that its client may see.
    Absent,
    /// It would change something.
    Method,
    /// Too many others are served.
    Busy,
    /// This host failed.
    Failed(String),
}

impl From<StorePathsError> for Refusal {
    fn from(error: StorePathsError) -> Self {
        Self::Failed(Failure::executor_because("store", "can't look for a path", &error).chain())
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        match failure.kind {
            FailureKind::RequestWrong => Self::Absent,
            _ => Self::Failed(failure.chain()),
        }
    }
}

/// A path, and the store as the client that has it sees it.
struct Found {
    store: Store,
    path: StorePath,
    known: Known,
}

impl Cache {
    /// The cache of a daemon.
    pub(crate) fn new(nix: Arc<Nix>, scheduler: Scheduler, access: Access, compression: Compression) -> Self {
        let streams = Turns::new(STREAMS, scheduler.clients());
        Self { nix, scheduler, access, compression, streams }
    }

    /// Serves until `shutdown`, and then what is asked for already. Dropping the future cuts that off.
    pub(crate) async fn serve(self, listener: TcpListener, shutdown: CancellationToken) {
        let this = Arc::new(self);
        let pruned = Arc::clone(&this);
        let answer = move |peer, head| {
            let this = Arc::clone(&this);
            async move { this.answer(peer, head).await }
        };
        tokio::select! {
            () = serve_http(listener, HttpOptions::default(), answer, shutdown) => {}
            () = pruned.prune() => {}
        }
    }

    async fn prune(&self) {
        let mut interval = tokio::time::interval(PRUNE_INTERVAL);
        loop {
            interval.tick().await;
            let (paths, scheduler) = (Arc::clone(&self.nix.paths), self.scheduler.clone());
            let pruned = tokio::task::spawn_blocking(move || paths.prune_logs(|build| scheduler.has_record(build)));
            if let Ok(Err(error)) = pruned.await {
                tracing::warn!(error = &error as &dyn std::error::Error, "can't forget old logs of Nix");
            }
        }
    }

    async fn answer(&self, peer: Client, head: Parts) -> Response<HttpBody> {
        let answered = self.try_answer(&peer, &head).await;
        answered.unwrap_or_else(|refusal| {
            if let Refusal::Failed(why) = &refusal {
                tracing::warn!(path = head.uri.path(), why, "the cache of Nix can't answer");
            }
            refusal.into()
        })
    }

    async fn try_answer(&self, peer: &Client, head: &Parts) -> Result<Response<HttpBody>, Refusal> {
        let has_body = match head.method {
            Method::GET => true,
            Method::HEAD => false,
            _ => return Err(Refusal::Method),
        };
        let visible = self.access.visible(&head.headers).ok_or(Refusal::Stranger)?;
        let has_token = head.headers.contains_key(AUTHORIZATION);
        let counted = &visible.first().filter(|_| has_token).unwrap_or(peer).clone();
        match Route::parse(head.uri.path()).ok_or(Refusal::Absent)? {
            Route::CacheInfo => Ok(text("text/x-nix-cache-info", route::cache_info())),
            Route::NarInfo(hash_part) => {
                let Found { path, known, .. } = self.find(counted, visible, hash_part).await?;
                let url = route::nar_url(&path, &known.info.nar_hash, self.compression);
                let compression = match self.compression {
                    Compression::None => "none",
                    Compression::Zstd => "zstd",
                };
                Ok(text("text/x-nix-narinfo", known.info.nar_info(&path, &url, compression)))
            }
            Route::Nar(hash_part, nar_hash, compression) => {
                let found = self.find(counted, visible, hash_part).await?;
                self.nar(counted, found, &nar_hash, compression, has_body).await
            }
            Route::Realisation(id) => self.realisation(counted, visible, id).await,
            Route::Log(derivation) => self.log(counted, visible, derivation).await,
        }
    }

    /// The first of these clients' paths with this hash part.
    async fn find(&self, counted: &Client, whose: Vec<Client>, hash_part: String) -> Result<Found, Refusal> {
        let nix = Arc::clone(&self.nix);
        let find = move || {
            for client in whose {
                let store = nix.views.of(&client.to_string());
                if let Some((path, known)) = nix.paths.with_hash_part(&client, &store, &hash_part)? {
                    return Ok(Some(Found { store, path, known }));
                }
            }
            Ok::<_, StorePathsError>(None)
        };
        self.scheduler.work(counted, find).await??.ok_or(Refusal::Absent)
    }

    /// What an output has become for the first of these clients that has it.
    async fn realisation(
        &self,
        counted: &Client,
        whose: Vec<Client>,
        id: OutputId,
    ) -> Result<Response<HttpBody>, Refusal> {
        let nix = Arc::clone(&self.nix);
        let find = move || {
            for client in whose {
                let store = nix.views.of(&client.to_string());
                if let Some(realisation) = nix.paths.realisation(&client, &id)?
                    && nix.paths.get(&client, &store, &realisation.path)?.is_some()
                {
                    return Ok(Some(realisation));
                }
            }
            Ok::<_, StorePathsError>(None)
        };
        let found = self.scheduler.work(counted, find).await??.ok_or(Refusal::Absent)?;
        Ok(text("application/json", found.to_json()))
    }

    async fn nar(
        &self,
        counted: &Client,
        Found { store, path, known }: Found,
        nar_hash: &Hash,
        compression: Compression,
        has_body: bool,
    ) -> Result<Response<HttpBody>, Refusal> {
        if known.info.nar_hash != *nar_hash {
            return Err(Refusal::Absent);
        }
        let mut answer =
            Response::builder().header(CONTENT_TYPE, "application/x-nix-nar").header(VARY, "Authorization");
        if compression == Compression::None {
            answer = answer.header(CONTENT_LENGTH, known.info.nar_size);
        }
        if !has_body {
            return Ok(answer.body(empty()).expect("these headers are valid"));
        }
        let turn = self.turn(counted).await?;
        let node = known.node.clone();
        let kept = move || {
            let lease = store.blobs.lease(std::slice::from_ref(&node))?;
            // A collection may have removed it before.
            Ok::<_, io::Error>(store_paths::is_there(&store, &node)?.then_some((store, lease)))
        };
        let (store, lease) = self.scheduler.work(counted, kept).await??.ok_or(Refusal::Absent)?;
        let body = nar::body(store, path, known.node, compression, (turn, lease));
        Ok(answer.body(body).expect("these headers are valid"))
    }

    async fn log(
        &self,
        counted: &Client,
        whose: Vec<Client>,
        derivation: StorePath,
    ) -> Result<Response<HttpBody>, Refusal> {
        let paths = Arc::clone(&self.nix.paths);
        let find = move || {
            for client in whose {
                if let Some(build) = paths.log(&client, &derivation)? {
                    return Ok(Some((client, build)));
                }
            }
            Ok::<_, StorePathsError>(None)
        };
        let (client, build) = self.scheduler.work(counted, find).await??.ok_or(Refusal::Absent)?;
        let turn = self.turn(counted).await?;
        let reader = self.scheduler.read_log(&client, build, 0).await?;
        let pieces = stream::unfold((reader, turn), |(mut reader, turn): (LogReader, Turn)| async {
            let piece = reader.next().await.map_err(io::Error::other).transpose()?;
            Some((piece.map(Frame::data), (reader, turn)))
        });
        let body = StreamBody::new(pieces).boxed_unsync();
        let answer =
            Response::builder().header(CONTENT_TYPE, "text/plain; charset=utf-8").header(VARY, "Authorization");
        Ok(answer.body(body).expect("these headers are valid"))
    }

    async fn turn(&self, client: &Client) -> Result<Turn, Refusal> {
        timeout(TURN_TIMEOUT, self.streams.line(client).turn()).await.map_err(|_| Refusal::Busy)
    }
}

impl From<Refusal> for Response<HttpBody> {
    fn from(refusal: Refusal) -> Self {
        let with = |status, name: HeaderName, value: &'static str| {
            let answer = Response::builder().status(status).header(name, value);
            answer.body(empty()).expect("these headers are valid")
        };
        match refusal {
            Refusal::Stranger => with(StatusCode::UNAUTHORIZED, WWW_AUTHENTICATE, "Basic realm=\"Cofferdam\""),
            Refusal::Absent => with(StatusCode::NOT_FOUND, VARY, "Authorization"),
            Refusal::Method => with(StatusCode::METHOD_NOT_ALLOWED, ALLOW, "GET, HEAD"),
            Refusal::Busy => with(StatusCode::SERVICE_UNAVAILABLE, RETRY_AFTER, "10"),
            Refusal::Failed(_) => with(StatusCode::INTERNAL_SERVER_ERROR, VARY, "Authorization"),
        }
    }
}

fn text(kind: &'static str, text: String) -> Response<HttpBody> {
    let answer = Response::builder().header(CONTENT_TYPE, kind).header(VARY, "Authorization");
    let body = Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync();
    answer.body(body).expect("these headers are valid")
}

fn empty() -> HttpBody {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

//! A page for browsers, to look at and never to change anything. It has no script.
//!
//! ```text
//!   request ─▶ Pace ─▶ Door: certificate or token ─▶ its turn ─▶ list, build, log, outputs, daemon ─▶ answer
//!                 └─ too many ─▶ a second's wait, 429
//! ```
//!
//! What a client sees is up to the scheduler and to its view of the store. Whatever a build or a client has written is escaped:
//! by the templates, or by [`ansi`], and the policy in [`answer`] lets no browser run or load anything of it.

mod ansi;
mod answer;
mod build;
mod door;
mod download;
mod host;
mod list;
mod log;
mod outputs;
mod pace;
mod path;
mod picture;

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use askama::Template;
use bytes::Bytes;
use cofferdam_castore::Views;
use cofferdam_rpc::{Client, Clients, Page, Pages, Turn, Turns, Visit};
use futures::FutureExt as _;
use http_body_util::{BodyExt as _, Limited};
use tonic::{
    body::Body,
    codegen::http::{HeaderValue, Method, Request, StatusCode, header, request::Parts},
};

pub(crate) use self::door::Door;
use self::{
    answer::{Frame, Problem},
    door::{Guest, MAX_TOKEN_BYTES, Refused},
    pace::{PENALTY, Pace},
    path::Question,
};
use crate::{
    records::BuildId,
    scheduler::{Scheduler, unknown},
    telemetry::Metrics,
};

/// Pages that are made at a time.
const MAX_PAGES: usize = 16;

/// Logs and outputs that are sent at a time.
const MAX_STREAMS: usize = 32;

/// How long a request waits for its turn.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a form may take to arrive.
const FORM_TIMEOUT: Duration = Duration::from_secs(10);

/// All that pages are made of.
pub(crate) struct Site {
    scheduler: Scheduler,
    views: Views,
    clients: Clients,
    metrics: Arc<Metrics>,
    door: Arc<Door>,
    pace: Pace,
    pages: Turns,
    streams: Turns,
}

/// A request of a client that was let in.
struct Ask {
    guest: Guest,
    parts: Parts,
    question: Question,
}

#[derive(Template)]
#[template(path = "sign_in.html")]
struct SignIn<'a> {
    frame: Frame,
    refused: Option<&'a str>,
}

impl Site {
    /// The pages about what this scheduler has built.
    pub(crate) fn pages(
        scheduler: Scheduler,
        views: Views,
        clients: &Clients,
        metrics: Arc<Metrics>,
        door: Arc<Door>,
    ) -> Pages {
        let (pages, streams) = (Turns::new(MAX_PAGES, clients), Turns::new(MAX_STREAMS, clients));
        let clients = clients.clone();
        let site = Arc::new(Self { scheduler, views, clients, metrics, door, pace: Pace::default(), pages, streams });
        Pages::new(move |visit, request| Arc::clone(&site).answer(visit, request).boxed())
    }

    async fn answer(self: Arc<Self>, visit: Visit, request: Request<Body>) -> Page {
        let (parts, body) = request.into_parts();
        let guest = self.door.open(&visit, &parts.headers, &self.clients);
        let visitor = guest.as_ref().map_or(&visit.address, |guest| &guest.client);
        if !self.pace.take(visitor, Instant::now()) {
            tokio::time::sleep(PENALTY).await;
            let page =
                answer::text(StatusCode::TOO_MANY_REQUESTS, "you ask for too many pages; try again in a second\n");
            return answer::with(page, header::RETRY_AFTER, "1");
        }
        match (parts.method.as_str(), parts.uri.path()) {
            ("GET" | "HEAD", "/style.css") => answer::fixed("text/css; charset=utf-8", style_sheet()),
            ("GET" | "HEAD", "/icon.svg") => {
                answer::fixed("image/svg+xml", include_str!("../../../templates/icon.svg"))
            }
            ("GET" | "HEAD", "/sign-in") => sign_in_page(StatusCode::OK, None),
            ("POST", "/sign-in") => self.sign_in(&visit, &parts, body).await,
            ("POST", "/sign-out") => sign_out(&visit, &parts),
            ("GET" | "HEAD", _) => match guest {
                Ok(guest) => self.page(guest, parts).await,
                Err(Refused::NotSignedIn) => sign_in_page(StatusCode::UNAUTHORIZED, None),
                Err(refused @ Refused::NoTenant(_)) => {
                    Problem::new(StatusCode::FORBIDDEN, refused.to_string()).page(Frame::default())
                }
                Err(refused) => sign_in_page(StatusCode::UNAUTHORIZED, Some(&refused.to_string())),
            },
            _ => {
                let problem = Problem::new(StatusCode::METHOD_NOT_ALLOWED, "this page is only for looking");
                answer::with(problem.page(Frame::default()), header::ALLOW, "GET, HEAD")
            }
        }
    }

    /// A page for a client that has signed in.
    async fn page(&self, guest: Guest, parts: Parts) -> Page {
        let frame = Frame::of(&guest);
        let question = match Question::of(&parts.uri) {
            Ok(question) => question,
            Err(problem) => return problem.page(frame),
        };
        let ask = Ask { guest, parts, question };
        self.route(&ask).await.unwrap_or_else(|problem| problem.page(frame))
    }

    async fn route(&self, ask: &Ask) -> Result<Page, Problem> {
        match path::parts(&ask.parts.uri).as_slice() {
            [""] => self.list(ask).await,
            ["daemon"] => self.host(ask).await,
            ["builds", id] => self.build(ask, build_id(id)?).await,
            ["builds", id, "log"] => self.log(ask, build_id(id)?).await,
            ["builds", id, "log", "follow"] => self.follow(ask, build_id(id)?).await,
            ["builds", id, "log", "file"] => self.log_file(ask, build_id(id)?).await,
            ["builds", id, "provenance"] => self.provenance(ask, build_id(id)?).await,
            ["builds", id, "request"] => self.request(ask, build_id(id)?).await,
            ["builds", id, "outputs", rest @ ..] if !rest.is_empty() => self.output(ask, build_id(id)?, rest).await,
            _ => Err(Problem::unknown("there is no such page")),
        }
    }

    async fn sign_in(&self, visit: &Visit, parts: &Parts, body: Body) -> Page {
        if !is_own_form(parts) {
            return Problem::new(StatusCode::FORBIDDEN, "the form is not one of this page's").page(Frame::default());
        }
        let form = Limited::new(body, 4 * MAX_TOKEN_BYTES).collect();
        let Ok(Ok(form)) = tokio::time::timeout(FORM_TIMEOUT, form).await else {
            return sign_in_page(StatusCode::BAD_REQUEST, Some("the form is too large, or did not arrive"));
        };
        let form = Question::parse(&String::from_utf8_lossy(&form.to_bytes()));
        let token = form.as_ref().ok().and_then(|form| form.get("token")).unwrap_or_default().trim();
        let held = self.door.holder(token, SystemTime::now());
        let held = held.and_then(|(client, age)| door::admit(&self.clients, &client).map(|()| age));
        match held {
            Ok(age) => answer::with(answer::see_other("/"), header::SET_COOKIE, &door::set_cookie(token, age, visit)),
            Err(refused) => sign_in_page(StatusCode::UNAUTHORIZED, Some(&refused.to_string())),
        }
    }

    /// Waits until a page may be made for a client.
    async fn turn(&self, turns: &Turns, client: &Client) -> Result<Turn, Problem> {
        let turn = tokio::time::timeout(PATIENCE, turns.line(client).turn()).await;
        turn.map_err(|_| {
            Problem::new(StatusCode::SERVICE_UNAVAILABLE, "too many of your pages are on their way; try again later")
        })
    }
}

/// The cookie goes, but the token is good until it ends.
fn sign_out(visit: &Visit, parts: &Parts) -> Page {
    if !is_own_form(parts) {
        return Problem::new(StatusCode::FORBIDDEN, "the form is not one of this page's").page(Frame::default());
    }
    answer::with(answer::see_other("/sign-in"), header::SET_COOKIE, &door::set_cookie("", Duration::ZERO, visit))
}

/// Whether a form comes from this page. Browsers say so; other programs act for their own user alone.
fn is_own_form(Parts { method, headers, .. }: &Parts) -> bool {
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    *method == Method::POST && matches!(site, None | Some(b"same-origin" | b"none"))
}

fn sign_in_page(status: StatusCode, refused: Option<&str>) -> Page {
    answer::page(status, &SignIn { frame: Frame::default(), refused })
}

fn style_sheet() -> Bytes {
    (include_str!("../../../templates/style.css").to_owned() + &ansi::style_sheet()).into()
}

/// A log as it is shown, for fuzzing.
pub(crate) fn log_as_html<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut ansi = ansi::Ansi::default();
    pieces.into_iter().map(|piece| ansi.html(piece)).collect()
}

/// Malformed ids are answered like unknown ones.
fn build_id(text: &str) -> Result<BuildId, Problem> {
    text.parse().map_err(|_| unknown().into())
}

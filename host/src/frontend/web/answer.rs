//! Answers, with the headers that keep a hostile build's words from being more than words.

use askama::Template;
use bytes::Bytes;
use cofferdam_rpc::Page;
use futures::{Stream, StreamExt as _};
use http_body_util::{Full, StreamBody};
use hyper::body::Frame as Piece;
use tonic::{
    body::Body,
    codegen::http::{HeaderName, HeaderValue, Response, StatusCode, header},
};

use super::{door::Guest, download::CutShort};
use crate::build::failure::{Failure, FailureKind};

/// Of pages: nothing but their own style sheet and pictures; no script, and no frame around them.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; \
                           frame-ancestors 'none'";

/// Of what a build has made: it is nobody's page.
const DOWNLOAD_POLICY: &str = "default-src 'none'; sandbox; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";

/// What stands around every page.
#[derive(Debug, Clone, Default)]
pub(super) struct Frame {
    /// Who has signed in.
    pub(super) who: Option<String>,
    pub(super) can_sign_out: bool,
    /// Whether the browser is asked to load it again and again.
    pub(super) is_live: bool,
}

impl Frame {
    pub(super) fn of(guest: &Guest) -> Self {
        Self { who: Some(guest.client.to_string()), can_sign_out: guest.has_token, is_live: false }
    }
}

/// Something that is wrong with a request, or went wrong with it.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    pub(super) message: String,
}

impl Problem {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    pub(super) fn unknown(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    pub(super) fn wrong(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(super) fn page(&self, frame: Frame) -> Page {
        let title = self.status.canonical_reason().unwrap_or("Error");
        page(self.status, &ProblemPage { frame, title, message: &self.message })
    }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        let status = match (failure.reason.as_str(), failure.kind) {
            ("unknown_build" | "beyond_end" | "no_provenance", _) => StatusCode::NOT_FOUND,
            (_, FailureKind::RequestWrong | FailureKind::BuildFailed) => StatusCode::BAD_REQUEST,
            (_, FailureKind::ExecutorFailed) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, failure.chain())
    }
}

#[derive(Template)]
#[template(path = "problem.html")]
struct ProblemPage<'a> {
    frame: Frame,
    title: &'a str,
    message: &'a str,
}

/// A page from a template.
pub(super) fn page(status: StatusCode, template: &impl Template) -> Page {
    match template.render() {
        Ok(html) => answer(status, HTML, PAGE_POLICY, Body::new(Full::from(html))),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("the page can't be made: {error}\n")),
    }
}

/// A page whose end isn't known yet.
pub(super) fn stream(html: impl Stream<Item = Result<Bytes, CutShort>> + Send + 'static) -> Page {
    answer(StatusCode::OK, HTML, PAGE_POLICY, streamed(html))
}

/// A few words.
pub(super) fn text(status: StatusCode, text: &str) -> Page {
    answer(status, "text/plain; charset=utf-8", PAGE_POLICY, Body::new(Full::from(text.to_owned())))
}

/// A part of the page that is the same for everyone.
pub(super) fn fixed(kind: &str, contents: impl Into<Bytes>) -> Page {
    let page = answer(StatusCode::OK, kind, PAGE_POLICY, Body::new(Full::from(contents.into())));
    with(page, header::CACHE_CONTROL, "max-age=3600")
}

/// Goes on at another page.
pub(super) fn see_other(path: &str) -> Page {
    with(text(StatusCode::SEE_OTHER, ""), header::LOCATION, path)
}

/// A file to keep, not to show. `bytes` if its length is known.
pub(super) fn download(
    name: &[u8],
    bytes: Option<u64>,
    contents: impl Stream<Item = Result<Bytes, CutShort>> + Send + 'static,
) -> Page {
    let page = answer(StatusCode::OK, "application/octet-stream", DOWNLOAD_POLICY, streamed(contents));
    let page = with(page, header::CONTENT_DISPOSITION, &attachment(name));
    match bytes {
        Some(bytes) => with(page, header::CONTENT_LENGTH, &bytes.to_string()),
        None => page,
    }
}

pub(super) fn with(mut page: Page, name: HeaderName, value: &str) -> Page {
    match HeaderValue::from_str(value) {
        Ok(value) => drop(page.headers_mut().insert(name, value)),
        Err(_) => tracing::warn!("a page has no {name}: it would hold control characters"),
    }
    page
}

fn streamed(contents: impl Stream<Item = Result<Bytes, CutShort>> + Send + 'static) -> Body {
    Body::new(StreamBody::new(contents.map(|piece| piece.map(Piece::data))))
}

fn answer(status: StatusCode, kind: &str, policy: &str, body: Body) -> Page {
    let mut page = Response::new(body);
    *page.status_mut() = status;
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    headers.into_iter().fold(page, |page, (name, value)| with(page, name, value))
}

/// The header that makes a browser keep a file under this name, by RFC 6266: for old browsers in ASCII, for others as it is. The
/// name is one of a path, so it has no slash.
fn attachment(name: &[u8]) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte);
    let plain: String = name.iter().map(|&byte| if is_plain(byte) { char::from(byte) } else { '_' }).collect();
    let encoded = super::path::encoded(name);
    format!("attachment; filename=\"{plain}\"; filename*=UTF-8''{encoded}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_stays_within_its_header() {
        for (name, expected) in [
            (b"out.tar".as_slice(), "attachment; filename=\"out.tar\"; filename*=UTF-8''out.tar"),
            (
                b"a\"; x=\r\nSet-Cookie: b",
                "attachment; filename=\"a___x___Set-Cookie__b\"; filename*=UTF-8''a%22%3B%20x%3D%0D%0ASet-Cookie%3A%20b",
            ),
            ("ü/\u{202e}".as_bytes(), "attachment; filename=\"______\"; filename*=UTF-8''%C3%BC%2F%E2%80%AE"),
        ] {
            assert_eq!(attachment(name), expected);
            HeaderValue::from_str(&attachment(name)).unwrap();
        }
    }
}

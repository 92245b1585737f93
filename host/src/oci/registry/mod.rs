//! Images in registries, by the OCI distribution protocol.

mod credentials;
mod login;
mod reference;

use std::{
    io::{self, Read},
    path::PathBuf,
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use reqwest::{
    Client, Response, StatusCode,
    header::{ACCEPT, AUTHORIZATION, HeaderValue},
};
use serde::Deserialize;
use tokio::runtime::Handle;

use super::{Descriptor, Digest, Manifest, OciError, Platform, Source, manifest};
pub(crate) use credentials::file as login_file;
pub(super) use login::is_challenge;
pub(crate) use reference::Reference;

/// Limit on establishing a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Limit on the time between two pieces of an answer.
const SILENCE: Duration = Duration::from_secs(60);

/// The kinds of documents that an image may begin with.
const DOCUMENTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
                         application/vnd.docker.distribution.manifest.list.v2+json, \
                         application/vnd.docker.distribution.manifest.v2+json";

/// Most characters of a registry's message that are shown.
const MAX_MESSAGE: usize = 200;

/// A repository of a registry. All its methods block: call them from a thread that may, not from async code.
pub(crate) struct Registry {
    client: Client,
    runtime: Handle,
    reference: Reference,
    /// Docker's configuration.
    logins: Option<PathBuf>,
    /// The value of the header with which the registry lets this client in.
    authorization: Mutex<Option<HeaderValue>>,
}

/// What registries say about a refusal.
#[derive(Deserialize)]
struct Refusal {
    errors: Vec<RefusalReason>,
}

#[derive(Deserialize)]
struct RefusalReason {
    #[serde(default)]
    message: String,
}

impl Registry {
    /// A client for a reference. `logins` is the file of Docker's configuration. Plain HTTP is only spoken where the
    /// reference says so.
    ///
    /// # Errors
    ///
    /// This host's certificates can't be read.
    pub(crate) fn new(reference: Reference, logins: Option<PathBuf>, runtime: Handle) -> Result<Self, OciError> {
        // Fails when there is a provider already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut client = Client::builder()
            .user_agent(concat!("cofferdam/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(SILENCE)
            // Holds for redirections, too.
            .https_only(!reference.is_plain());
        if reference.is_loopback() {
            client = client.no_proxy();
        }
        let client = client.build();
        let client = client.map_err(|error| unreachable_because(&reference, error))?;
        Ok(Self { client, runtime, reference, logins, authorization: Mutex::new(None) })
    }

    /// The digest of what the reference stands for now, and its image for a platform.
    ///
    /// # Errors
    ///
    /// There is no such image, or the registry can't be reached or refuses.
    pub(crate) fn resolve(&self, wanted: &Platform) -> Result<(Digest, Manifest), OciError> {
        let what = self.reference.to_string();
        let bytes = manifest::read_document(&what, self.get("manifests", &self.reference.version(), &what)?)?;
        let found = Digest::of(&bytes);
        if let Some(expected) = self.reference.digest().filter(|expected| *expected != found) {
            return Err(OciError::Digest { at: what, expected, found });
        }
        Ok((found, manifest::Choice::new(self, wanted).of_document(found, &bytes)?))
    }

    fn get(&self, kind: &str, version: &str, what: &str) -> Result<Body<'_>, OciError> {
        let url = format!("{}/v2/{}/{kind}/{version}", self.reference.base(), self.reference.name());
        let response = self.runtime.block_on(async {
            let response = self.request(&url).await?;
            if response.status() != StatusCode::UNAUTHORIZED {
                return Ok(response);
            }
            // A token may have expired.
            let value =
                login::log_in(&self.client, &self.reference, self.logins.as_deref(), response.headers()).await?;
            *self.authorization.lock() = Some(value);
            self.request(&url).await
        })?;
        self.check(response, what)
    }

    async fn request(&self, url: &str) -> Result<Response, OciError> {
        let mut request = self.client.get(url).header(ACCEPT, DOCUMENTS);
        if let Some(value) = self.authorization.lock().clone() {
            request = request.header(AUTHORIZATION, value);
        }
        request.send().await.map_err(|error| unreachable_because(&self.reference, error))
    }

    fn check(&self, response: Response, what: &str) -> Result<Body<'_>, OciError> {
        let status = response.status();
        let mut body = Body { runtime: &self.runtime, response, piece: Bytes::new() };
        if status.is_success() {
            return Ok(body);
        }
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            let host = self.reference.host().to_owned();
            let had_one = credentials::of(&host, self.logins.as_deref()).is_ok_and(|found| found.is_some());
            return Err(OciError::Login { host, had_one });
        }
        let said = manifest::read_document(what, &mut body).ok();
        let said = said.and_then(|bytes| serde_json::from_slice::<Refusal>(&bytes).ok());
        let said = said.and_then(|refusal| refusal.errors.into_iter().next());
        let said = said.map(|reason| reason.message.escape_default().take(MAX_MESSAGE).collect::<String>());
        let message = said.filter(|said| !said.is_empty()).map(|said| format!(": {said}")).unwrap_or_default();
        Err(OciError::Refused { status: status.as_u16(), what: what.to_owned(), message })
    }
}

impl Source for Registry {
    fn open(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + '_>, OciError> {
        let digest = descriptor.digest.to_string();
        let kind = if descriptor.is_document() { "manifests" } else { "blobs" };
        Ok(Box::new(self.get(kind, &digest, &digest)?))
    }
}

fn unreachable_because(reference: &Reference, error: reqwest::Error) -> OciError {
    // The URL may have a secret of another host, where the registry has redirected to.
    OciError::Unreachable { host: reference.host().to_owned(), source: Box::new(error.without_url()) }
}

/// The body of an answer, which comes piece by piece.
struct Body<'a> {
    runtime: &'a Handle,
    response: Response,
    piece: Bytes,
}

impl Read for Body<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            let next = self.runtime.block_on(self.response.chunk());
            match next.map_err(|error| io::Error::other(error.without_url()))? {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let piece = self.piece.split_to(buffer.len().min(self.piece.len()));
        buffer[..piece.len()].copy_from_slice(&piece);
        Ok(piece.len())
    }
}

#[cfg(test)]
mod tests;

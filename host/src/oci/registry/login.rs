//! Tokens and passwords: what a registry wants after it has answered 401.

use std::path::Path;

use data_encoding::BASE64;
use reqwest::{
    Client,
    header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE},
};
use serde::Deserialize;

use super::{
    super::{OciError, manifest::MAX_DOCUMENT_BYTES},
    Reference, credentials, unreachable_because,
};

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// A challenge, as in `Bearer realm="https://…",service="…",scope="…"`.
#[derive(Debug, PartialEq, Eq)]
struct Challenge {
    scheme: String,
    parameters: Vec<(String, String)>,
}

/// The value of the header that answers the challenge. `logins` is the file that may have a password.
pub(super) async fn log_in(
    client: &Client,
    reference: &Reference,
    logins: Option<&Path>,
    headers: &HeaderMap,
) -> Result<HeaderValue, OciError> {
    let host = reference.host();
    let at = format!("the registry {host}");
    let own = credentials::of(host, logins);
    let own = own.map_err(|source| OciError::Read { at: format!("the login for {host}"), source })?;
    let password = own.map(|own| secret("Basic", &BASE64.encode(format!("{}:{}", own.user, own.password).as_bytes())));
    let password = password.transpose().map_err(|rule| OciError::malformed(&at, rule))?;
    let challenges =
        headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| Challenge::parse(value.to_str().ok()?));
    let challenges: Vec<_> = challenges.collect();
    let find = |scheme: &str| challenges.iter().find(|challenge| challenge.scheme.eq_ignore_ascii_case(scheme));
    let Some(bearer) = find("bearer") else {
        let refused = OciError::Login { host: host.to_owned(), had_one: false };
        return find("basic").and(password).ok_or(refused);
    };
    let scope = format!("repository:{}:pull", reference.name());
    let realm = bearer.parameter("realm").unwrap_or_default();
    if !realm.starts_with("https://") && !reference.is_plain() {
        return Err(OciError::malformed(at, "wants a token to be fetched without TLS"));
    }
    let mut query = vec![("scope", scope.as_str())];
    query.extend(bearer.parameter("service").map(|service| ("service", service)));
    let wrong = |_| OciError::malformed(&at, "names a wrong address for tokens");
    let url = reqwest::Url::parse_with_params(realm, query).map_err(wrong)?;
    let mut request = client.get(url);
    let had_one = password.is_some();
    if let Some(password) = password {
        request = request.header(AUTHORIZATION, password);
    }
    let mut response = request.send().await.map_err(|error| unreachable_because(reference, error))?;
    if !response.status().is_success() {
        return Err(OciError::Login { host: host.to_owned(), had_one });
    }
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(|error| unreachable_because(reference, error))? {
        body.extend_from_slice(&piece);
        if body.len() as u64 > MAX_DOCUMENT_BYTES {
            return Err(OciError::malformed(at, "gives a token that is too long"));
        }
    }
    let token: Option<Token> = serde_json::from_slice(&body).ok();
    let token = token.and_then(|token| token.token.or(token.access_token));
    let token = token.ok_or_else(|| OciError::malformed(&at, "gives no token where it should"))?;
    secret("Bearer", &token).map_err(|rule| OciError::malformed(at, rule))
}

fn secret(scheme: &str, value: &str) -> Result<HeaderValue, &'static str> {
    let mut value = HeaderValue::try_from(format!("{scheme} {value}")).map_err(|_| "has a token that is no header")?;
    value.set_sensitive(true);
    Ok(value)
}

/// Whether the value of a header is a challenge with an address for tokens.
pub(in crate::oci) fn is_challenge(value: &[u8]) -> bool {
    let challenge = str::from_utf8(value).ok().and_then(Challenge::parse);
    challenge.is_some_and(|challenge| challenge.parameter("realm").is_some())
}

impl Challenge {
    fn parse(text: &str) -> Option<Self> {
        let (scheme, mut rest) = text.trim().split_once(' ')?;
        let mut parameters = Vec::new();
        while let Some((key, after)) = rest.split_once('=') {
            let (value, after) = match after.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => after.split_at(after.find(',').unwrap_or(after.len())),
            };
            parameters.push((key.trim_matches([' ', ',']).to_ascii_lowercase(), value.to_owned()));
            rest = after;
        }
        Some(Self { scheme: scheme.to_owned(), parameters })
    }

    fn parameter(&self, key: &str) -> Option<&str> {
        self.parameters.iter().find(|(of, _)| of == key).map(|(_, value)| value.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_have_parameters_with_and_without_quotes() {
        let text = "Bearer realm=\"https://auth.example/token?a=b\", service=registry,scope=\"repository:a:pull,push\"";
        let challenge = Challenge::parse(text).unwrap();
        assert_eq!(challenge.scheme, "Bearer");
        assert_eq!(challenge.parameter("realm"), Some("https://auth.example/token?a=b"));
        assert_eq!(challenge.parameter("service"), Some("registry"));
        assert_eq!(challenge.parameter("scope"), Some("repository:a:pull,push"));
        assert_eq!(challenge.parameter("error"), None);
        assert_eq!(Challenge::parse("Basic realm=\"x"), None);
        assert_eq!(Challenge::parse(""), None);
    }
}

//! Whose paths a request may see.

use std::collections::BTreeMap;

use cofferdam_rpc::Client;
use data_encoding::{BASE64, HEXLOWER};
use hyper::{HeaderMap, header};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

/// The SHA-256 of a token, which tells nothing about the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TokenDigest([u8; 32]);

impl std::str::FromStr for TokenDigest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = HEXLOWER.decode(text.as_bytes()).ok().and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or_else(|| "must be the SHA-256 of a token, as 64 digits of sha256sum's".to_owned())
    }
}

impl TokenDigest {
    fn of(token: &[u8]) -> Self {
        Self(Sha256::digest(token).into())
    }
}

/// Who may read.
#[derive(Debug, Clone, Default)]
pub(crate) struct Access {
    /// Whose paths everybody sees.
    pub public: Option<Client>,
    /// The clients with tokens.
    pub tokens: BTreeMap<Client, TokenDigest>,
}

impl Access {
    /// The clients whose paths a request with these headers may see, the first before the others. `None`: it needs another
    /// token.
    ///
    /// A token is the password of HTTP's basic authentication, since that is all that Nix sends. The user name is not looked at.
    pub(super) fn visible(&self, headers: &HeaderMap) -> Option<Vec<Client>> {
        let Some(header) = headers.get(header::AUTHORIZATION) else {
            return self.public.clone().map(|client| vec![client]);
        };
        let offered = TokenDigest::of(&password(header.as_bytes())?);
        let mut found = None;
        for (client, token) in &self.tokens {
            if token.0.ct_eq(&offered.0).into() {
                found = Some(client);
            }
        }
        let own = found?;
        let public = self.public.iter().filter(|public| *public != own);
        Some([own].into_iter().chain(public).cloned().collect())
    }
}

fn password(header: &[u8]) -> Option<Vec<u8>> {
    let (scheme, rest) = header.split_at_checked(b"Basic ".len())?;
    let credentials = BASE64.decode(rest).ok().filter(|_| scheme.eq_ignore_ascii_case(b"basic "))?;
    let colon = credentials.iter().position(|&byte| byte == b':')?;
    Some(credentials[colon + 1..].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: Client = Client::User(1);
    const CI: Client = Client::User(3);

    fn visible(access: &Access, authorization: &str) -> Option<Vec<Client>> {
        let headers = HeaderMap::from_iter([(header::AUTHORIZATION, authorization.parse().unwrap())]);
        access.visible(&headers)
    }

    fn basic(text: &str) -> String {
        format!("Basic {}", BASE64.encode(text.as_bytes()))
    }

    #[test]
    fn a_token_shows_its_clients_paths_and_the_public_ones() {
        let tokens = BTreeMap::from([(ALICE, TokenDigest::of(b"a:b")), (CI, TokenDigest::of(b"ci"))]);
        let closed = Access { public: None, tokens: tokens.clone() };
        let open = Access { public: Some(CI), tokens };
        assert_eq!(visible(&closed, &basic("anyone:a:b")), Some(vec![ALICE]));
        assert_eq!(visible(&closed, &basic(":a:b").replace("Basic", "bAsIc")), Some(vec![ALICE]));
        assert_eq!(visible(&open, &basic("x:a:b")), Some(vec![ALICE, CI]));
        assert_eq!(visible(&open, &basic("x:ci")), Some(vec![CI]));
        assert_eq!(closed.visible(&HeaderMap::new()), None);
        assert_eq!(open.visible(&HeaderMap::new()), Some(vec![CI]));
        for wrong in ["", "Basic", "Basic ", "Basic !", "Bearer a:b", &basic("a:b"), &basic("x:"), &basic("x:a:b ")] {
            assert_eq!(visible(&open, wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_digest_is_read_as_sha256sum_prints_it() {
        let digest = "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603";
        assert_eq!(digest.parse(), Ok(TokenDigest::of(b"ab")));
        for wrong in ["", "ab", &digest[1..], &digest.to_uppercase(), &format!("{digest}00")] {
            assert!(wrong.parse::<TokenDigest>().is_err(), "{wrong}");
        }
    }
}

//! Who is let in to the page, and as whom: the holder of a client certificate, or of a token.
//!
//! A token names a client and its own end, and has an HMAC of both by a key that the daemon makes at its start. So nothing of it is
//! stored, and all tokens end with the daemon.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cofferdam_rpc::{Client, Clients, Visit};
use data_encoding::BASE64URL_NOPAD as BASE64URL;
use ring::{
    error::Unspecified,
    hmac::{HMAC_SHA256, Key, sign, verify},
    rand::SystemRandom,
};
use tonic::codegen::http::{HeaderMap, header};

/// How long a token is good for.
const LIFETIME: Duration = Duration::from_secs(12 * 60 * 60);

/// Most bytes of a token: the longest name, its end and its HMAC take less.
pub(super) const MAX_TOKEN_BYTES: usize = 512;

/// The cookie's name.
const COOKIE: &str = "cofferdam-session";

/// Makes tokens and tells whose they are.
#[derive(Debug)]
pub(crate) struct Door {
    key: Key,
    /// Where the page is.
    pub(crate) address: String,
}

/// A client that was let in.
#[derive(Debug, Clone)]
pub(super) struct Guest {
    pub(super) client: Client,
    /// It has shown no certificate, and so can sign out.
    pub(super) has_token: bool,
}

/// Why somebody isn't let in.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error("sign in to see your builds")]
    NotSignedIn,
    #[error("this token is not one of this daemon's, or it was made before the daemon's last start")]
    Stranger,
    #[error("this token has expired")]
    Expired,
    #[error("{0}")]
    NoTenant(String),
}

impl Door {
    /// A door to the page at this address, with a new key.
    ///
    /// # Errors
    ///
    /// The kernel has no random numbers.
    pub(crate) fn new(address: String) -> Result<Self, Unspecified> {
        Ok(Self { key: Key::generate(HMAC_SHA256, &SystemRandom::new())?, address })
    }

    /// A token for a client, and when it ends, in seconds since 1970.
    pub(crate) fn token(&self, client: &Client, now: SystemTime) -> (String, u64) {
        let expires = seconds(now) + LIFETIME.as_secs();
        let claim = format!("{expires}.{}", BASE64URL.encode(client.to_string().as_bytes()));
        let tag = sign(&self.key, claim.as_bytes());
        (format!("{claim}.{}", BASE64URL.encode(tag.as_ref())), expires)
    }

    /// Whose token this is, and for how long it is good.
    pub(super) fn holder(&self, token: &str, now: SystemTime) -> Result<(Client, Duration), Refused> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Refused::Stranger);
        }
        let claimed = || {
            let (claim, tag) = token.rsplit_once('.')?;
            let tag = BASE64URL.decode(tag.as_bytes()).ok()?;
            verify(&self.key, claim.as_bytes(), &tag).ok()?;
            let (expires, name) = claim.split_once('.')?;
            let name = String::from_utf8(BASE64URL.decode(name.as_bytes()).ok()?).ok()?;
            Some((expires.parse::<u64>().ok()?, name.parse().ok()?))
        };
        let (expires, client) = claimed().ok_or(Refused::Stranger)?;
        match expires.checked_sub(seconds(now)) {
            None | Some(0) => Err(Refused::Expired),
            Some(left) => Ok((client, Duration::from_secs(left))),
        }
    }

    /// Lets in the holder of a certificate or of a token in a cookie.
    pub(super) fn open(&self, visit: &Visit, headers: &HeaderMap, clients: &Clients) -> Result<Guest, Refused> {
        let guest = match &visit.certificate {
            Some(client) => Guest { client: client.clone(), has_token: false },
            None => {
                let token = cookie(headers).ok_or(Refused::NotSignedIn)?;
                Guest { client: self.holder(token, SystemTime::now())?.0, has_token: true }
            }
        };
        admit(clients, &guest.client)?;
        Ok(guest)
    }
}

/// A client that has signed in must still be a tenant.
pub(super) fn admit(clients: &Clients, client: &Client) -> Result<(), Refused> {
    clients.admit(client).map_err(|status| Refused::NoTenant(status.message().to_owned()))
}

/// The header that makes a browser keep a token for so long.
pub(super) fn set_cookie(token: &str, age: Duration, visit: &Visit) -> String {
    let secure = if visit.is_encrypted { "; Secure" } else { "" };
    format!("{COOKIE}={token}; Path=/; Max-Age={}; HttpOnly; SameSite=Strict{secure}", age.as_secs())
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|cookies| cookies.to_str().ok());
    let mut pairs = cookies.flat_map(|cookies| cookies.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(name, token)| *name == COOKIE && !token.is_empty()).map(|(_, token)| token)
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: SystemTime = UNIX_EPOCH;

    #[test]
    fn a_token_names_its_client_until_it_ends() {
        let door = Door::new(String::new()).unwrap();
        for name in ["user:1001", "uri:spiffe://a/b?c=d;e", "address:fd12::/64", "key:alice@laptop"] {
            let client: Client = name.parse().unwrap();
            let (token, _) = door.token(&client, NOW);
            assert!(token.len() <= MAX_TOKEN_BYTES && !token.contains([';', ' ', ',', '"']), "{token}");
            assert_eq!(door.holder(&token, NOW).unwrap(), (client, LIFETIME));
            assert_eq!(door.holder(&token, NOW + LIFETIME), Err(Refused::Expired));
        }
        let longest: Client = format!("uri:{}", "a".repeat(255)).parse().unwrap();
        assert_eq!(door.holder(&door.token(&longest, NOW).0, NOW).unwrap().0, longest);
    }

    #[test]
    fn what_is_changed_cut_or_of_another_daemon_is_nobodys() {
        let (door, other) = (Door::new(String::new()).unwrap(), Door::new(String::new()).unwrap());
        let (token, _) = door.token(&Client::User(7), NOW);
        assert_eq!(other.holder(&token, NOW), Err(Refused::Stranger));
        for cut in 0..token.len() {
            assert_eq!(door.holder(&token[..cut], NOW), Err(Refused::Stranger), "{cut}");
            let mut changed = token.clone().into_bytes();
            changed[cut] = if changed[cut] == b'1' { b'2' } else { b'1' };
            let changed = String::from_utf8(changed).unwrap();
            assert_eq!(door.holder(&changed, NOW), Err(Refused::Stranger), "{changed}");
        }
        for text in ["", ".", "..", "a.b.c", &"x".repeat(100_000)] {
            assert_eq!(door.holder(text, NOW), Err(Refused::Stranger), "{text}");
        }
    }

    #[test]
    fn the_cookie_is_found_among_others() {
        let mut headers = HeaderMap::new();
        headers.append(header::COOKIE, "a=b; cofferdam-session=".parse().unwrap());
        assert_eq!(cookie(&headers), None);
        headers.append(header::COOKIE, "xcofferdam-session=1;cofferdam-session=2; c=d".parse().unwrap());
        assert_eq!(cookie(&headers), Some("2"));
    }
}

//! Who is let in, and as whom.

use std::{
    collections::{BTreeMap, BTreeSet},
    str::FromStr,
    sync::Arc,
};

use tonic::Status;

use crate::Client;

/// A client, or all clients whose names begin in the same way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pattern {
    /// This client.
    Exact(Client),
    /// The clients whose names begin with this.
    Prefix(String),
}

/// A client as it is displayed, or the beginning of its name and a `*`.
impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(prefix) = text.strip_suffix('*') {
            let error = || "no client's name begins with this".to_owned();
            return begins_a_name(prefix).then(|| Self::Prefix(prefix.to_owned())).ok_or_else(error);
        }
        let client: Client = text.parse()?;
        let written = client.to_string();
        if written == text { Ok(Self::Exact(client)) } else { Err(format!("must be written {written:?}")) }
    }
}

/// Whether some client's name begins with this.
fn begins_a_name(prefix: &str) -> bool {
    let Some((kind, rest)) = prefix.split_once(':') else {
        return ["user:", "uri:", "dns:", "email:", "address:", "key:"].iter().any(|kind| kind.starts_with(prefix));
    };
    let is_number = |digits: &str| digits.parse::<u32>().is_ok_and(|number| number.to_string() == digits);
    match kind {
        "user" => rest.is_empty() || is_number(rest),
        "address" => rest.split(['.', ':']).all(|group| {
            let is_short = group.len() <= 1 || (group.len() <= 4 && !group.starts_with('0'));
            is_short && group.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        }),
        "dns" if rest.bytes().any(|byte| byte.is_ascii_uppercase()) => false,
        _ => rest.is_empty() || prefix.parse::<Client>().is_ok(),
    }
}

/// A value for each client. That of its own name goes before that of a prefix, and a longer prefix before a shorter one.
#[derive(Debug, Clone)]
pub struct Patterns<T> {
    exact: BTreeMap<Client, T>,
    prefixes: BTreeMap<String, T>,
}

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self { exact: BTreeMap::new(), prefixes: BTreeMap::new() }
    }
}

impl<T> Patterns<T> {
    /// Sets a pattern's value. Returns the one that it had.
    pub fn insert(&mut self, pattern: Pattern, value: T) -> Option<T> {
        match pattern {
            Pattern::Exact(client) => self.exact.insert(client, value),
            Pattern::Prefix(prefix) => self.prefixes.insert(prefix, value),
        }
    }

    /// The value for a client, if a pattern fits it.
    pub fn get(&self, client: &Client) -> Option<&T> {
        let of_prefix = || {
            let name = client.to_string();
            let fitting = self.prefixes.iter().filter(|(prefix, _)| name.starts_with(*prefix));
            fitting.max_by_key(|(prefix, _)| prefix.len()).map(|(_, value)| value)
        };
        self.exact.get(client).or_else(of_prefix)
    }

    /// Other values for the same patterns.
    pub fn map<U>(&self, to: impl Fn(&T) -> U) -> Patterns<U> {
        Patterns {
            exact: self.exact.iter().map(|(client, value)| (client.clone(), to(value))).collect(),
            prefixes: self.prefixes.iter().map(|(prefix, value)| (prefix.clone(), to(value))).collect(),
        }
    }
}

/// The clients of a server: who is let in, who is an operator, and each one's share of what they take in turns. By default
/// all are let in and have the same share.
#[derive(Debug, Clone, Default)]
pub struct Clients(Arc<Known>);

#[derive(Debug, Default)]
struct Known {
    operators: BTreeSet<Client>,
    shares: Option<Patterns<u32>>,
}

impl Clients {
    /// These operators beside root, and clients with a share. With `shares` no other client is let in.
    pub fn new(operators: impl IntoIterator<Item = Client>, shares: Option<Patterns<u32>>) -> Self {
        Self(Arc::new(Known { operators: operators.into_iter().collect(), shares }))
    }

    /// Whether a client is root of this host, or is listed as an operator.
    pub fn is_operator(&self, client: &Client) -> bool {
        *client == Client::User(0) || self.0.operators.contains(client)
    }

    /// A client's share, at least 1.
    pub fn share(&self, client: &Client) -> u32 {
        self.0.shares.as_ref().and_then(|shares| shares.get(client)).map_or(1, |share| (*share).max(1))
    }

    /// Lets a client in.
    ///
    /// # Errors
    ///
    /// It is a stranger.
    pub fn admit(&self, client: &Client) -> Result<(), Status> {
        match &self.0.shares {
            Some(shares) if shares.get(client).is_none() && !self.is_operator(client) => {
                Err(Status::permission_denied(format!(
                    "{client} is no tenant of this daemon; to admit it, write [tenants.\"{client}\"] into the daemon's \
                     configuration"
                )))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(texts: &[&str]) -> Patterns<String> {
        let mut patterns = Patterns::default();
        for text in texts {
            assert_eq!(patterns.insert(text.parse().unwrap(), (*text).to_owned()), None, "{text}");
        }
        patterns
    }

    #[test]
    fn a_client_has_the_value_of_its_name_or_else_of_the_longest_prefix() {
        let patterns =
            patterns(&["user:1001", "user:*", "uri:spiffe://a/*", "uri:spiffe://a/b/*", "address:2001:db8:*"]);
        for (client, expected) in [
            ("user:1001", Some("user:1001")),
            ("user:10011", Some("user:*")),
            ("uri:spiffe://a/b/c", Some("uri:spiffe://a/b/*")),
            ("uri:spiffe://a/c", Some("uri:spiffe://a/*")),
            ("uri:spiffe://b", None),
            ("address:2001:db8:7::/64", Some("address:2001:db8:*")),
            ("address:2001:db9::/64", None),
        ] {
            assert_eq!(patterns.get(&client.parse().unwrap()).map(String::as_str), expected, "{client}");
        }
    }

    #[test]
    fn a_pattern_that_fits_no_client_is_refused() {
        for text in ["*", "u*", "user:*", "user:10*", "uri:*", "dns:a.*", "address:10.0.*", "address:2001:db8::/64"] {
            text.parse::<Pattern>().unwrap();
        }
        for (text, rule) in [
            ("user:al*", "begins with"),
            ("user:01*", "begins with"),
            ("users*", "begins with"),
            ("address:2001:0db8*", "begins with"),
            ("address:2001:DB8*", "begins with"),
            ("dns:A*", "begins with"),
            ("uri:a b*", "begins with"),
            ("a*b", "must be user:UID"),
            ("dns:A.example", "must be written \"dns:a.example\""),
            ("address:2001:db8::1", "must be written \"address:2001:db8::/64\""),
            ("user:01", "must be written \"user:1\""),
        ] {
            let error = text.parse::<Pattern>().unwrap_err();
            assert!(error.contains(rule), "{text}: {error}");
        }
    }

    #[test]
    fn strangers_stay_out_where_tenants_are_listed() {
        let [operator, tenant, stranger] = [7, 8, 9].map(Client::User);
        let mut shares = Patterns::default();
        shares.insert(Pattern::Exact(tenant.clone()), 3);
        let clients = Clients::new([operator.clone()], Some(shares));
        for client in [&operator, &tenant, &Client::User(0)] {
            clients.admit(client).unwrap();
        }
        let refused = clients.admit(&stranger).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::PermissionDenied);
        assert!(refused.message().contains("[tenants.\"user:9\"]"), "{refused}");
        assert_eq!([&operator, &tenant].map(|client| clients.share(client)), [1, 3]);
        Clients::default().admit(&stranger).unwrap();
    }
}

//! Rules about names, such as `cache.nixos.org`, `*.crates.io:443` or `git.corp:22 tls=false`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

use crate::quantity::text_or_number;

/// Ports that a rule without one allows: HTTP's and HTTPS's.
const DEFAULT_PORTS: [u16; 2] = [80, 443];

/// Longest name and longest part of one, in bytes, as DNS has it.
const MAX_NAME_BYTES: usize = 253;
const MAX_LABEL_BYTES: usize = 63;

/// A name, or all names below one, that builds may connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    names: Names,
    port: Option<u16>,
    /// Whether connections must begin with TLS and the server's name.
    tls: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Names {
    Any,
    One(String),
    /// All names that end so; with a dot at the beginning.
    Below(String),
}

impl Names {
    fn has(&self, name: &str) -> bool {
        match self {
            Self::Any => true,
            Self::One(one) => one == name,
            Self::Below(suffix) => name.len() > suffix.len() && name.ends_with(suffix.as_str()),
        }
    }

    fn has_all(&self, others: &Self) -> bool {
        match (self, others) {
            (Self::Any, _) => true,
            (_, Self::Any) => false,
            (_, Self::One(name)) => self.has(name),
            (Self::Below(suffix), Self::Below(others)) => others.ends_with(suffix.as_str()),
            (Self::One(_), Self::Below(_)) => false,
        }
    }
}

impl Rule {
    /// Whether it is about this name, whatever the port.
    pub(super) fn has_name(&self, name: &str) -> bool {
        self.names.has(name)
    }

    /// Whether it allows this.
    pub(super) fn allows(&self, name: &str, port: u16) -> bool {
        self.has_name(name) && self.has_port(port)
    }

    fn has_port(&self, port: u16) -> bool {
        self.port.map_or(DEFAULT_PORTS.contains(&port), |own| own == port)
    }

    /// Whether rules allow all that this one allows. Each of its ports must be one of a single rule.
    pub(super) fn is_covered_by(&self, rules: &[Self]) -> bool {
        let covers =
            |rule: &Self, port: u16| rule.has_port(port) && rule.names.has_all(&self.names) && (self.tls || !rule.tls);
        let ports = self.port.as_ref().map_or(&DEFAULT_PORTS[..], std::slice::from_ref);
        ports.iter().all(|port| rules.iter().any(|rule| covers(rule, *port)))
    }

    /// Whether connections must begin with TLS, where they don't with HTTP.
    pub(super) fn wants_tls(&self) -> bool {
        self.tls
    }
}

/// Whether it is a name of DNS as hosts have them, in lower case.
pub(super) fn is_name(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=MAX_LABEL_BYTES).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte))
    };
    name.len() <= MAX_NAME_BYTES && name.split('.').all(is_label)
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let failed =
            |why: &str| format!("must be NAME, *.NAME or *, then perhaps :PORT, then perhaps \" tls=false\": {why}");
        let (rest, tls) = match text.split_once(' ') {
            Some((rest, option)) => match option.trim() {
                "tls=false" => (rest, false),
                "tls=true" => (rest, true),
                _ => return Err(failed("what follows the space is neither tls=false nor tls=true")),
            },
            None => (text, true),
        };
        let (name, port) = match rest.rsplit_once(':') {
            Some((name, port)) => {
                let port = port.parse().ok().filter(|port| *port != 0);
                (name, Some(port.ok_or_else(|| failed("the port is not a number from 1 to 65535"))?))
            }
            None => (rest, None),
        };
        let name = name.to_ascii_lowercase();
        let checked = |name: &str| match name {
            _ if !name.is_ascii() => Err(failed("a name with other letters than ASCII's begins with xn--")),
            _ if name.split('.').all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit())) => {
                Err(failed("addresses belong to allow_addresses"))
            }
            _ if is_name(name) => Ok(name.to_owned()),
            _ => Err(failed("it is no name of a host")),
        };
        let names = match name.strip_prefix('*') {
            Some("") => Names::Any,
            Some(suffix) => match suffix.strip_prefix('.') {
                Some(below) => Names::Below(format!(".{}", checked(below)?)),
                None => return Err(failed("a star stands for whole parts of a name, and a dot follows it")),
            },
            None => Names::One(checked(&name)?),
        };
        Ok(Self { names, port, tls })
    }
}

impl<'de> Deserialize<'de> for Rule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_number(deserializer, "a rule about names")
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.names {
            Names::Any => f.write_str("*")?,
            Names::One(name) => f.write_str(name)?,
            Names::Below(suffix) => write!(f, "*{suffix}")?,
        }
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        if self.tls { Ok(()) } else { f.write_str(" tls=false") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        text.parse().unwrap()
    }

    #[test]
    fn a_rule_allows_its_names_and_ports_and_no_others() {
        for (text, allowed, others) in [
            ("a.example", &[("a.example", 80), ("a.example", 443)][..], &[("a.example", 22), ("b.a.example", 443)][..]),
            ("A.Example:443", &[("a.example", 443)], &[("a.example", 80)]),
            (
                "*.example",
                &[("a.example", 443), ("b.a.example", 80)],
                &[("example", 443), ("aexample", 443), ("example.evil", 443), ("a.example.", 443)],
            ),
            ("*:8080", &[("any", 8080)], &[("any", 443)]),
            ("git.corp:22 tls=false", &[("git.corp", 22)], &[("git.corp", 443)]),
        ] {
            for (name, port) in allowed {
                assert!(rule(text).allows(name, *port), "{text}: {name}:{port}");
            }
            for (name, port) in others {
                assert!(!rule(text).allows(name, *port), "{text}: {name}:{port}");
            }
        }
        assert!(rule("a:22").wants_tls() && !rule("a:22 tls=false").wants_tls());
    }

    #[test]
    fn rules_survive_being_written() {
        for text in ["a.example", "*.example:443", "*", "git.corp:22 tls=false"] {
            assert_eq!(rule(text).to_string(), text);
        }
    }

    #[test]
    fn what_is_no_rule_is_refused_with_a_reason() {
        for (text, why) in [
            ("", "no name"),
            ("a..b", "no name"),
            ("a b", "tls="),
            ("https://a.example", "port"),
            ("a.example/path", "no name"),
            ("a:0", "port"),
            ("a:65536", "port"),
            ("a:443 tls=maybe", "tls="),
            ("*example", "star"),
            ("a.*.example", "no name"),
            ("*.", "no name"),
            ("10.0.0.5", "allow_addresses"),
            ("10.0.0.5:443", "allow_addresses"),
            ("ex\u{e4}mple", "xn--"),
            (&"a".repeat(64), "no name"),
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}

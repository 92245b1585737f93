//! What a build was denied, for the hint in its failure.

use std::fmt::Write as _;

use super::policy::Denial;
use super::record::Connection;

/// Most denials that are told apart.
const MAX_DENIALS: usize = 100;

/// Most of each kind that a hint names.
const MAX_NAMED: usize = 3;

/// Who can add a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RuleMaker {
    /// The reader, on the command line.
    CommandLine,
    /// The operator of a daemon.
    Operator,
}

/// What a build was denied: each name or address once, in the order of the first denials.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Denials {
    denied: Vec<Denied>,
    is_full: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Denied {
    /// This rule about a name would have allowed it.
    Name(String),
    /// This rule about an address would have allowed it.
    Address(String),
    /// Its server was to be named first, and a rule that does without would have allowed it.
    Unnamed { rule: String, text: String },
    /// No rule alone would have allowed it.
    Other(String),
}

impl Denied {
    fn of(connection: &Connection) -> Option<Self> {
        let why = connection.verdict.denied()?;
        Some(match (&connection.name, connection.address) {
            (Some(name), Some(address)) if why == Denial::NoServerName.to_string() => {
                let rule = format!("{name}:{} tls=false", address.port());
                Self::Unnamed { rule, text: format!("{} ({why})", connection.server()) }
            }
            _ if !connection.lacks_rule => Self::Other(format!("{} ({why})", connection.server())),
            (Some(name), None) => Self::Name(name.clone()),
            (Some(name), Some(address)) => Self::Name(format!("{name}:{}", address.port())),
            (None, Some(address)) => {
                let (ip, port) = (address.ip(), address.port());
                Self::Address(if ip.is_ipv4() { format!("{ip}/32:{port}") } else { format!("[{ip}]/128:{port}") })
            }
            (None, None) => return None,
        })
    }

    fn text(&self) -> &str {
        match self {
            Self::Name(text) | Self::Address(text) | Self::Unnamed { text, .. } | Self::Other(text) => text,
        }
    }

    /// The rule that would have allowed it.
    fn rule(&self) -> Option<&str> {
        match self {
            Self::Name(rule) | Self::Address(rule) | Self::Unnamed { rule, .. } => Some(rule),
            Self::Other(_) => None,
        }
    }
}

impl Denials {
    /// Notes a connection if it was denied.
    pub(crate) fn add(&mut self, connection: &Connection) {
        if let Some(denied) = Denied::of(connection).filter(|denied| !self.denied.contains(denied)) {
            self.is_full = self.denied.len() >= MAX_DENIALS;
            if !self.is_full {
                self.denied.push(denied);
            }
        }
    }

    /// The rules that were missing, as `allow` and `allow_addresses` have them.
    pub(crate) fn missing_rules(&self) -> Vec<&str> {
        self.denied.iter().filter_map(Denied::rule).collect()
    }

    /// What the build was denied, and what to do about it.
    pub(crate) fn hint(&self, maker: RuleMaker) -> Option<String> {
        let (others, unlisted): (Vec<_>, Vec<_>) =
            self.denied.iter().partition(|denied| matches!(denied, Denied::Unnamed { .. } | Denied::Other(_)));
        let mut hint = String::new();
        if !unlisted.is_empty() {
            let (list, advice) = (self.list(&unlisted), advice(&unlisted[..unlisted.len().min(MAX_NAMED)], maker));
            let _ = write!(hint, "the build wanted {list}, which no rule allows; {advice}");
        }
        if !others.is_empty() {
            let beginning = if hint.is_empty() { "the build" } else { "; it" };
            let _ = write!(hint, "{beginning} was denied {}", self.list(&others));
            let unnamed: Vec<_> = others.into_iter().filter(|denied| denied.rule().is_some()).take(MAX_NAMED).collect();
            if !unnamed.is_empty() {
                let _ = write!(hint, "; if its protocol names no server, {}", advice(&unnamed, maker));
            }
        }
        Some(hint).filter(|hint| !hint.is_empty())
    }

    fn list(&self, denied: &[&Denied]) -> String {
        let mut list = denied.iter().take(MAX_NAMED).map(|one| one.text()).collect::<Vec<_>>().join(", ");
        if let Some(more @ 1..) = denied.len().checked_sub(MAX_NAMED) {
            let _ = write!(list, " and {}{more} more", if self.is_full { "at least " } else { "" });
        }
        list
    }
}

/// How to get these rules.
fn advice(unlisted: &[&Denied], maker: RuleMaker) -> String {
    if maker == RuleMaker::CommandLine {
        let flags = unlisted.iter().filter_map(|denied| {
            let rule = denied.rule()?;
            Some(match denied {
                Denied::Address(_) => format!("--allow-address {rule}"),
                _ if rule.contains(' ') => format!("--allow-host '{rule}'"),
                _ => format!("--allow-host {rule}"),
            })
        });
        return format!("try {}", flags.collect::<Vec<_>>().join(" "));
    }
    let (addresses, names): (Vec<&Denied>, Vec<_>) =
        unlisted.iter().copied().partition(|denied| matches!(denied, Denied::Address(_)));
    let settings = [("allow", names), ("allow_addresses", addresses)];
    let settings = settings.into_iter().filter(|(_, rules)| !rules.is_empty()).map(|(setting, rules)| {
        let rules =
            rules.iter().filter_map(|denied| Some(format!("{:?}", denied.rule()?))).collect::<Vec<_>>().join(", ");
        format!("{rules} to [network] {setting}")
    });
    format!("ask the daemon's operator to add {}", settings.collect::<Vec<_>>().join(" and "))
}

#[cfg(test)]
mod tests {
    use super::super::{AddressRule, Rule, record::Verdict};
    use super::*;

    fn connection(name: &str, address: &str, lacks_rule: bool) -> Connection {
        let name = Some(name.to_owned()).filter(|name| !name.is_empty());
        let verdict = Verdict::Denied("the address is private".to_owned());
        Connection { name, address: address.parse().ok(), verdict, lacks_rule, ..Connection::default() }
    }

    fn denials(connections: &[Connection]) -> Denials {
        let mut denials = Denials::default();
        connections.iter().for_each(|connection| denials.add(connection));
        denials
    }

    #[test]
    fn a_hint_has_rules_that_its_reader_can_use() {
        let denials = denials(&[
            connection("evil.example", "", true),
            connection("evil.example", "", true),
            connection("good.example", "93.184.215.14:22", true),
            connection("", "[2606:2800:21f::14]:443", true),
            connection("", "10.0.0.5:80", false),
            Connection { name: Some("fine.example".to_owned()), ..Connection::default() },
        ]);
        assert_eq!(
            denials.hint(RuleMaker::CommandLine).unwrap(),
            "the build wanted evil.example, good.example:22, [2606:2800:21f::14]/128:443, which no rule allows; try \
             --allow-host evil.example --allow-host good.example:22 --allow-address [2606:2800:21f::14]/128:443; it was \
             denied 10.0.0.5:80 (the address is private)"
        );
        assert_eq!(
            denials.hint(RuleMaker::Operator).unwrap(),
            "the build wanted evil.example, good.example:22, [2606:2800:21f::14]/128:443, which no rule allows; ask the \
             daemon's operator to add \"evil.example\", \"good.example:22\" to [network] allow and \
             \"[2606:2800:21f::14]/128:443\" to [network] allow_addresses; it was denied 10.0.0.5:80 (the address is private)"
        );
        let [names @ .., address] = &denials.missing_rules()[..] else { panic!("{denials:?}") };
        assert!(names.iter().all(|rule| rule.parse::<Rule>().is_ok()) && address.parse::<AddressRule>().is_ok());
        assert_eq!(Denials::default().hint(RuleMaker::Operator), None);
    }

    #[test]
    fn a_hint_about_a_server_that_was_not_named_has_the_rule_that_does_without() {
        let mut unnamed = connection("git.example", "93.184.215.14:22", false);
        unnamed.deny(Denial::NoServerName);
        let mut other = connection("git.example", "93.184.215.14:443", false);
        other.deny(Denial::OtherServer);
        let denials = denials(&[unnamed, other]);
        let denied = "the build was denied git.example:22 at 93.184.215.14 (it began with no server's name), git.example:443 at \
             93.184.215.14 (it asked for a server that was not found at this address, or that no rule has); if its protocol \
             names no server, ";
        assert_eq!(
            denials.hint(RuleMaker::CommandLine).unwrap(),
            format!("{denied}try --allow-host 'git.example:22 tls=false'")
        );
        assert_eq!(
            denials.hint(RuleMaker::Operator).unwrap(),
            format!("{denied}ask the daemon's operator to add \"git.example:22 tls=false\" to [network] allow")
        );
        let [rule] = denials.missing_rules()[..] else { panic!("{denials:?}") };
        assert!(!rule.parse::<Rule>().unwrap().wants_tls());
    }

    #[test]
    fn a_hint_is_short_however_much_was_denied() {
        let name = |at: usize| connection(&format!("{}{at:03}", "a".repeat(250)), "", true);
        let few = denials(&(0..5).map(name).collect::<Vec<_>>()).hint(RuleMaker::Operator).unwrap();
        assert!(few.contains(" and 2 more, which no rule allows"), "{few}");
        let many = denials(&(0..1000).map(name).collect::<Vec<_>>());
        let hint = many.hint(RuleMaker::Operator).unwrap();
        assert!(hint.contains(" and at least 97 more"), "{hint}");
        assert!(hint.len() < 2048 && many.denied.len() == MAX_DENIALS);
    }
}

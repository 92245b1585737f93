//! Rules about addresses, such as `10.0.0.5/32:5432` or `[fd12::]/16:443`: the only way through the floor.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

use crate::quantity::text_or_number;

/// Addresses with a common prefix, such as `10.0.0.0/8` or `fd12::/16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    base: IpAddr,
    bits: u8,
}

/// Addresses with a common prefix, and a port of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressRule {
    prefix: Prefix,
    port: u16,
}

impl Prefix {
    pub(super) fn has(&self, address: IpAddr) -> bool {
        is_within(address, self.base, self.bits)
    }

    fn of(base: IpAddr, bits: &str) -> Result<Self, &'static str> {
        if base.is_ipv6() && base.to_canonical().is_ipv4() {
            return Err("an IPv4 address is written as such, as in 10.0.0.5");
        }
        let most = if base.is_ipv4() { 32 } else { 128 };
        let bits = bits.parse().ok().filter(|bits| *bits <= most);
        Ok(Self { base, bits: bits.ok_or("the prefix is longer than the address, or no number")? })
    }
}

impl AddressRule {
    /// Whether it has this address, whatever the port.
    pub(super) fn has(&self, address: IpAddr) -> bool {
        self.prefix.has(address)
    }

    /// Whether it allows this.
    pub(super) fn allows(&self, to: SocketAddr) -> bool {
        self.port == to.port() && self.has(to.ip())
    }

    /// Whether it allows all that another rule allows.
    pub(super) fn covers(&self, other: &Self) -> bool {
        self.port == other.port && self.prefix.bits <= other.prefix.bits && self.has(other.prefix.base)
    }
}

/// Whether an address begins with as many bits of another.
pub(super) fn is_within(address: IpAddr, base: IpAddr, prefix: u8) -> bool {
    match (address, base) {
        (IpAddr::V4(address), IpAddr::V4(base)) => {
            let differing = address.to_bits() ^ base.to_bits();
            differing.leading_zeros() >= prefix.into()
        }
        (IpAddr::V6(address), IpAddr::V6(base)) => {
            let differing = address.to_bits() ^ base.to_bits();
            differing.leading_zeros() >= prefix.into()
        }
        _ => false,
    }
}

impl FromStr for AddressRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let failed = |why: &str| format!("must be ADDRESS/PREFIX:PORT, or [ADDRESS]/PREFIX:PORT for IPv6: {why}");
        let (rest, port) = text.rsplit_once(':').ok_or_else(|| failed("there is no port"))?;
        let port = port.parse().ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| failed("the port is not a number from 1 to 65535"))?;
        let (base, bits) = rest.split_once('/').ok_or_else(|| failed("there is no prefix"))?;
        let bracketed = base.strip_prefix('[').and_then(|base| base.strip_suffix(']'));
        let base = match bracketed {
            Some(base) => base.parse().map(IpAddr::V6),
            None => base.parse().map(IpAddr::V4),
        };
        let base = base.map_err(|_| failed("there is no address before the slash"))?;
        Ok(Self { prefix: Prefix::of(base, bits).map_err(failed)?, port })
    }
}

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let failed = |why: &str| format!("must be ADDRESS/PREFIX: {why}");
        let (base, bits) = text.split_once('/').ok_or_else(|| failed("there is no prefix"))?;
        let base = base.parse().map_err(|_| failed("there is no address before the slash"))?;
        Self::of(base, bits).map_err(failed)
    }
}

impl<'de> Deserialize<'de> for Prefix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_number(deserializer, "a range of addresses")
    }
}

impl<'de> Deserialize<'de> for AddressRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_number(deserializer, "a rule about addresses")
    }
}

impl fmt::Display for AddressRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { prefix: Prefix { base, bits }, port } = self;
        if base.is_ipv4() { write!(f, "{base}/{bits}:{port}") } else { write!(f, "[{base}]/{bits}:{port}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_allows_its_addresses_at_its_port() {
        for (text, allowed, others) in [
            ("10.0.0.5/32:5432", &["10.0.0.5:5432"][..], &["10.0.0.4:5432", "10.0.0.5:5433"][..]),
            ("10.1.0.0/16:443", &["10.1.0.0:443", "10.1.255.255:443"], &["10.2.0.0:443", "[::a01:0]:443"]),
            ("0.0.0.0/0:80", &["8.8.8.8:80"], &["[2001:4860::1]:80"]),
            ("[fd12::]/16:443", &["[fd12:1::1]:443"], &["[fd13::]:443"]),
        ] {
            let rule: AddressRule = text.parse().unwrap();
            assert_eq!(rule.to_string(), text);
            for address in allowed {
                assert!(rule.allows(address.parse().unwrap()), "{text}: {address}");
            }
            for address in others {
                assert!(!rule.allows(address.parse().unwrap()), "{text}: {address}");
            }
        }
    }

    #[test]
    fn what_is_no_rule_is_refused_with_a_reason() {
        for (text, why) in [
            ("10.0.0.5:443", "no prefix"),
            ("10.0.0.5/32", "no port"),
            ("10.0.0.5/33:443", "prefix is longer"),
            ("10.0.0/24:443", "no address"),
            ("fd12::/16:443", "no address"),
            ("a.example/32:443", "no address"),
            ("10.0.0.5/32:0", "port is not"),
            ("[::ffff:10.0.0.5]/128:443", "written as such"),
            ("[::ffff:0:0]/96:443", "written as such"),
        ] {
            let error = text.parse::<AddressRule>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
        for (text, why) in [
            ("10.0.0.5", "no prefix"),
            ("10.0.0.5/33", "prefix is longer"),
            ("fd12::/129", "prefix is longer"),
            ("[fd12::]/16", "no address"),
            ("a.example/32", "no address"),
            ("::ffff:10.0.0.5/128", "written as such"),
        ] {
            let error = text.parse::<Prefix>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}

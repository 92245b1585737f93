//! The types of settings. Each checks its value as it is read.

use std::{fmt, net::SocketAddr, path::Path, str::FromStr};

use cofferdam_castore::PathComponent;
use cofferdam_rpc::{Client, Pattern};
use nix::sys::socket::UnixAddr;
use serde::{Deserialize, Deserializer, de};
use tonic::transport::Uri;

use crate::{
    frontend::{NamedKey, TokenDigest},
    machine::hardening,
    network::Limits,
    quantity::{size, size_within, text_or_number},
    request::AbsolutePath,
};

/// A path in builds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::daemon) struct GuestPath(pub(in crate::daemon) AbsolutePath);

impl TryFrom<String> for GuestPath {
    type Error = String;

    fn try_from(path: String) -> Result<Self, String> {
        let wrong = |rule| format!("the path {path:?} {rule}");
        if ["/dev", "/proc"].iter().any(|taken| Path::new(&path).starts_with(taken)) {
            return Err(wrong("is in /dev or /proc, which the guest has itself; `nested = true` is for /dev/kvm"));
        }
        AbsolutePath::new(&path).map(Self).map_err(wrong)
    }
}

/// HOST:PORT, or the path of a Unix socket.
#[derive(Debug, Clone)]
pub(crate) struct ListenAddr(pub(in crate::daemon) String);

impl FromStr for ListenAddr {
    type Err = String;

    fn from_str(addr: &str) -> Result<Self, String> {
        let is_host_port =
            |(host, port): (&str, &str)| !host.is_empty() && !host.contains([':', '/']) && port.parse::<u16>().is_ok();
        let is_tcp = || addr.parse::<SocketAddr>().is_ok() || addr.rsplit_once(':').is_some_and(is_host_port);
        if if addr.starts_with('/') { UnixAddr::new(Path::new(&addr)).is_ok() } else { is_tcp() } {
            return Ok(Self(addr.to_owned()));
        }
        Err("write HOST:PORT, or the path of a Unix socket, which begins with a slash and has at most 107 bytes"
            .to_owned())
    }
}

impl<'de> Deserialize<'de> for ListenAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_number(deserializer, "an address to listen on")
    }
}

/// The address of an OpenTelemetry collector.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::daemon) struct Endpoint(pub(in crate::daemon) String);

impl TryFrom<String> for Endpoint {
    type Error = String;

    fn try_from(endpoint: String) -> Result<Self, String> {
        match endpoint.parse::<Uri>() {
            Ok(uri) if uri.scheme_str() == Some("http") => Ok(Self(endpoint)),
            _ => Err(format!(
                "{endpoint:?} is not the address of a collector: write http://HOST:PORT; TLS isn't supported"
            )),
        }
    }
}

/// A user of this host: a name or a number.
#[derive(Debug, Clone)]
pub(in crate::daemon) struct UserName(pub(in crate::daemon) String);

impl FromStr for UserName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Ok(Self(name.to_owned()))
    }
}

impl<'de> Deserialize<'de> for UserName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_number(deserializer, "a user's name or number")
    }
}

/// Whether builds may connect by IPv6: `"auto"` or `false`.
#[derive(Debug, Clone, Copy)]
pub(in crate::daemon) struct Ipv6(pub(in crate::daemon) bool);

impl Default for Ipv6 {
    fn default() -> Self {
        Self(true)
    }
}

impl<'de> Deserialize<'de> for Ipv6 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Ipv6;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"auto\" or false")
            }

            fn visit_bool<E: de::Error>(self, is_on: bool) -> Result<Ipv6, E> {
                if is_on { Err(E::invalid_value(de::Unexpected::Bool(is_on), &self)) } else { Ok(Ipv6(false)) }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Ipv6, E> {
                if text == "auto" { Ok(Ipv6(true)) } else { Err(E::invalid_value(de::Unexpected::Str(text), &self)) }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A client, as records name it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::daemon) struct ClientName(pub(in crate::daemon) Client);

impl TryFrom<String> for ClientName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let client: Client = name.parse().map_err(|rule| format!("{name:?} is not a client: {rule}"))?;
        // So that no client has two tables.
        let written = client.to_string();
        if written == name { Ok(Self(client)) } else { Err(format!("{name:?} must be written {written:?}")) }
    }
}

/// Clients, as records name them; a user may have a name instead of a number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::daemon) struct TenantName(pub(in crate::daemon) String);

impl TenantName {
    /// The user, if it is one with a name.
    pub(in crate::daemon) fn user(&self) -> Option<&str> {
        let is_name = |user: &&str| !user.ends_with('*') && !user.starts_with(|first: char| first.is_ascii_digit());
        self.0.strip_prefix("user:").filter(is_name)
    }

    /// The clients, if they don't depend on the users of this host.
    pub(in crate::daemon) fn pattern(&self) -> Result<Pattern, String> {
        self.0.parse()
    }
}

impl TryFrom<String> for TenantName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let name = Self(name);
        if name.user().is_none()
            && let Err(rule) = name.pattern()
        {
            return Err(format!("{:?} fits no client: {rule}", name.0));
        }
        Ok(name)
    }
}

/// The holder of a certificate, as records name it.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::daemon) struct CertificateName(pub(in crate::daemon) Client);

impl TryFrom<String> for CertificateName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        match ClientName::try_from(name) {
            Ok(ClientName(client @ Client::Certificate(_))) => Ok(Self(client)),
            Ok(ClientName(other)) => {
                Err(format!("\"{other}\" names no certificate: write uri:NAME, dns:NAME or email:NAME"))
            }
            Err(error) => Err(error),
        }
    }
}

/// A public key as Nix writes it.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::daemon) struct NixKey(pub(in crate::daemon) NamedKey);

impl TryFrom<String> for NixKey {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map(Self)
    }
}

/// The digest of a token.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::daemon) struct NixToken(pub(in crate::daemon) TokenDigest);

impl TryFrom<String> for NixToken {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map(Self)
    }
}

/// What tenants see of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::daemon) enum Isolation {
    /// All of it.
    None,
    /// What they put, what their builds made, and what is shared.
    Tenants,
}

/// `roots/NAME`: a root of the store.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::daemon) struct SharedRoot(pub(in crate::daemon) PathComponent);

impl TryFrom<String> for SharedRoot {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let name = text.strip_prefix("roots/").and_then(|name| PathComponent::try_from(name).ok());
        name.map(Self)
            .ok_or_else(|| format!("{text:?} names no root: write roots/NAME, with a name as in `store root list`"))
    }
}

/// A file's permissions.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "u32")]
pub(in crate::daemon) struct SocketMode(pub(in crate::daemon) u32);

impl Default for SocketMode {
    fn default() -> Self {
        Self(0o600)
    }
}

impl TryFrom<u32> for SocketMode {
    type Error = String;

    fn try_from(mode: u32) -> Result<Self, String> {
        let wrong = || format!("0o{mode:o} is not a mode for a socket: write 0o600, 0o660 or 0o666");
        if mode & !0o666 == 0 && mode & 0o600 == 0o600 { Ok(Self(mode)) } else { Err(wrong()) }
    }
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::daemon) enum VmmName {
    CloudHypervisor,
    Qemu,
}

/// A cgroup's part of what it shares with others.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "u32")]
pub(in crate::daemon) struct Weight(pub(in crate::daemon) u32);

impl TryFrom<u32> for Weight {
    type Error = String;

    fn try_from(weight: u32) -> Result<Self, String> {
        let is_one = (1..=10_000).contains(&weight);
        if is_one { Ok(Self(weight)) } else { Err(format!("{weight} is not a weight: write 1 to 10000")) }
    }
}

/// A part of the time of a machine's CPUs, in percent. The kernel refuses quotas that are far too long.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "u32")]
pub(in crate::daemon) struct Percent(pub(in crate::daemon) u32);

impl TryFrom<u32> for Percent {
    type Error = String;

    fn try_from(percent: u32) -> Result<Self, String> {
        let is_one = (1..=10_000).contains(&percent);
        if is_one { Ok(Self(percent)) } else { Err(format!("{percent} is not a percentage: write 1 to 10000")) }
    }
}

/// Processes and threads of a machine. Its helpers need some dozens, and the kernel's `pids.max` ends at 4,194,304.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "u32")]
pub(in crate::daemon) struct Processes(pub(in crate::daemon) u32);

impl TryFrom<u32> for Processes {
    type Error = String;

    fn try_from(processes: u32) -> Result<Self, String> {
        let fits = (64..=4_194_304).contains(&processes);
        if fits { Ok(Self(processes)) } else { Err(format!("{processes} doesn't fit: write 64 to 4194304")) }
    }
}

/// Standby machines at a time; 0 for none.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "u32")]
pub(in crate::daemon) struct Machines(pub(in crate::daemon) u32);

impl TryFrom<u32> for Machines {
    type Error = String;

    fn try_from(machines: u32) -> Result<Self, String> {
        if machines <= 1000 { Ok(Self(machines)) } else { Err(format!("{machines} doesn't fit: write 0 to 1000")) }
    }
}

/// A weakness of the host, by its name.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::daemon) struct WeaknessName(pub(in crate::daemon) String);

impl TryFrom<String> for WeaknessName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        match hardening::NAMES.contains(&name.as_str()) {
            true => Ok(Self(name)),
            false => Err(format!("{name:?} is no weakness of a host: write one of {}", hardening::NAMES.join(", "))),
        }
    }
}

/// Bytes in a second. Written as 0: no limit.
#[derive(Debug, Clone, Copy)]
pub(in crate::daemon) struct Rate(pub(in crate::daemon) u64);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "0" {
            return Ok(Self(Limits::UNLIMITED_RATE));
        }
        size_within(text, Limits::LEAST_RATE, u64::MAX).map(Self)
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_number(deserializer, "a size for a second, such as \"10M\", or 0 for no limit")
    }
}

/// Free space of a disk in bytes; 0 for any.
#[derive(Debug, Clone, Copy)]
pub(in crate::daemon) struct FreeSpace(pub(in crate::daemon) u64);

impl FromStr for FreeSpace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "0" { Ok(Self(0)) } else { size(text).map(Self) }
    }
}

impl<'de> Deserialize<'de> for FreeSpace {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_number(deserializer, "a size, such as \"10G\", or 0 for no watermark")
    }
}

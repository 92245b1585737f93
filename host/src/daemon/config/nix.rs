//! The table `[nix]`: what holds for clients of plain Nix.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use serde::Deserialize;

use super::values::{ClientName, NixKey, NixToken, UserName};
use crate::{
    frontend::{Access, Compression},
    quantity::Time,
};

/// How long a client of Nix that waits for a build hears nothing at most. NATs and load balancers forget a silent connection after
/// four minutes and more.
const NIX_KEEP_ALIVE: Duration = Duration::from_secs(2 * 60);

/// What holds for clients of plain Nix.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in crate::daemon) struct NixConfig {
    /// Users who may speak for clients: `cofferdam nix-daemon --client NAME`.
    pub(in crate::daemon) speakers: Vec<UserName>,
    /// Whether builds whose client has gone are finished.
    pub(in crate::daemon) finish_abandoned: bool,
    /// How long a client that waits for a build hears nothing at most.
    pub(in crate::daemon) keep_alive: Option<Time>,
    /// Variables that derivations with fixed outputs get if they ask for them.
    pub(in crate::daemon) impure_env: BTreeMap<String, String>,
    /// Keys whose signatures of paths are believed, beside the daemon's own.
    pub(in crate::daemon) trusted_keys: Vec<NixKey>,
    /// Whether unsigned paths are refused that aren't addressed by their contents.
    pub(in crate::daemon) require_signatures: bool,
    /// Serves paths over HTTP.
    pub(in crate::daemon) cache: Option<NixCacheConfig>,
}

impl NixConfig {
    pub(in crate::daemon) fn keep_alive(&self) -> Duration {
        self.keep_alive.map_or(NIX_KEEP_ALIVE, |Time(time)| time)
    }
}

/// A binary cache.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::daemon) struct NixCacheConfig {
    pub(in crate::daemon) listen: SocketAddr,
    /// Whose paths everybody sees.
    pub(in crate::daemon) public: Option<ClientName>,
    /// The SHA-256 of each client's token.
    #[serde(default)]
    pub(in crate::daemon) tokens: BTreeMap<ClientName, NixToken>,
    #[serde(default)]
    pub(in crate::daemon) compression: Compression,
}

impl NixCacheConfig {
    pub(in crate::daemon) fn access(&self) -> Access {
        let client = |ClientName(client): &ClientName| client.clone();
        let tokens = self.tokens.iter().map(|(name, NixToken(token))| (client(name), *token)).collect();
        Access { public: self.public.as_ref().map(client), tokens }
    }
}

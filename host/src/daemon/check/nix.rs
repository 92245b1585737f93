//! What holds for clients of Nix.

use std::{collections::BTreeMap, time::Duration};

use super::{Checks, Key};
use crate::{
    daemon::config::{ClientName, NixToken},
    quantity::Time,
    tenants::Tenants,
};

/// The shortest time after which a client hears that a build goes on.
const MIN_KEEP_ALIVE: Duration = Duration::from_secs(1);

impl Checks<'_> {
    pub(super) fn nix(&mut self) {
        if self.config.nix.keep_alive.is_some_and(|Time(time)| time < MIN_KEEP_ALIVE) {
            self.wrong("nix.keep_alive", format!("must be at least {} second", MIN_KEEP_ALIVE.as_secs()));
        }
        for (name, value) in &self.config.nix.impure_env {
            let key = || Key::from("nix.impure_env").child(name);
            if name.is_empty() || name.contains(['=', '\0']) {
                self.wrong(key(), "must have a name without = and NUL");
            }
            if value.contains('\0') {
                self.wrong(key(), "must have a value without NUL");
            }
        }
    }

    pub(super) fn nix_cache(&mut self, tenants: &Tenants) {
        let Some(cache) = &self.config.nix.cache else { return };
        if !cache.listen.ip().to_canonical().is_loopback() {
            self.wrong("nix.cache.listen", "must be a loopback address: paths and tokens aren't encrypted")
                .advise("listen on 127.0.0.1, and let a web server with TLS forward requests to it");
        }
        if cache.public.is_none() && cache.tokens.is_empty() {
            self.wrong("nix.cache", "needs public or tokens: nobody could read anything");
        }
        let mut holders = BTreeMap::new();
        for (ClientName(client), NixToken(token)) in &cache.tokens {
            let key = || Key::from("nix.cache.tokens").child(&client.to_string());
            if self.config.is_read("tenants") && tenants.clients().admit(client).is_err() {
                self.wrong(key(), format!("is no tenant: to admit it, write [tenants.\"{client}\"]"));
            }
            if let Some(other) = holders.insert(*token, client) {
                self.wrong(key(), format!("must have another token than {other}"));
            }
        }
    }
}

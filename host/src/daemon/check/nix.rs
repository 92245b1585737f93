//! The binary cache of Nix.

use std::collections::BTreeMap;

use super::{Checks, Key};
use crate::{
    daemon::config::{ClientName, NixToken},
    tenants::Tenants,
};

impl Checks<'_> {
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

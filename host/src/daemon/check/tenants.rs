//! Operators, tenants, and who may speak for some.

use std::collections::BTreeSet;

use cofferdam_rpc::{Client, Pattern, Patterns};
use nix::unistd::User;

use super::{Checks, Key};
use crate::{
    daemon::config::{CertificateName, Isolation, UserName},
    limits::Limits,
    quantity::{Size, show_size},
    tenants::Tenants,
};

impl Checks<'_> {
    pub(super) fn tenants(&mut self) -> Tenants {
        let operators = self.operators();
        let Some(configured) = &self.config.tenants else { return Tenants::new(None, operators) };
        let mut listed = Patterns::default();
        for (name, tenant) in configured {
            let key = || Key::from("tenants").child(&name.0);
            let pattern = match name.user() {
                Some(user) => self.user(key(), user).map(|uid| Pattern::Exact(Client::User(uid))),
                // What is no pattern wasn't read.
                None => name.pattern().ok(),
            };
            if tenant.stored.is_some() && self.config.store.isolation == Some(Isolation::None) {
                self.wrong(
                    key().child("stored"),
                    "has no effect with store.isolation = \"none\": leave it out, or set \"tenants\"",
                );
            }
            let least = Limits::LEAST.disk_bytes();
            if tenant.disk.is_some_and(|Size(disk)| disk < least) {
                let rule = format!("must be at least {}: no build has a smaller scratch disk", show_size(least));
                self.wrong(key().child("disk"), rule);
            }
            let Some(pattern) = pattern else { continue };
            if listed.insert(pattern, tenant.tenant()).is_some() {
                self.wrong(key(), "this user has another table, by name or number; keep one of them");
            }
        }
        Tenants::new(Some(listed), operators)
    }

    fn operators(&mut self) -> Vec<Client> {
        let configured = &self.config.operators;
        let mut found: Vec<_> = configured.certificates.iter().map(|CertificateName(client)| client.clone()).collect();
        found.extend(self.users("operators.users", &configured.users));
        found
    }

    /// Who may speak for other clients of Nix.
    pub(super) fn speakers(&mut self) -> BTreeSet<Client> {
        self.users("nix.speakers", &self.config.nix.speakers).into_iter().collect()
    }

    fn users(&mut self, key: &'static str, configured: &[UserName]) -> Vec<Client> {
        let mut found = Vec::new();
        for (index, UserName(name)) in configured.iter().enumerate() {
            // The number of a user needs no entry among the users' names.
            let uid = name.parse().ok().or_else(|| self.user(Key::from(key).element(index), name));
            found.extend(uid.map(Client::User));
        }
        found
    }

    fn user(&mut self, key: Key, name: &str) -> Option<u32> {
        match User::from_name(name) {
            Ok(Some(user)) => return Some(user.uid.as_raw()),
            Ok(None) => drop(self.wrong(key, "this host has no user of that name")),
            Err(error) => drop(self.lacking(key, format!("can't look up the user: {error}"))),
        }
        None
    }
}

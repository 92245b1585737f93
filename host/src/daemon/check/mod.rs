//! Finds all problems of a configuration on this host without opening the store or starting a machine.

mod machine;
mod network;
mod nix;
mod tenants;
#[cfg(test)]
mod tests;
mod tls;

use std::{collections::BTreeSet, net::ToSocketAddrs as _, time::Duration};

use cofferdam_castore::{blobservice, directoryservice, is_addr};
use cofferdam_images::Image;
use cofferdam_rpc::{Client, Tls, forbid_anonymous_tcp};

use super::{
    collector::Collection,
    config::{Config, GuestPath, Key, ListenAddr},
    problem::{Problem, chain},
    sockets::ANONYMOUS_ADVICE,
};
use crate::{
    build::{Footprint, Options, machine_bytes},
    devices::paths::Shown,
    limits::Limits,
    machine::vmm,
    network::Policies,
    provenance::SigningKey,
    quantity::show_size,
    request::Host,
    scheduler::StockBounds,
    tenants::Tenants,
};
pub(crate) use machine::NO_CGROUPS_ADVICE;

/// In less, the next machine would have to boot before a build could take the last one.
const MIN_STANDBY_AGE: Duration = Duration::from_secs(60);

/// What the checks have found for the daemon to use.
pub(super) struct Checked {
    pub(super) options: Options,
    pub(super) image: Image,
    pub(super) vmm: vmm::Choice,
    pub(super) tls: Option<Tls>,
    pub(super) tenants: Tenants,
    /// Clients that may speak for others.
    pub(super) speakers: BTreeSet<Client>,
    pub(super) network: Option<Policies>,
    /// The configured key of signed statements.
    pub(super) signing_key: Option<SigningKey>,
}

/// Looks for all problems at once.
pub(super) fn check(config: &Config) -> Result<Checked, Vec<Problem>> {
    let mut checks = Checks { config, problems: config.unread().cloned().collect() };
    let vmm = checks.vmm();
    let footprint = vmm.as_ref().map_or_else(Footprint::smallest, Footprint::of);
    let options = config.options(footprint);
    checks.limits(&options.limits, footprint);
    checks.standby(&options.limits, footprint);
    checks.host_paths();
    checks.listen();
    checks.web();
    checks.store();
    checks.disk();
    checks.collection();
    checks.walls();
    checks.cgroups();
    let network = checks.network();
    let (tenants, speakers) = (checks.tenants(), checks.speakers());
    checks.nix();
    checks.nix_cache(&tenants);
    let signing_key = checks.signing_key();
    let (image, tls) = (checks.image(), checks.tls());
    match (image, vmm, tls) {
        (Some(image), Some(vmm), Some(tls)) if checks.problems.is_empty() => {
            Ok(Checked { options, image, vmm, tls, tenants, speakers, network, signing_key })
        }
        _ => Err(checks.problems),
    }
}

struct Checks<'a> {
    config: &'a Config,
    problems: Vec<Problem>,
}

impl Checks<'_> {
    /// A setting breaks a rule.
    fn wrong(&mut self, key: impl Into<Key>, rule: impl AsRef<str>) -> &mut Problem {
        self.add(Problem::wrong(&self.config.place(&key.into()), rule.as_ref()))
    }

    /// This host lacks something. `key` is the setting that could change that.
    fn lacking(&mut self, key: impl Into<Key>, what: impl AsRef<str>) -> &mut Problem {
        self.add(Problem::lacking(&self.config.place(&key.into()), what.as_ref()))
    }

    fn add(&mut self, problem: Problem) -> &mut Problem {
        self.problems.push_mut(problem)
    }

    /// A stock of machines must have room for the one that a request without demands takes.
    fn standby(&mut self, limits: &Limits, footprint: Footprint) {
        let (StockBounds { machines, memory_bytes, age }, budget) = (self.config.standby(), self.config.budget());
        if machines == 0 || !self.config.is_read("standby") || !self.config.is_read("budget") {
            return;
        }
        let one = footprint.bytes(limits);
        if !(one..=budget.memory_bytes).contains(&memory_bytes) {
            let (least, most) = (show_size(one), show_size(budget.memory_bytes));
            self.wrong(
                "standby.memory",
                format!("must be from {least}, which one machine takes, to budget.memory, {most}"),
            );
        }
        if age < MIN_STANDBY_AGE {
            self.wrong("standby.age", format!("must be at least {} seconds", MIN_STANDBY_AGE.as_secs()));
        }
    }

    fn limits(&mut self, limits: &Limits, footprint: Footprint) {
        let (config, host) = (self.config, Host::this());
        let mut budget = config.budget();
        let (least, most) = (footprint.bytes(&Limits { cpus: 1, ..Limits::LEAST }), host.memory_bytes);
        if !(least..=most).contains(&budget.memory_bytes) {
            self.wrong("budget.memory", format!("must be from {} to {}", show_size(least), show_size(most)));
        }
        if !config.is_read("budget") {
            (budget.memory_bytes, budget.cpus) = (host.memory_bytes, vmm::MAX_CPUS);
        }
        let memory_bytes = budget.memory_bytes.min(host.memory_bytes).max(least);
        let inputs_memory_bytes = memory_bytes - least + Limits::LEAST.inputs_memory_bytes;
        let cpus = budget.cpus.min(vmm::MAX_CPUS);
        let others = Limits {
            cpus: limits.cpus.min(cpus),
            inputs_memory_bytes: limits.inputs_memory_bytes.min(inputs_memory_bytes),
            ..*limits
        };
        let memory_bytes = footprint.largest_memory(&others, memory_bytes).max(vmm::MIN_MEMORY_BYTES);
        let most = Limits { memory_bytes, inputs_memory_bytes, cpus, ..Limits::MOST };
        for (name, rule) in limits.broken_rules(&most) {
            let problem = self.wrong(Key::from("build").child(name), rule);
            if name == "memory" {
                problem.advise("leave room in budget.memory for the machine's processes and for build.inputs_memory");
            }
        }
        if config.hugepages {
            self.huge_pages(machine_bytes(limits.memory_bytes));
        }
    }

    fn signing_key(&mut self) -> Option<SigningKey> {
        let path = self.config.provenance.key.as_ref()?;
        match SigningKey::read(path) {
            Ok(key) => Some(key),
            Err(error) => {
                self.wrong("provenance.key", format!("can't be used: {}", chain(&error)));
                None
            }
        }
    }

    fn host_paths(&mut self) {
        for (GuestPath(seen), path) in &self.config.host_paths {
            if let Err(error) = Shown::open(path) {
                let key = Key::from("host_paths").child(seen.as_str());
                self.wrong(key, format!("can't be read on this host: {error}"));
            }
        }
    }

    fn listen(&mut self) {
        let Config { listen, tls, allow_anonymous_tcp, .. } = self.config;
        let has_client_ca = tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
        let may_be_anonymous = *allow_anonymous_tcp || has_client_ca || !self.config.is_read("tls");
        for (index, ListenAddr(addr)) in listen.iter().enumerate() {
            if addr.starts_with('/') {
                continue;
            }
            let key = Key::from("listen").element(index);
            let anonymous = |addr| forbid_anonymous_tcp(addr, None).err();
            let resolved = addr.to_socket_addrs().map(|mut addrs| addrs.find_map(anonymous));
            match resolved {
                Err(error) => drop(self.lacking(key, format!("can't be resolved: {error}"))),
                Ok(Some(error)) if !may_be_anonymous => self.wrong(key, error.to_string()).advise(ANONYMOUS_ADVICE),
                Ok(_) => {}
            }
        }
    }

    /// Tokens must not cross a network in clear.
    fn web(&mut self) {
        let Some(web) = &self.config.web else { return };
        let is_encrypted = self.config.tls.is_some() || !self.config.is_read("tls");
        if !is_encrypted && forbid_anonymous_tcp(web.listen, None).is_err() {
            let problem = self.wrong("web.listen", "must be a loopback address where there is no table [tls]");
            problem.advise("set [tls], or listen on 127.0.0.1 and let clients come through a proxy with TLS or ssh -L");
        }
    }

    /// A watermark beyond the whole file system would be a daemon that never does anything.
    fn disk(&mut self) {
        if let Ok(disk) = self.config.disk()
            && let Some(beyond) = disk.watermark_beyond()
        {
            self.wrong("disk.min_free", beyond);
        }
    }

    /// Garbage can be collected only in local files.
    fn collection(&mut self) {
        let Some(Collection { keep, low_keep, .. }) = self.config.collection() else { return };
        if low_keep > keep {
            self.wrong("gc.low_keep", "must be at most gc.keep");
        }
        if let Ok((blobs, directories)) = self.config.store.addrs.resolve()
            && !(blobs.starts_with("file:") && directories.starts_with("redb:"))
        {
            let rule = "must be left out: garbage is collected only in a store with addresses file:///… and redb:///…";
            self.wrong("gc", rule);
        }
    }

    fn store(&mut self) {
        let (blobs, directories) = match self.config.store.addrs.resolve() {
            Ok(addrs) => addrs,
            Err(error) => {
                let advice = error.advice();
                let problem = self.wrong("store", chain(&error));
                if let Some(advice) = advice {
                    problem.advise(advice);
                }
                return;
            }
        };
        // An address that is refused opens nothing.
        if (!is_addr(&blobs) || blobs.starts_with("redb:"))
            && let Err(error) = blobservice::from_addr(&blobs)
        {
            self.wrong("store.blob_service_addr", chain(&error));
        }
        if (!is_addr(&directories) || directories.starts_with("file:"))
            && let Err(error) = directoryservice::from_addr(&directories)
        {
            self.wrong("store.directory_service_addr", chain(&error));
        }
        let has_roots = blobs.starts_with("file:") && directories.starts_with("redb:");
        if !has_roots && !self.config.store.shared.is_empty() {
            self.wrong("store.shared", "needs a store with roots: file:///… for blobs, and redb:///… for directories");
        }
    }
}

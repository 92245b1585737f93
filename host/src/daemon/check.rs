//! Everything that can be wrong with a configuration, as far as it shows without opening the store or a machine.

use std::{error::Error, fs, net::ToSocketAddrs as _, path::Path, process::Command};

use cofferdam_castore::{blobservice, directoryservice, is_addr};
use cofferdam_images::{Image, default_dir};
use cofferdam_rpc::{Certificate, Identity, Tls, forbid_anonymous_tcp};
use tonic::transport::{Server, ServerTlsConfig};

use super::{
    config::{Config, GuestPath, Key, ListenAddr, TlsConfig, VmmName},
    problem::{Problem, failure},
    sockets::{ANONYMOUS, ANONYMOUS_ADVICE},
};
use crate::{
    build::{
        MAX_SCRATCH_BYTES, Options,
        failure::{Failure, causes},
    },
    devices::paths::Shown,
    machine::vmm,
    quantity::show_size,
    request::Host,
};

const EMULATION: &str = "builds could only be emulated here (QEMU TCG), which is no security boundary";
const EMULATION_ADVICE: &str =
    "`cofferdam doctor` tells what KVM lacks; or --allow-emulation, in the configuration allow_emulation = true";

/// What a daemon needs beside its configuration.
pub(super) struct Checked {
    pub(super) options: Options,
    pub(super) image: Image,
    pub(super) vmm: vmm::Choice,
    pub(super) tls: Option<Tls>,
}

/// Looks for all problems at once.
pub(super) fn check(config: &Config) -> Result<Checked, Failure> {
    let mut checks = Checks { config, problems: config.unread().cloned().collect() };
    let options = config.options();
    checks.limits(&options);
    checks.host_paths();
    checks.listen();
    checks.store();
    let (image, vmm, tls) = (checks.image(), checks.vmm(), checks.tls());
    match (image, vmm, tls) {
        (Some(image), Some(vmm), Some(tls)) if checks.problems.is_empty() => Ok(Checked { options, image, vmm, tls }),
        _ => Err(failure(checks.problems)),
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

    /// This host lacks something that can be set with `key`.
    fn lacking(&mut self, key: impl Into<Key>, what: impl AsRef<str>) -> &mut Problem {
        self.add(Problem::lacking(&self.config.place(&key.into()), what.as_ref()))
    }

    fn add(&mut self, problem: Problem) -> &mut Problem {
        self.problems.push_mut(problem)
    }

    fn range(&mut self, key: &str, value: u64, (least, most): (u64, u64), show: fn(u64) -> String) {
        if !(least..=most).contains(&value) {
            self.wrong(key, format!("must be from {} to {}", show(least), show(most)));
        }
    }

    fn limits(&mut self, options: &Options) {
        let (config, host) = (self.config, Host::this());
        let mut budget = config.budget();
        self.range("budget.memory", budget.memory_bytes, (vmm::MIN_MEMORY_BYTES, host.memory_bytes), show_size);
        if !config.is_read("budget") {
            (budget.memory_bytes, budget.cpus) = (host.memory_bytes, vmm::MAX_CPUS);
        }
        let memory = budget.memory_bytes.min(host.memory_bytes).max(vmm::MIN_MEMORY_BYTES);
        self.range("build.memory", options.memory_bytes, (vmm::MIN_MEMORY_BYTES, memory), show_size);
        let cpus = budget.cpus.min(vmm::MAX_CPUS);
        self.range("build.cpus", options.cpus.into(), (1, cpus.into()), |cpus| cpus.to_string());
        let scratch = (cofferdam_images::SCRATCH_TEMPLATE_BYTES, MAX_SCRATCH_BYTES);
        self.range("build.scratch_size", options.scratch_bytes, scratch, show_size);
        if config.hugepages {
            self.huge_pages(options.memory_bytes);
        }
    }

    fn huge_pages(&mut self, build_bytes: u64) {
        // An unreadable file says that there are none.
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let (page_bytes, pages) = huge_pages(&meminfo);
        let needed = build_bytes.div_ceil(page_bytes);
        if pages < needed {
            let size = show_size(build_bytes);
            self.wrong("hugepages", format!("a build's {size} take {needed} huge pages, and this host has {pages}"))
                .advise(format!("sudo sysctl vm.nr_hugepages={needed}"));
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
            let resolved =
                addr.to_socket_addrs().map(|mut addrs| addrs.any(|addr| forbid_anonymous_tcp(addr, None).is_err()));
            match resolved {
                Err(error) => drop(self.lacking(key, format!("can't be resolved: {error}"))),
                Ok(true) if !may_be_anonymous => self.wrong(key, ANONYMOUS).advise(ANONYMOUS_ADVICE),
                Ok(_) => {}
            }
        }
    }

    fn store(&mut self) {
        let (blobs, directories) = match self.config.store.resolve() {
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
        // Nothing is opened at an address that is refused.
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
    }

    fn image(&mut self) -> Option<Image> {
        let path = self.config.image.clone().unwrap_or_else(default_dir);
        match Image::open(&path) {
            Ok(image) => Some(image),
            Err(error) => {
                match self.config.image {
                    Some(_) => self.wrong("image", chain(&error)),
                    None => self.lacking("image", chain(&error)),
                };
                None
            }
        }
    }

    fn vmm(&mut self) -> Option<vmm::Choice> {
        let config = self.config;
        if !config.is_read("vmm") {
            return None;
        }
        let (key, asked) = match (config.vmm, &config.cpu_model) {
            (Some(VmmName::CloudHypervisor), Some(_)) => {
                self.wrong("cpu_model", "cloud-hypervisor always shows builds the host's CPU")
                    .advise("leave cpu_model out, or set vmm = \"qemu\"");
                return None;
            }
            (Some(VmmName::CloudHypervisor), None) => ("vmm", Some(vmm::Kind::CloudHypervisor)),
            (Some(VmmName::Qemu), _) => ("vmm", Some(vmm::Kind::Qemu)),
            (None, Some(_)) => ("cpu_model", Some(vmm::Kind::Qemu)),
            (None, None) => ("vmm", None),
        };
        let choice = match vmm::choose(asked) {
            Ok(choice) => choice,
            Err(error) => {
                let problem = match asked {
                    Some(_) => self.wrong(key, chain(&error)),
                    None => self.lacking(key, chain(&error)),
                };
                problem.advise("cofferdam doctor");
                return None;
            }
        };
        if config.cpu_model.as_ref().is_some_and(|model| !knows_cpu(&choice.program, model)) {
            let list = format!("{} -cpu help", choice.program.display());
            self.wrong("cpu_model", "this QEMU has no CPU model of that name").advise(list);
        }
        match choice.accelerator {
            vmm::Accelerator::Tcg if !config.allow_emulation => {
                self.lacking("allow_emulation", EMULATION).advise(EMULATION_ADVICE);
            }
            vmm::Accelerator::Kvm if config.nested && !vmm::kvm_nests() => {
                self.wrong("nested", "KVM on this host runs no VMs inside VMs: its module has `nested` off").advise(
                    "`modprobe -r kvm_intel; modprobe kvm_intel nested=1`, or the same with kvm_amd; or nested = false",
                );
            }
            _ => {}
        }
        Some(choice)
    }

    /// The outer `None` is a problem, the inner one no TLS.
    fn tls(&mut self) -> Option<Option<Tls>> {
        let Some(TlsConfig { certificate, key, client_ca }) = &self.config.tls else { return Some(None) };
        let certificate_pem = self.read("tls.certificate", certificate);
        let key_pem = self.read("tls.key", key);
        let client_ca_pem = client_ca.as_ref().map(|path| self.read("tls.client_ca", path));
        let identity = Identity::from_pem(certificate_pem?, key_pem?);
        let tls = ServerTlsConfig::new().identity(identity.clone());
        if let Err(error) = Server::builder().tls_config(tls.clone()) {
            let rule = format!("can't be used for TLS with the key {key:?}: {}", chain(&error));
            self.wrong("tls.certificate", rule);
            return None;
        }
        let Some(client_ca_pem) = client_ca_pem else { return Some(Some(Tls { identity, client_ca: None })) };
        let client_ca = Certificate::from_pem(client_ca_pem?);
        if let Err(error) = Server::builder().tls_config(tls.client_ca_root(client_ca.clone())) {
            self.wrong("tls.client_ca", format!("holds no certificates of CAs: {}", chain(&error)));
            return None;
        }
        Some(Some(Tls { identity, client_ca: Some(client_ca) }))
    }

    fn read(&mut self, key: &str, path: &Path) -> Option<Vec<u8>> {
        match fs::read(path) {
            Ok(contents) => Some(contents),
            Err(error) => {
                self.wrong(key, format!("can't read {}: {error}", path.display()));
                None
            }
        }
    }
}

/// The size of the host's huge pages in bytes, and how many of them there are.
fn huge_pages(meminfo: &str) -> (u64, u64) {
    let value = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok()).unwrap_or(0)
    };
    ((value("Hugepagesize") * 1024).max(1), value("HugePages_Total"))
}

/// Whether a QEMU lists this model of CPU. One that lists none is taken to know all.
fn knows_cpu(qemu: &Path, model: &str) -> bool {
    let Ok(listed) = Command::new(qemu).args(["-cpu", "help"]).output() else { return true };
    // A line is `x86 MODEL  DESCRIPTION`, or from QEMU 8.2 on `MODEL  DESCRIPTION`.
    let listed = String::from_utf8_lossy(&listed.stdout);
    listed.is_empty() || listed.lines().any(|line| line.split_whitespace().take(2).any(|word| word == model))
}

/// An error with its causes, on one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in causes(error).map(ToString::to_string) {
        // Libraries wrap errors in others that say the same.
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(text: &str) -> String {
        let config = Config::of(text);
        let mut checks = Checks { config: &config, problems: Vec::new() };
        checks.limits(&config.options());
        checks.host_paths();
        checks.listen();
        failure(checks.problems).message
    }

    #[test]
    fn limits_stay_within_the_budget_and_the_budget_within_the_host() {
        let nothing = failure(Vec::new()).message;
        assert_eq!(limits("[build]\nmemory = '256M'"), nothing);
        for (text, words) in [
            ("[build]\nmemory = '1K'", "test.toml:2: build.memory = '1K': must be from 128.00 MiB to"),
            (
                "[budget]\nmemory = '1G'\n[build]\nmemory = '2G'",
                "build.memory = '2G': must be from 128.00 MiB to 1.00 GiB",
            ),
            ("[budget]\nmemory = '1000T'", "test.toml:2: budget.memory = '1000T': must be from 128.00 MiB to"),
            ("[budget]\nmemory = '1M'", "test.toml:2: budget.memory = '1M': must be from"),
            ("[budget]\ncpus = 2\n[build]\ncpus = 3", "test.toml:4: build.cpus = 3: must be from 1 to 2"),
            ("[budget]\ncpus = 1000\n[build]\ncpus = 255", "build.cpus = 255: must be from 1 to 254"),
            ("[build]\nscratch_size = '1000T'", "build.scratch_size = '1000T': must be from"),
            ("hugepages = true\n[build]\nmemory = '100G'", "test.toml:1: hugepages = true: a build's 100.00 GiB take"),
            ("[host_paths]\n'/x' = '/nowhere'", "test.toml:2: host_paths.\"/x\" = '/nowhere': can't be read"),
        ] {
            let message = limits(text);
            assert!(message.contains(words), "{text}: {message}");
        }
        let open = "could build and read the store";
        let mutual = "[tls]\ncertificate = 'c'\nkey = 'k'\nclient_ca = 'a'";
        for (text, words) in [
            ("listen = ['/x', '[::]:1']", "test.toml:1: listen = '[::]:1': anybody who reaches this address could"),
            ("listen = ['0.0.0.0:1']\n[tls]\ncertificate = 'c'\nkey = 'k'", open),
            ("listen = ['a..b:1']", "listen = 'a..b:1': can't be resolved"),
        ] {
            let message = limits(text);
            assert!(message.contains(words), "{text}: {message}");
        }
        for text in [
            "listen = ['/x', '127.0.0.1:1', '[::1]:1', 'localhost:1']",
            "allow_anonymous_tcp = true\nlisten = ['[::]:1']",
            &format!("listen = ['[::]:1']\n{mutual}"),
            // Who may connect shows when the table can be read.
            "listen = ['[::]:1']\n[tls]\ncertificate = 'c'\nkey = 'k'\nclientca = 'a'",
        ] {
            assert_eq!(limits(text), nothing, "{text}");
        }
        // Where the budget can't be read, nothing is held against it.
        let unread = limits("[budget]\ncpus = 'two'\n[build]\ncpus = 200");
        assert_eq!(unread, nothing);
    }

    #[test]
    fn huge_pages_are_counted_whether_free_or_not() {
        let meminfo = "MemTotal: 1 kB\nHugePages_Total:     512\nHugePages_Free:  3\nHugepagesize:       2048 kB\n";
        assert_eq!(huge_pages(meminfo), (2 << 20, 512));
        assert_eq!(huge_pages(""), (1, 0));
    }
}

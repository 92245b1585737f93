//! Whether a host can build a request. A pure decision: the host's abilities are passed in.

use std::{collections::BTreeMap, ops::Deref, path::PathBuf};

use cofferdam_castore::{Node, PathComponent};

use super::{AbsolutePath, BuildRequest, RequestError, RequestErrorKind};

/// The only system that guests run.
pub const SYSTEM: &str = "x86_64-linux";

/// Linux's device for virtualisation. It is not shown from the host; a build gets the one of its guest's kernel.
pub(crate) const KVM: &str = "/dev/kvm";

/// What a request's constraints are checked against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The system of its guests.
    pub system: &'static str,
    /// All memory of the host, in bytes.
    pub memory_bytes: u64,
    /// Paths that builds may be shown: the path in the build, and the path on the host.
    pub ro_paths: BTreeMap<AbsolutePath, PathBuf>,
    /// Whether builds that ask for the network run without it instead of being refused. snix asks for it whenever the output's
    /// digest is fixed.
    pub withholds_network: bool,
    /// Whether builds that ask for the network have one.
    pub network: bool,
    /// Whether builds may run VMs of their own.
    pub nested: bool,
}

impl Host {
    /// This host. If its memory is unknown, it counts as unlimited.
    pub fn this() -> Self {
        let memory_bytes = match nix::sys::sysinfo::sysinfo() {
            Ok(info) => info.ram_total(),
            Err(_) => u64::MAX,
        };
        Self {
            system: SYSTEM,
            memory_bytes,
            ro_paths: BTreeMap::new(),
            withholds_network: false,
            network: false,
            nested: false,
        }
    }
}

/// A request that a host can build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted(BuildRequest);

impl Deref for Admitted {
    type Target = BuildRequest;

    fn deref(&self) -> &BuildRequest {
        &self.0
    }
}

impl Admitted {
    /// See [`BuildRequest::with_inputs`]. No constraint depends on inputs.
    pub(crate) fn with_inputs(self, inputs: BTreeMap<PathComponent, Node>) -> Result<Self, RequestError> {
        self.0.with_inputs(inputs).map(Self)
    }
}

/// Admits a request if `host` can build it.
///
/// # Errors
///
/// The first constraint that the host can't meet.
pub fn admit(request: BuildRequest, host: &Host) -> Result<Admitted, RequestError> {
    check(&request, host).map(|()| Admitted(request))
}

fn check(request: &BuildRequest, host: &Host) -> Result<(), RequestError> {
    let Some(constraints) = &request.constraints else {
        return Ok(());
    };
    let refused = |field: &str, rule: String| Err(RequestError::new(RequestErrorKind::Unsupported, field, rule));
    if constraints.system != host.system {
        let rule = format!("must be {:?}, the only system that this host builds for", host.system);
        return refused("constraints.system", rule).map_err(|error| error.got_quoted(constraints.system.as_bytes()));
    }
    if constraints.min_memory > host.memory_bytes {
        let rule = format!("must not exceed the host's memory of {} bytes", host.memory_bytes);
        return refused("constraints.min_memory", rule).map_err(|error| error.got(constraints.min_memory));
    }
    for path in &constraints.available_ro_paths {
        let rule = match path.as_str() {
            KVM if host.nested => continue,
            KVM => "must not have this: builds of this host run no VMs of their own".to_owned(),
            _ if host.ro_paths.contains_key(path) => continue,
            _ => "must have only those that the host's configuration allows".to_owned(),
        };
        return refused("constraints.available_ro_paths", rule)
            .map_err(|error| error.got_quoted(path.as_str().as_bytes()));
    }
    if constraints.network_access && !host.withholds_network && !host.network {
        let rule = "must be false: builds of this host have no network".into();
        return refused("constraints.network_access", rule).map_err(|error| error.got(true));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use cofferdam_proto::snix::build::v1::{self as proto, build_request::BuildConstraints};

    use super::*;

    const HOST: Host = Host {
        system: SYSTEM,
        memory_bytes: 4 << 30,
        ro_paths: BTreeMap::new(),
        withholds_network: false,
        network: false,
        nested: false,
    };

    fn decide(constraints: Option<BuildConstraints>) -> Result<(), String> {
        decide_on(&HOST, constraints)
    }

    fn decide_on(host: &Host, constraints: Option<BuildConstraints>) -> Result<(), String> {
        let message =
            proto::BuildRequest { command_args: vec!["true".into()], constraints, ..proto::BuildRequest::default() };
        admit(message.try_into().unwrap(), host).map(drop).map_err(|error| {
            assert_eq!(error.kind, RequestErrorKind::Unsupported);
            error.to_string()
        })
    }

    fn ours() -> BuildConstraints {
        BuildConstraints { system: SYSTEM.into(), ..BuildConstraints::default() }
    }

    #[test]
    fn what_the_host_has_is_admitted() {
        decide(None).unwrap();
        decide(Some(ours())).unwrap();
        decide(Some(BuildConstraints { min_memory: 4 << 30, provide_bin_sh: true, ..ours() })).unwrap();
    }

    #[test]
    fn what_the_host_lacks_is_refused_by_field() {
        for (constraints, expected) in [
            (
                BuildConstraints { system: "aarch64-linux".into(), ..ours() },
                "constraints.system must be \"x86_64-linux\", the only system that this host builds for \
                 (got \"aarch64-linux\")",
            ),
            (
                BuildConstraints { min_memory: (4 << 30) + 1, ..ours() },
                "constraints.min_memory must not exceed the host's memory of 4294967296 bytes (got 4294967297)",
            ),
            (
                BuildConstraints { available_ro_paths: vec!["/dev/kvm".into()], ..ours() },
                "constraints.available_ro_paths must not have this: builds of this host run no VMs of their own \
                 (got \"/dev/kvm\")",
            ),
            (
                BuildConstraints { available_ro_paths: vec!["/etc/hosts".into()], ..ours() },
                "constraints.available_ro_paths must have only those that the host's configuration allows (got \"/etc/hosts\")",
            ),
            (
                BuildConstraints { network_access: true, ..ours() },
                "constraints.network_access must be false: builds of this host have no network (got true)",
            ),
        ] {
            assert_eq!(decide(Some(constraints)).unwrap_err(), expected);
        }
    }

    #[test]
    fn a_path_of_the_host_must_be_allowed_itself() {
        let allowed = AbsolutePath::new("/opt/data").unwrap();
        let host = Host { ro_paths: BTreeMap::from([(allowed, "/srv/data".into())]), ..HOST };
        let decide = |paths: &[&str]| {
            let available_ro_paths = paths.iter().map(|path| (*path).to_owned()).collect();
            decide_on(&host, Some(BuildConstraints { available_ro_paths, ..ours() }))
        };
        decide(&["/opt/data"]).unwrap();
        for paths in [&["/opt"][..], &["/opt/data", "/opt/data/below"], &["/srv/data"], &["/"]] {
            let error = decide(paths).unwrap_err();
            assert!(error.ends_with(&format!("(got {:?})", paths[paths.len() - 1])), "{error}");
        }
    }

    #[test]
    fn builds_may_run_machines_where_the_host_lets_them() {
        let kvm = || Some(BuildConstraints { available_ro_paths: vec![KVM.into()], ..ours() });
        decide_on(&Host { nested: true, ..HOST }, kvm()).unwrap();
        decide_on(&HOST, kvm()).unwrap_err();
    }

    #[test]
    fn the_network_may_be_withheld() {
        let host = Host { withholds_network: true, ..HOST };
        decide_on(&host, Some(BuildConstraints { network_access: true, ..ours() })).unwrap();
    }

    #[test]
    fn builds_may_use_the_network_where_the_host_has_one_for_them() {
        let host = Host { network: true, ..HOST };
        decide_on(&host, Some(BuildConstraints { network_access: true, ..ours() })).unwrap();
    }

    #[test]
    fn this_host_has_memory() {
        assert!(Host::this().memory_bytes > 64 << 20);
    }
}

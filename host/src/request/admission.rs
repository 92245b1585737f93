//! Whether a host can build a request. A pure decision: what the host has is handed in.

use super::{BuildRequest, RequestError, RequestErrorKind};

/// The one system that guests run.
pub const SYSTEM: &str = "x86_64-linux";

/// What constraints are measured against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The system of its guests.
    pub system: &'static str,
    /// All memory of the host, in bytes.
    pub memory_bytes: u64,
}

impl Host {
    /// The host that this runs on. A host that doesn't tell its memory is taken to have enough.
    pub fn this() -> Self {
        let memory_bytes = match nix::sys::sysinfo::sysinfo() {
            Ok(info) => info.ram_total(),
            Err(_) => u64::MAX,
        };
        Self { system: SYSTEM, memory_bytes }
    }
}

/// Whether `host` can build `request`.
///
/// # Errors
///
/// The first constraint that it can't meet.
pub fn admit(request: &BuildRequest, host: &Host) -> Result<(), RequestError> {
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
    if let Some(path) = constraints.available_ro_paths.first() {
        let rule = "must be empty: showing paths of the host is not supported yet".into();
        return refused("constraints.available_ro_paths", rule)
            .map_err(|error| error.got_quoted(path.as_str().as_bytes()));
    }
    if constraints.network_access {
        let rule = "must be false: builds with network access are not supported yet".into();
        return refused("constraints.network_access", rule).map_err(|error| error.got(true));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::proto::{self, build_request::BuildConstraints};

    const HOST: Host = Host { system: SYSTEM, memory_bytes: 4 << 30 };

    fn decide(constraints: Option<BuildConstraints>) -> Result<(), String> {
        let message =
            proto::BuildRequest { command_args: vec!["true".into()], constraints, ..proto::BuildRequest::default() };
        admit(&message.try_into().unwrap(), &HOST).map_err(|error| {
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
                "constraints.available_ro_paths must be empty: showing paths of the host is not supported yet \
                 (got \"/dev/kvm\")",
            ),
            (
                BuildConstraints { network_access: true, ..ours() },
                "constraints.network_access must be false: builds with network access are not supported yet (got true)",
            ),
        ] {
            assert_eq!(decide(Some(constraints)).unwrap_err(), expected);
        }
    }

    #[test]
    fn this_host_has_memory() {
        assert!(Host::this().memory_bytes > 64 << 20);
    }
}

//! The checks, in the order in which a build needs what they check.

use std::{fmt::Write as _, fs::DirBuilder, os::unix::fs::DirBuilderExt, path::Path};

use cofferdam_images::{Image, used_dir};

use super::{super::StoreArgs, Check};
use crate::{
    daemon::{self, NO_CGROUPS_ADVICE, Overrides, Problem, chain},
    limits::Limits,
    machine::jail::{Best, Delegated, Walls, landlock_version},
    machine::vmm::{self, Accelerator, Candidate, Choice, ChooseError, KvmError},
    quantity::show_size,
    request::Host,
    state::state_dir,
};

/// Free space below which larger builds will fail, in bytes.
const LITTLE_SPACE_BYTES: u64 = 1 << 30;

pub(super) fn all(store: &StoreArgs, config: daemon::Config) -> Vec<Check> {
    let survey = vmm::survey();
    let kvm = kvm(&survey.kvm);
    let cloud_hypervisor = candidate("cloud-hypervisor", &survey.cloud_hypervisor);
    let (qemu, vsock_device) = (candidate("qemu", &survey.qemu), vsock_device(&survey.qemu));
    let choice = survey.choose(None);
    let user_namespaces = user_namespaces(config.user_namespaces());
    let weaknesses = config.weaknesses(choice.as_ref().is_ok_and(Choice::schedules_cores));
    let mut checks = vec![
        state(),
        stores(store),
        image(),
        kvm,
        cloud_hypervisor,
        qemu,
        vsock_device,
        machines(choice),
        daemon(store, config),
        landlock(landlock_version()),
        walls(),
        cgroups(),
        memory(&Host::this()),
        user_namespaces,
    ];
    checks.extend(weaknesses.into_iter().map(|weakness| Check::weak(weakness.name, weakness.finding, weakness.fix)));
    checks
}

fn kvm(works: &Result<(), KvmError>) -> Check {
    match works {
        Ok(()) => Check::fine("kvm", "/dev/kvm works"),
        Err(error) => Check::absent("kvm", chain(error), error.remedy()),
    }
}

fn state() -> Check {
    let name = "state directory";
    let fix = "name another directory in COFFERDAM_STATE_DIR";
    let path = match state_dir() {
        Ok(path) => path,
        Err(error) => return Check::missing(name, chain(&error), fix),
    };
    if let Err(error) = writable(&path) {
        return Check::missing(name, format!("{} is not writable: {error}", path.display()), fix);
    }
    let free = match nix::sys::statvfs::statvfs(&path) {
        Ok(stat) => stat.blocks_available().saturating_mul(stat.fragment_size()),
        Err(error) => return Check::missing(name, format!("{}: {error}", path.display()), fix),
    };
    let detail = format!("{}, {} free", path.display(), show_size(free));
    match free {
        LITTLE_SPACE_BYTES.. => Check::fine(name, detail),
        _ => Check::absent(name, format!("{detail}, which is little"), format!("free some space, or {fix}")),
    }
}

/// Creates the directory as a build would, and a temporary file in it.
fn writable(path: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    tempfile::tempfile_in(path).map(drop)
}

fn stores(store: &StoreArgs) -> Check {
    let name = "store";
    match store.addrs().resolve().and_then(|addresses| store.addrs().open().map(|_| addresses)) {
        Ok((blobs, directories)) => Check::fine(name, format!("{blobs} and {directories}")),
        Err(error) => Check::missing(
            name,
            chain(&error),
            "correct --blob-service-addr and --directory-service-addr, or unset them",
        ),
    }
}

fn image() -> Check {
    let name = "guest image";
    let path = used_dir();
    match Image::open(&path) {
        Ok(_) => Check::fine(name, path.display().to_string()),
        Err(error) => Check::missing(name, chain(&error), "just image"),
    }
}

fn candidate(name: &'static str, candidate: &Candidate) -> Check {
    let found =
        candidate.found.as_ref().map(|found| format!("{} (version {})", found.program.display(), found.version));
    match (&found, candidate.accelerator) {
        (Some(found), Some(accelerator)) => {
            let ways = candidate.unconfined.iter().fold(String::new(), |text, way| format!("{text}; {way}"));
            Check::fine(name, format!("{found}, with {accelerator}{ways}"))
        }
        _ => {
            let join = |parts: Vec<&str>| parts.join("; ");
            let what = join(candidate.missing.iter().map(|missing| missing.what.as_str()).collect());
            let fix = join(candidate.missing.iter().map(|missing| missing.remedy.as_str()).collect());
            let detail = found.map_or_else(|| what.clone(), |found| format!("{found}; {what}"));
            Check::absent(name, detail, fix)
        }
    }
}

fn vsock_device(qemu: &Candidate) -> Check {
    let name = "vhost-device-vsock";
    match &qemu.vsock_device {
        Some(found) => Check::fine(name, format!("{} (version {})", found.program.display(), found.version)),
        None => {
            let own = qemu.missing.iter().find(|missing| missing.what.contains(name));
            let (what, fix) = own.map_or(("not found", "images/setup.sh"), |own| (&own.what, &own.remedy));
            Check::absent(name, format!("{what}; only QEMU needs it"), fix)
        }
    }
}

fn machines(choice: Result<Choice, ChooseError>) -> Check {
    let name = "virtual machines";
    match choice {
        Err(_) => Check::missing(name, "neither cloud-hypervisor nor QEMU can run here", "fix what one of them lacks"),
        Ok(choice) => {
            let mut detail = format!("{} with {}: {}", choice.kind, choice.accelerator, choice.reason);
            if choice.accelerator == Accelerator::Tcg {
                let _ = write!(detail, "; emulation is no security boundary");
            }
            Check::fine(name, detail)
        }
    }
}

/// A daemon is stricter than `run`, above all about emulation.
fn daemon(store: &StoreArgs, mut config: daemon::Config) -> Check {
    let name = "daemon";
    config.override_with(Overrides { store: store.addrs(), ..Overrides::default() });
    let problems = daemon::problems(&config);
    if problems.is_empty() {
        return Check::fine(name, "would start");
    }
    let texts: Vec<_> = problems.iter().map(Problem::text).collect();
    let mut fixes: Vec<_> = problems.iter().filter_map(Problem::advice).collect();
    if fixes.is_empty() {
        fixes.push("see above");
    }
    Check::absent(name, format!("would refuse to start: {}", texts.join("; ")), fixes.join("; "))
}

fn landlock(version: u32) -> Check {
    let name = "landlock";
    match version {
        version @ 1.. => Check::fine(name, format!("version {version}; helper processes are confined")),
        0 => Check::absent(
            name,
            "this kernel has none, so that helper processes are confined by other means alone",
            "boot with lsm=landlock, or a kernel of version 5.13 or later",
        ),
    }
}

fn walls() -> Check {
    let name = "helper processes";
    let Best { walls, reason, .. } = Best::of_this_host();
    match walls {
        Walls::Uids => Check::fine(name, "each machine's have namespaces and a user id of their own"),
        Walls::Namespaces => Check::absent(
            name,
            format!("they have namespaces of their own, and the daemon's user id: {reason}"),
            "give the daemon CAP_SETUID and CAP_SETGID, or its user subordinate ids (subuid(5)) and newuidmap \
             (Debian's package uidmap)",
        ),
        Walls::None => Check::absent(
            name,
            format!("they can't have namespaces of their own: {reason}"),
            "sudo sysctl user.max_user_namespaces=10000; in a container, allow it to make namespaces",
        ),
    }
}

fn cgroups() -> Check {
    let name = "cgroups";
    match Delegated::find() {
        Ok(delegated) => {
            let (bounded, free) = delegated.bounds();
            let but = if free.is_empty() { String::new() } else { format!(", but not its {}", free.join(" and ")) };
            Check::fine(name, format!("each machine gets one, which bounds its {}{but}", bounded.join(", ")))
        }
        Err(reason) => {
            let what = "nothing bounds the memory and CPU time of a machine's helper processes together";
            Check::absent(name, format!("{what}: {reason}"), NO_CGROUPS_ADVICE)
        }
    }
}

fn user_namespaces(are_allowed: bool) -> Check {
    let detail = match are_allowed {
        true => "builds can make them",
        false => {
            "builds can't make them, unless by --user-namespaces, or user_namespaces = true in the daemon's configuration"
        }
    };
    Check::fine("user namespaces", detail)
}

fn memory(host: &Host) -> Check {
    let name = "memory";
    let needed = Limits::default().memory_bytes;
    let (all, default) = (show_size(host.memory_bytes), show_size(needed));
    if host.memory_bytes > needed {
        Check::fine(name, format!("{all}; a build gets {default} unless --memory says otherwise"))
    } else {
        Check::absent(name, format!("{all}, and a build gets {default}"), "give builds less memory with --memory")
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_kvm_that_only_the_user_itself_may_open_is_one_line_with_a_fix() {
        let denied = KvmError::Helpers(io::ErrorKind::PermissionDenied.into());
        let lines = kvm(&Err(denied)).lines();
        let (line, fix) = lines.split_once('\n').unwrap();
        let expected = "absent   kvm                 this user may open /dev/kvm, but its helper processes, which have a user id of \
                        their own, may not: permission denied";
        assert_eq!(line, expected);
        assert!(fix.trim().starts_with("try: let a group have the device") && fix.ends_with("log in again\n"), "{fix}");
        assert_eq!(kvm(&Ok(())).lines(), "ok       kvm                 /dev/kvm works\n");
    }

    #[test]
    fn a_kernel_without_landlock_is_one_line_with_a_fix() {
        let expected = "absent   landlock            this kernel has none, so that helper processes are confined by other means \
                        alone\n                             try: boot with lsm=landlock, or a kernel of version 5.13 or later\n";
        assert_eq!(landlock(0).lines(), expected);
        assert!(landlock(1).lines().starts_with("ok       landlock            version 1; "));
    }
}

//! Which VMM runs on this host.
//!
//! ```text
//!   survey: programs and KVM ──▶ choose: cloud-hypervisor if it is found and KVM works,
//!                                        else QEMU, with KVM if it works, else by emulation
//! ```

use std::panic::resume_unwind;
use std::path::PathBuf;
use std::thread::{self, ScopedJoinHandle};

use thiserror::Error;

use crate::machine::jail::landlock_version;

use super::cloud_hypervisor::{self, CloudHypervisor};
use super::find::{self, Found, Missing, Variables, Version};
use super::kind::{Accelerator, Kind};
use super::kvm::{self, KvmError};
use super::qemu::Qemu;
use super::tsc;
use super::vm::Vmm;

/// The VMM to use, and why.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Which VMM.
    pub kind: Kind,
    /// KVM or emulation.
    pub accelerator: Accelerator,
    /// Its file.
    pub program: PathBuf,
    /// Its version.
    pub version: String,
    /// Why this VMM was chosen, as part of a sentence.
    pub reason: String,
    /// The file of `vhost-device-vsock`, which QEMU needs.
    vsock_device: PathBuf,
}

impl Choice {
    /// Whether it keeps other machines off the processor cores that a guest runs on.
    pub(crate) fn schedules_cores(&self) -> bool {
        self.kind == Kind::CloudHypervisor && Version::of(&self.version) >= cloud_hypervisor::SCHEDULES_CORES
    }

    /// The VMM, ready to start machines.
    pub fn vmm(&self) -> Box<dyn Vmm> {
        match self.kind {
            Kind::CloudHypervisor => Box::new(CloudHypervisor::new(self.program.clone())),
            Kind::Qemu => Box::new(Qemu {
                program: self.program.clone(),
                vsock_device: self.vsock_device.clone(),
                accelerator: self.accelerator,
            }),
        }
    }
}

/// Why there is no VMM to use.
#[derive(Debug, Error)]
pub enum ChooseError {
    /// The requested VMM can't run here.
    #[error("{kind} was asked for, but can't run here: {}", list(missing))]
    Asked {
        /// The requested VMM.
        kind: Kind,
        /// Why it can't run.
        missing: Vec<Missing>,
    },
    /// No VMM can run here.
    #[error("no VMM can run here. qemu: {}. cloud-hypervisor: {}", list(qemu), list(cloud_hypervisor))]
    Neither {
        /// Why QEMU can't run.
        qemu: Vec<Missing>,
        /// Why cloud-hypervisor can't run.
        cloud_hypervisor: Vec<Missing>,
    },
}

fn list(missing: &[Missing]) -> String {
    missing.iter().map(|one| format!("{} (to fix it: {})", one.what, one.remedy)).collect::<Vec<_>>().join("; ")
}

/// One VMM on this host.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Which VMM.
    pub kind: Kind,
    /// Its program, if found.
    pub found: Option<Found>,
    /// The separate program for its vsock, if it needs one and that was found.
    pub vsock_device: Option<Found>,
    /// KVM or emulation. `None` if it can't run.
    pub accelerator: Option<Accelerator>,
    /// Why it can't run. Empty if it can.
    pub missing: Vec<Missing>,
    /// Protections that are off on this host, each as part of a sentence.
    pub unconfined: Vec<String>,
}

/// The VMMs of this host, and whether KVM works.
#[derive(Debug)]
pub struct Survey {
    /// Whether KVM works.
    pub kvm: Result<(), KvmError>,
    /// The VMM for production.
    pub cloud_hypervisor: Candidate,
    /// The VMM that runs anywhere.
    pub qemu: Candidate,
}

/// Looks for KVM and the VMMs. It runs each program with `--version`, which takes some ten milliseconds.
pub fn survey() -> Survey {
    // QEMU needs two readings of a counter some time apart. An early first one saves waiting later.
    tsc::prepare();
    survey_with(&kvm::check, &|name| match name {
        // The user database has it for services without the variable.
        "HOME" => std::env::home_dir().map(Into::into),
        _ => std::env::var_os(name),
    })
}

/// Chooses a VMM, or checks that the requested one can run.
pub fn choose(asked: Option<Kind>) -> Result<Choice, ChooseError> {
    survey().choose(asked)
}

fn survey_with(check_kvm: &(dyn Fn() -> Result<(), KvmError> + Sync), variables: Variables<'_>) -> Survey {
    let look = |tool| move || find::look(tool, variables);
    let (kvm, cloud_hypervisor, qemu, vsock_device) = thread::scope(|scope| {
        let others = [&find::CLOUD_HYPERVISOR, &find::VHOST_DEVICE_VSOCK].map(|tool| scope.spawn(look(tool)));
        let kvm = scope.spawn(check_kvm);
        let qemu = find::look(&find::QEMU, variables);
        let [cloud_hypervisor, vsock_device] = others.map(joined);
        (joined(kvm), cloud_hypervisor, qemu, vsock_device)
    });
    let (found, problem) = cloud_hypervisor;
    let mut missing = Vec::from_iter(problem);
    if let Err(error) = &kvm {
        missing.push(Missing { what: describe(error), remedy: error.remedy().to_owned() });
    }
    let accelerator = missing.is_empty().then_some(Accelerator::Kvm);
    let unconfined = found
        .as_ref()
        .map(|found| cloud_hypervisor::unconfined(Version::of(&found.version), landlock_version()))
        .unwrap_or_default();
    let cloud_hypervisor =
        Candidate { kind: Kind::CloudHypervisor, found, vsock_device: None, accelerator, missing, unconfined };

    let (found, problem) = qemu;
    let (vsock_device, device_problem) = vsock_device;
    let missing: Vec<Missing> = problem.into_iter().chain(device_problem).collect();
    let accelerator = if kvm.is_ok() { Accelerator::Kvm } else { Accelerator::Tcg };
    let accelerator = missing.is_empty().then_some(accelerator);
    let qemu = Candidate { kind: Kind::Qemu, found, vsock_device, accelerator, missing, unconfined: vec![] };
    Survey { kvm, cloud_hypervisor, qemu }
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// An error with its cause.
fn describe(error: &KvmError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

impl Survey {
    /// Chooses from this survey, see [`choose`].
    pub fn choose(self, asked: Option<Kind>) -> Result<Choice, ChooseError> {
        let Self { kvm, cloud_hypervisor, qemu } = self;
        let emulating = kvm.err().map(|error| format!("KVM does not work: {}", describe(&error)));
        match asked {
            Some(kind) => {
                let (candidate, emulating) = match kind {
                    Kind::CloudHypervisor => (cloud_hypervisor, None),
                    Kind::Qemu => (qemu, emulating),
                };
                let reason = emulating.map_or_else(|| "asked for".to_owned(), |why| format!("asked for; {why}"));
                candidate.into_choice(reason).map_err(|missing| ChooseError::Asked { kind, missing })
            }
            None => match cloud_hypervisor.into_choice("it is installed and KVM works".to_owned()) {
                Ok(choice) => Ok(choice),
                Err(cloud_hypervisor) => {
                    let whats: Vec<&str> = cloud_hypervisor.iter().map(|one| one.what.as_str()).collect();
                    let reason = emulating.unwrap_or_else(|| format!("KVM works, but {}", whats.join(" and ")));
                    qemu.into_choice(reason).map_err(|qemu| ChooseError::Neither { qemu, cloud_hypervisor })
                }
            },
        }
    }
}

impl Candidate {
    fn into_choice(self, reason: String) -> Result<Choice, Vec<Missing>> {
        match (self.found, self.accelerator) {
            (Some(Found { program, version }), Some(accelerator)) => {
                let vsock_device = self.vsock_device.map(|found| found.program).unwrap_or_default();
                Ok(Choice { kind: self.kind, accelerator, program, version, reason, vsock_device })
            }
            _ => Err(self.missing),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn candidate(kind: Kind, accelerator: Option<Accelerator>) -> Candidate {
        let found = Found { program: "/bin/vmm".into(), version: "53.0".into() };
        let missing = match accelerator {
            None => vec![Missing { what: format!("{kind} lacks x"), remedy: "get x".into() }],
            Some(_) => vec![],
        };
        Candidate {
            kind,
            vsock_device: Some(found.clone()),
            found: Some(found),
            accelerator,
            missing,
            unconfined: vec![],
        }
    }

    fn host(kvm: bool, cloud_hypervisor: bool, qemu: bool) -> Survey {
        let accelerator = if kvm { Accelerator::Kvm } else { Accelerator::Tcg };
        Survey {
            kvm: if kvm { Ok(()) } else { Err(KvmError::Absent) },
            cloud_hypervisor: candidate(Kind::CloudHypervisor, cloud_hypervisor.then_some(Accelerator::Kvm)),
            qemu: candidate(Kind::Qemu, qemu.then_some(accelerator)),
        }
    }

    #[test]
    fn the_choice_depends_on_kvm_and_the_installed_programs() {
        let chosen = |asked, survey: Survey| {
            let Choice { kind, accelerator, reason, .. } = survey.choose(asked).unwrap();
            (kind, accelerator, reason)
        };
        let (ch, qemu) = (Kind::CloudHypervisor, Kind::Qemu);
        assert_eq!(
            chosen(None, host(true, true, true)),
            (ch, Accelerator::Kvm, "it is installed and KVM works".into())
        );
        assert_eq!(
            chosen(None, host(true, false, true)),
            (qemu, Accelerator::Kvm, "KVM works, but cloud-hypervisor lacks x".into())
        );
        assert_eq!(
            chosen(None, host(false, false, true)),
            (qemu, Accelerator::Tcg, "KVM does not work: /dev/kvm does not exist".into())
        );
        assert_eq!(chosen(Some(qemu), host(true, true, true)), (qemu, Accelerator::Kvm, "asked for".into()));
        assert_eq!(
            chosen(Some(qemu), host(false, false, true)).2,
            "asked for; KVM does not work: /dev/kvm does not exist"
        );
        assert_eq!(chosen(Some(ch), host(true, true, false)), (ch, Accelerator::Kvm, "asked for".into()));
    }

    #[test]
    fn missing_parts_are_reported_with_a_remedy() {
        let refused = |asked, survey: Survey| survey.choose(asked).unwrap_err().to_string();
        assert_eq!(
            refused(Some(Kind::CloudHypervisor), host(false, false, true)),
            "cloud-hypervisor was asked for, but can't run here: cloud-hypervisor lacks x (to fix it: get x)"
        );
        assert_eq!(
            refused(Some(Kind::Qemu), host(true, true, false)),
            "qemu was asked for, but can't run here: qemu lacks x (to fix it: get x)"
        );
        assert_eq!(
            refused(None, host(false, false, false)),
            "no VMM can run here. qemu: qemu lacks x (to fix it: get x). \
             cloud-hypervisor: cloud-hypervisor lacks x (to fix it: get x)"
        );
    }

    #[test]
    fn an_empty_host_lacks_everything() {
        let denied = || Err(KvmError::Open(io::Error::from_raw_os_error(5)));
        let nothing = |_: &str| None;
        let Survey { cloud_hypervisor, qemu, .. } = survey_with(&denied, &nothing);
        let whats = |candidate: Candidate| candidate.missing.into_iter().map(|one| one.what).collect::<Vec<_>>();
        assert_eq!(
            whats(cloud_hypervisor),
            [
                "cloud-hypervisor is neither in PATH nor named by COFFERDAM_CLOUD_HYPERVISOR",
                "/dev/kvm does not open: Input/output error (os error 5)"
            ]
        );
        assert_eq!(
            whats(qemu),
            [
                "qemu-system-x86_64 is neither in PATH nor named by COFFERDAM_QEMU",
                "vhost-device-vsock is neither in PATH nor named by COFFERDAM_VHOST_DEVICE_VSOCK"
            ]
        );
    }
}

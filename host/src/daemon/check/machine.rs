//! Checks of the image, the VMM with its settings, and the host's huge pages.

use std::{path::Path, process::Command};

use cofferdam_images::{Image, used_dir};

use super::{Checks, Key};
use crate::{
    daemon::{config::VmmName, problem::chain},
    machine::{
        jail::{Best, Delegated},
        vmm,
    },
    quantity::show_size,
    state::state_dir,
};

const EMULATION: &str = "builds could only be emulated here (QEMU TCG), which is no security boundary";
const EMULATION_ADVICE: &str = "make KVM work (`cofferdam doctor` shows what it lacks), or accept emulation with \
                                --allow-emulation or allow_emulation = true";

/// How a daemon gets a cgroup that it may divide.
pub(crate) const NO_CGROUPS_ADVICE: &str = "start the daemon by its unit, which has Delegate=, or with \
                                            `systemd-run --scope --property=Delegate=yes` (and --user, unless you are \
                                            root); the host needs cgroup v2 \
                                            (systemd.unified_cgroup_hierarchy=1 on the kernel's command line)";

impl Checks<'_> {
    pub(super) fn image(&mut self) -> Option<Image> {
        let path = self.config.image.clone().unwrap_or_else(used_dir);
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

    pub(super) fn vmm(&mut self) -> Option<vmm::Choice> {
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
                self.lacking("allow_emulation", format!("{EMULATION}; {}", choice.reason)).advise(EMULATION_ADVICE);
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

    pub(super) fn walls(&mut self) {
        let (Best { walls, reason, .. }, required) = (Best::of_this_host(), self.config.walls());
        if *walls < required {
            let what = format!("helper processes get {walls} here, and {required} are required: {reason}");
            self.lacking("jail.require", what)
                .advise(format!("`cofferdam doctor`, or require less: [jail] require = \"{walls}\""));
        }
    }

    pub(super) fn cgroups(&mut self) {
        let config = &self.config.cgroups;
        match Delegated::find() {
            Err(reason) if config.require => {
                let what = format!("machines get no cgroup here, and are required to: {reason}");
                self.lacking("cgroups.require", what).advise(NO_CGROUPS_ADVICE);
            }
            Err(_) => {}
            Ok(delegated) => {
                let shares = config.shares(&state_dir().unwrap_or_default());
                if let Err(reason) = delegated.disk(&shares) {
                    self.wrong("cgroups", format!("read_rate and write_rate can't be kept: {reason}"));
                }
                for (name, controller) in config.controllers().filter(|(_, controller)| !delegated.has(controller)) {
                    let what = format!("the cgroup {} has no controller {controller}", delegated.path().display());
                    let advice =
                        format!("delegate it to the daemon (Delegate= with {controller}), or leave the setting out");
                    self.lacking(Key::from("cgroups").child(name), what).advise(advice);
                }
            }
        }
    }

    pub(super) fn huge_pages(&mut self, machine_bytes: u64) {
        let vmm::HugePages { size_bytes, total: pages, .. } = vmm::HugePages::of_host();
        let needed = machine_bytes.div_ceil(size_bytes);
        if pages < needed {
            let size = show_size(machine_bytes);
            self.wrong("hugepages", format!("a machine's {size} take {needed} huge pages, and this host has {pages}"))
                .advise(format!("sudo sysctl vm.nr_hugepages={needed}"));
        }
    }
}

/// Whether this QEMU has a CPU model. A QEMU that can't list its models is given the benefit of the doubt.
fn knows_cpu(qemu: &Path, model: &str) -> bool {
    let Ok(listed) = Command::new(qemu).args(["-cpu", "help"]).output() else { return true };
    // A line is `x86 MODEL  DESCRIPTION`. Not every version begins it with the architecture.
    let listed = String::from_utf8_lossy(&listed.stdout);
    listed.is_empty() || listed.lines().any(|line| line.split_whitespace().take(2).any(|word| word == model))
}

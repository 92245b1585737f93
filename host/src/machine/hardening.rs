//! Settings that make a host safer for machines of mutually distrusting tenants, from Firecracker's guide for production hosts
//! (its `docs/prod-host-setup.md`).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// A setting of the host that could be safer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Weakness {
    /// Its name in `[host] waive`.
    pub(crate) name: &'static str,
    /// The setting, and what an attacker gains by it.
    pub(crate) finding: String,
    /// A command that changes it.
    pub(crate) fix: &'static str,
}

/// The names of all weaknesses.
pub(crate) const NAMES: [&str; 7] = ["ksm", "swap", "smt", "mitigations", "yama", "overcommit", "kvm_mode"];

/// The weaknesses of this host, in the order of [`NAMES`]. `core_scheduling` tells whether the VMM keeps other machines off the
/// processor cores that its guest runs on.
pub(crate) fn weaknesses(core_scheduling: bool) -> Vec<Weakness> {
    below("/".as_ref(), core_scheduling)
}

fn below(root: &Path, core_scheduling: bool) -> Vec<Weakness> {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default().trim().to_owned();
    let mut found = Vec::new();
    let mut add = |name, finding: String, fix| found.push(Weakness { name, finding, fix });
    if read("sys/kernel/mm/ksm/run") == "1" {
        let finding = "the kernel merges equal pages (KSM), so that a guest can measure what others have in memory";
        add("ksm", finding.to_owned(), "echo 2 | sudo tee /sys/kernel/mm/ksm/run");
    }
    // The first line is a heading.
    let swaps: Vec<_> =
        read("proc/swaps").lines().skip(1).filter_map(|line| Some(line.split(' ').next()?.to_owned())).collect();
    if !swaps.is_empty() {
        let finding = format!("guests' memory can be written to {}, where it stays after the build", swaps.join(", "));
        add("swap", finding, "sudo swapoff --all, and remove swap from /etc/fstab");
    }
    if read("sys/devices/system/cpu/smt/active") == "1" && !core_scheduling {
        let finding = "two machines can run on the threads of one core (SMT) and measure each other";
        add(
            "smt",
            finding.to_owned(),
            "echo off | sudo tee /sys/devices/system/cpu/smt/control, or use cloud-hypervisor 52 or later",
        );
    }
    let vulnerable = vulnerabilities(&root.join("sys/devices/system/cpu/vulnerabilities"));
    if !vulnerable.is_empty() {
        let finding = format!("the processor's defects aren't all mitigated: {}", vulnerable.join(", "));
        add("mitigations", finding, "install current microcode and kernel, and boot without mitigations=off");
    }
    if read("proc/sys/kernel/yama/ptrace_scope") == "0" {
        let finding = "a process can read the memory of every other process of its user (yama)";
        add("yama", finding.to_owned(), "sudo sysctl kernel.yama.ptrace_scope=1");
    }
    if read("proc/sys/vm/overcommit_memory") == "1" {
        let finding = "the kernel promises any amount of memory, and kills a process when it can't keep that";
        add("overcommit", finding.to_owned(), "sudo sysctl vm.overcommit_memory=0");
    }
    let mode = fs::metadata(root.join("dev/kvm")).map_or(0, |kvm| kvm.permissions().mode() & 0o777);
    if mode & 0o006 != 0 {
        let finding = format!("every user can run machines: /dev/kvm has mode {mode:o}");
        add("kvm_mode", finding, "sudo chmod 660 /dev/kvm, and keep it so with a rule for udev");
    }
    found
}

/// Names of the processor's defects that the kernel calls vulnerable.
fn vulnerabilities(directory: &Path) -> Vec<String> {
    let files = fs::read_dir(directory).into_iter().flatten().flatten();
    let vulnerable =
        files.filter(|file| fs::read_to_string(file.path()).is_ok_and(|text| text.starts_with("Vulnerable")));
    let mut names: Vec<_> = vulnerable.map(|file| file.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;

    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(path, Permissions::from_mode(0o666)).unwrap();
        }
        root
    }

    #[test]
    fn each_weakness_is_found_and_has_a_fix() {
        let host = host(&[
            ("sys/kernel/mm/ksm/run", "1\n"),
            ("proc/swaps", "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n"),
            ("sys/devices/system/cpu/smt/active", "1\n"),
            ("sys/devices/system/cpu/vulnerabilities/mds", "Vulnerable: Clear CPU buffers attempted, no microcode\n"),
            ("sys/devices/system/cpu/vulnerabilities/meltdown", "Not affected\n"),
            ("proc/sys/kernel/yama/ptrace_scope", "0\n"),
            ("proc/sys/vm/overcommit_memory", "1\n"),
            ("dev/kvm", ""),
        ]);
        let found = below(host.path(), false);
        assert_eq!(found.iter().map(|one| one.name).collect::<Vec<_>>(), NAMES);
        assert!(found.iter().all(|one| !one.finding.is_empty() && !one.fix.is_empty()));
        assert!(found[1].finding.contains("/dev/sda2") && found[3].finding.ends_with(": mds"), "{found:#?}");
        let with_core_scheduling = below(host.path(), true);
        assert!(with_core_scheduling.iter().all(|one| one.name != "smt"));
    }

    #[test]
    fn a_hardened_host_and_one_that_tells_nothing_have_none() {
        let hardened = host(&[
            ("sys/kernel/mm/ksm/run", "0\n"),
            ("proc/swaps", "Filename Type Size Used Priority\n"),
            ("sys/devices/system/cpu/smt/active", "0\n"),
            ("sys/devices/system/cpu/vulnerabilities/mds", "Mitigation: Clear CPU buffers; SMT disabled\n"),
            ("proc/sys/kernel/yama/ptrace_scope", "1\n"),
            ("proc/sys/vm/overcommit_memory", "0\n"),
        ]);
        assert_eq!(below(hardened.path(), false), []);
        assert_eq!(below(host(&[]).path(), false), []);
    }
}

//! Whether KVM works on this host.
//!
//! It works when `/dev/kvm` opens, here and in a helper process, a VM can be created, and `/proc/cpuinfo` names `vmx` or `svm`.
//!
//! The last rule can't be replaced by a trial guest. Some hosts without hardware virtualisation have a `/dev/kvm` that runs a
//! few instructions correctly, yet an ordinary kernel spins in it for ever. The rule rejects no working host: Linux's modules
//! for Intel and AMD don't load without the flag.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use thiserror::Error;

use crate::machine::jail::Best;

const DEVICE: &str = "/dev/kvm";

nix::ioctl_write_int_bad!(
    /// `KVM_CREATE_VM`; the argument is the type, 0 the ordinary one. Returns a descriptor.
    kvm_create_vm,
    nix::request_code_none!(0xAE, 0x01)
);

/// Why KVM doesn't work here.
#[derive(Debug, Error)]
pub enum KvmError {
    /// There is no device.
    #[error("/dev/kvm does not exist")]
    Absent,
    /// This user may not open the device.
    #[error("this user may not open /dev/kvm")]
    Denied,
    /// This user may open the device, but its helper processes may not, of which one runs the VM.
    #[error("this user may open /dev/kvm, but its helper processes, which have a user id of their own, may not")]
    Helpers(#[source] io::Error),
    /// The device doesn't open.
    #[error("/dev/kvm does not open")]
    Open(#[source] io::Error),
    /// The device opens, but can't create a VM.
    #[error("/dev/kvm opens, but cannot create a VM")]
    Create(#[source] io::Error),
    /// The device creates VMs, but they can't run an ordinary kernel.
    #[error("/dev/kvm opens, but /proc/cpuinfo names neither vmx nor svm, so no ordinary kernel can run in it")]
    NoFlag,
}

impl KvmError {
    /// How to fix it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Absent => {
                "load it with: sudo modprobe -a kvm_intel kvm_amd; if that fails, enable virtualisation in the \
                 firmware, or nested virtualisation in the hypervisor below this host"
            }
            Self::Denied => "sudo usermod -aG kvm $USER, then log in again",
            Self::Helpers(_) => {
                "let a group have the device, and this user in it: sudo chgrp kvm /dev/kvm; sudo chmod 660 /dev/kvm; sudo \
                 usermod -aG kvm $USER, then log in again"
            }
            Self::Open(_) => "see the kernel's log: sudo dmesg | grep -i kvm",
            Self::Create(_) => {
                "stop other hypervisors on this host, and see the kernel's log: sudo dmesg | grep -i kvm"
            }
            Self::NoFlag => "enable nested virtualisation in the hypervisor below this host, or use another host",
        }
    }
}

/// Checks that KVM works, which takes some milliseconds.
pub(super) fn check() -> Result<(), KvmError> {
    let device = File::options().read(true).write(true).open(DEVICE).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => KvmError::Absent,
        io::ErrorKind::PermissionDenied => KvmError::Denied,
        _ => KvmError::Open(error),
    })?;
    // SAFETY: takes an integer and returns a descriptor; no memory is involved.
    let vm = unsafe { kvm_create_vm(device.as_raw_fd(), 0) }.map_err(|errno| KvmError::Create(errno.into()))?;
    // SAFETY: the kernel has just made this descriptor for us.
    drop(unsafe { OwnedFd::from_raw_fd(vm) });
    // An unreadable file names no flag either.
    if !names_flag(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()) {
        return Err(KvmError::NoFlag);
    }
    // A helper keeps this user's groups. It lacks what the device grants to this user alone, as its owner or by an ACL.
    Best::of_this_host().opens(DEVICE.as_ref()).map_err(KvmError::Helpers)
}

/// Whether guests can run VMs themselves, by the `nested` parameter of KVM's module.
pub fn nests() -> bool {
    ["kvm_intel", "kvm_amd"].iter().any(|module| {
        let nested = fs::read_to_string(format!("/sys/module/{module}/parameters/nested"));
        nested.is_ok_and(|nested| matches!(nested.trim(), "Y" | "1"))
    })
}

fn names_flag(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| key.trim_end() == "flags")
        .any(|(_, flags)| flags.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_flags_count() {
        assert!(names_flag("model name\t: x\nflags\t\t: fpu vmx sse\n"));
        assert!(names_flag("flags\t\t: fpu svm"));
        assert!(!names_flag("flags\t\t: fpu svm_lock avmx\nvmx flags\t: vnmi\nmodel name\t: svm vmx\n"));
        assert!(!names_flag(""));
    }

    #[test]
    fn the_answer_agrees_with_the_host() {
        let answer = check();
        if !std::path::Path::new(DEVICE).exists() {
            assert!(matches!(answer, Err(KvmError::Absent)));
        } else if !names_flag(&fs::read_to_string("/proc/cpuinfo").unwrap()) {
            assert!(answer.is_err());
        }
    }
}

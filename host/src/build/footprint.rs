//! How much of the host's memory one build takes. `docs/cost.md` has the measurements behind the figures.
//!
//! ```text
//!   promised ──▶ machine = promised + what the guest's kernel keeps ──▶ footprint = machine + page tables + VMM + vsock's
//!                                                                        device + other devices + host process + directories
//! ```

use crate::{
    limits::Limits,
    machine::vmm::{Accelerator, Choice, Kind, TCG_CODE_MIB},
    outputs,
};

const MIB: u64 = 1 << 20;

/// Memory that the guest's kernel and guest-init keep from a build, in bytes, beside a share of the whole. Debian's
/// 6.1 kernel keeps, with two CPUs, 96 MiB of 360, 191 MiB of 1152 and 372 MiB of 4320; six more CPUs cost 14 MiB.
const GUEST_BYTES: u64 = 160 * MIB;

/// The kernel's page structures take 64 bytes of each 4096, its tables and its zones' reserves the rest.
const GUEST_SHARE: u64 = 16;

/// Page tables take 1/512 of the memory that they map, in each process that maps it, and once more in KVM: the VMM, the
/// vsock device, the other devices.
const PAGE_TABLE_SHARE: u64 = 64;

/// The device of the inputs, and that of the host's paths, which not every machine has.
const DEVICES: u64 = 2;

/// The process that opens files for the device of the host's paths.
pub(super) const OPENER_BYTES: u64 = 8 * MIB;

/// Buffers of one connection of a build's, in bytes.
const CONNECTION_BYTES: u64 = 512 * 1024;

/// A device's process, without directories.
const DEVICE_BYTES: u64 = 32 * MIB;

/// vhost-device-vsock.
const VSOCK_DEVICE_BYTES: u64 = 8 * MIB;

/// What the host process has for one build: its session, its log, the contents of the output that comes in, and the
/// directories of all outputs.
const SESSION_BYTES: u64 = 16 * MIB + outputs::MAX_DIRECTORY_MEMORY_BYTES;

/// QEMU, without the guest's memory and without the code that TCG makes.
const QEMU_BYTES: u64 = 64 * MIB;

/// Beside that, TCG's tables for each CPU.
const TCG_CPU_BYTES: u64 = 32 * MIB;

/// cloud-hypervisor, without the guest's memory.
const CLOUD_HYPERVISOR_BYTES: u64 = 64 * MIB;

/// The memory of the machine of a build that is promised so much, in bytes.
pub(crate) const fn machine_bytes(promised: u64) -> u64 {
    promised.saturating_add(promised / GUEST_SHARE).saturating_add(GUEST_BYTES)
}

/// What the network of a build with so many connections takes, in bytes.
pub(super) fn network_bytes(connections: u32) -> u64 {
    DEVICE_BYTES + u64::from(connections) * CONNECTION_BYTES
}

/// What a build takes beside its machine's memory, which depends on the VMM.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Footprint {
    vmm_bytes: u64,
    cpu_bytes: u64,
}

impl Footprint {
    /// Of builds under this VMM.
    pub(crate) fn of(vmm: &Choice) -> Self {
        let (vmm_bytes, cpu_bytes) = match (vmm.kind, vmm.accelerator) {
            (Kind::CloudHypervisor, _) => (CLOUD_HYPERVISOR_BYTES, 0),
            (Kind::Qemu, Accelerator::Kvm) => (QEMU_BYTES + VSOCK_DEVICE_BYTES, 0),
            (Kind::Qemu, Accelerator::Tcg) => (QEMU_BYTES + VSOCK_DEVICE_BYTES + TCG_CODE_MIB * MIB, TCG_CPU_BYTES),
        };
        Self { vmm_bytes, cpu_bytes }
    }

    /// Of builds under the VMM that takes the least.
    pub(crate) fn smallest() -> Self {
        Self { vmm_bytes: CLOUD_HYPERVISOR_BYTES, cpu_bytes: 0 }
    }

    /// Most memory of the host that a build with these limits takes, in bytes.
    pub(crate) fn bytes(self, limits: &Limits) -> u64 {
        let machine = machine_bytes(limits.memory_bytes);
        machine.saturating_add(machine / PAGE_TABLE_SHARE).saturating_add(self.fixed(limits))
    }

    /// The part of it that the processes of the machine take, in bytes.
    pub(crate) fn helpers_bytes(self, limits: &Limits) -> u64 {
        self.bytes(limits) - SESSION_BYTES
    }

    /// Most memory that a build can be promised for [`bytes`](Self::bytes) to be no more than this; 0 if there is none.
    pub(crate) fn largest_memory(self, limits: &Limits, bytes: u64) -> u64 {
        let machine = bytes.saturating_sub(self.fixed(limits));
        let machine = machine - machine.div_ceil(PAGE_TABLE_SHARE + 1);
        let promised = machine.saturating_sub(GUEST_BYTES);
        promised - promised.div_ceil(GUEST_SHARE + 1)
    }

    /// What doesn't depend on the machine's memory.
    fn fixed(self, limits: &Limits) -> u64 {
        let cpus = self.cpu_bytes * u64::from(limits.cpus);
        let helpers = self.vmm_bytes + cpus + DEVICES * DEVICE_BYTES + SESSION_BYTES;
        helpers.saturating_add(limits.inputs_memory_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TCG: Footprint = Footprint { vmm_bytes: 300 * MIB, cpu_bytes: 32 * MIB };

    #[test]
    fn a_footprint_is_more_than_the_machine_and_grows_with_each_limit() {
        let limits = Limits { inputs_memory_bytes: 64 * MIB, ..Limits::default() };
        let machine = machine_bytes(limits.memory_bytes);
        assert!(machine > limits.memory_bytes + GUEST_BYTES);
        let bytes = TCG.bytes(&limits);
        assert!(bytes > machine + 64 * MIB + 300 * MIB + 64 * MIB, "{bytes}");
        assert!(bytes > Footprint::smallest().bytes(&limits));
        assert_eq!(TCG.bytes(&Limits { cpus: limits.cpus + 1, ..limits }), bytes + 32 * MIB);
        assert_eq!(TCG.bytes(&Limits { inputs_memory_bytes: 65 * MIB, ..limits }), bytes + MIB);
        assert!(TCG.bytes(&Limits { memory_bytes: u64::MAX, ..limits }) == u64::MAX);
    }

    proptest! {
        #[test]
        fn the_largest_memory_fits_and_little_more_does_not(bytes in 1_u64 << 30..1 << 50, inputs in 0_u64..1 << 32) {
            let limits = Limits { inputs_memory_bytes: inputs, ..Limits::default() };
            let memory_bytes = TCG.largest_memory(&limits, bytes);
            if memory_bytes > 0 {
                let largest = Limits { memory_bytes, ..limits };
                prop_assert!(TCG.bytes(&largest) <= bytes);
                let more = Limits { memory_bytes: memory_bytes + 64, ..limits };
                prop_assert!(TCG.bytes(&more) > bytes);
            }
        }
    }
}

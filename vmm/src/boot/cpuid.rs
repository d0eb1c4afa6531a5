//! CPUID: what the host's KVM supports, with this machine's topology.
//!
//! One socket, one thread to a core, APIC ids 0 to n-1. What a guest saw at boot it keeps for its
//! life: a successor gets these very entries from its predecessor.

mod withheld;

use std::arch::x86_64::__cpuid;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use stillpoint_state::StateError;

use crate::raw;
pub use withheld::has_counters;

const HYPERVISOR_BASE: u32 = 0x4000_0000;
/// TSC and APIC bus frequency in kHz, as other hypervisors give them too.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// KVM's APIC bus runs at 1 GHz unless KVM_CAP_X86_APIC_BUS_CYCLES_NS changed it.
const APIC_BUS_KHZ: u32 = 1_000_000;
/// EBX of leaf 0, "Auth" and "Hygo": processors whose kernels go by AMD's way to count cores.
const AMD_WAY: [u32; 2] = [0x6874_7541, 0x6f67_7948];

/// Entries for all vCPUs; [`for_vcpu`] makes them one's own.
pub fn host(
    kvm: &Kvm,
    vcpus: u8,
    tsc_khz: u32,
) -> Result<Vec<kvm_cpuid_entry2>, kvm_ioctls::Error> {
    let supported = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;
    let mut entries = supported.as_slice().to_vec();
    let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
    let count = u32::from(vcpus);
    // Leaves that this file writes whole.
    entries.retain(|e| !matches!(e.function, 0xb | 0x1f | HYPERVISOR_TIMING));
    withheld::take_away(&mut entries);
    let amd_way = entries
        .iter()
        .any(|e| e.function == 0 && AMD_WAY.contains(&e.ebx));
    for entry in &mut entries {
        topology(entry, count, deadline_timer, amd_way);
        if matches!(entry.function, 0x8000_0002..=0x8000_0004) {
            brand(entry);
        }
    }
    entries.extend(extended_topology(count));
    entries.push(kvm_cpuid_entry2 {
        function: HYPERVISOR_TIMING,
        eax: tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..Default::default()
    });
    if let Some(base) = entries.iter_mut().find(|e| e.function == HYPERVISOR_BASE) {
        base.eax = base.eax.max(HYPERVISOR_TIMING);
    }
    if let Some(top) = entries.iter_mut().find(|e| e.function == 0) {
        top.eax = top.eax.max(0xb);
    }
    Ok(entries)
}

/// The processor's name, which KVM leaves empty.
fn brand(entry: &mut kvm_cpuid_entry2) {
    let host = __cpuid(entry.function);
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (host.eax, host.ebx, host.ecx, host.edx);
}

fn topology(entry: &mut kvm_cpuid_entry2, count: u32, deadline_timer: bool, amd_way: bool) {
    let several = count > 1;
    match entry.function {
        0x1 => {
            let logical = count.next_power_of_two().min(128);
            entry.ebx = entry.ebx & 0x0000_ffff | logical << 16;
            entry.ecx |= 1 << 31; // runs under a hypervisor
            set_bit(&mut entry.ecx, 24, deadline_timer);
            set_bit(&mut entry.edx, 28, several); // HTT: more than one logical processor
        }
        // Caches: L1 and L2 belong to a core, the last level to the socket.
        0x4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | (count - 1).min(63) << 26;
        }
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        // CMP_LEGACY: HTT means cores, not threads. Elsewhere it would hide them.
        0x8000_0001 => set_bit(&mut entry.ecx, 1, several && amd_way),
        0x8000_0008 if amd_way => {
            let bits = count.next_power_of_two().trailing_zeros();
            entry.ecx = entry.ecx & !0xffff | bits << 12 | (count - 1);
        }
        // Threads to a core: one; nodes: one.
        0x8000_001e => (entry.ebx, entry.ecx) = (0, 0),
        _ => {}
    }
}

fn set_bit(word: &mut u32, bit: u32, on: bool) {
    *word = *word & !(1 << bit) | u32::from(on) << bit;
}

/// Leaf 0xb: SMT level of one thread, core level of all.
fn extended_topology(count: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, logical: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: logical,
        ecx: kind << 8 | index,
        ..Default::default()
    };
    let shift = count.next_power_of_two().trailing_zeros();
    [
        level(0, 0, 1, 1),
        level(1, shift, count, 2),
        level(2, 0, 0, 0),
    ]
}

/// The entries of the vCPU with this APIC id.
pub fn for_vcpu(entries: &[kvm_cpuid_entry2], apic_id: u8) -> Option<CpuId> {
    let id = u32::from(apic_id);
    let mut own = CpuId::from_entries(entries).ok()?;
    for entry in own.as_mut_slice() {
        match entry.function {
            0x1 => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
            0xb | 0x1f => entry.edx = id,
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = entry.ebx & !0xff | id;
            }
            _ => {}
        }
    }
    Some(own)
}

/// The entries as bytes, to be handed to a successor.
pub fn to_bytes(entries: &[kvm_cpuid_entry2]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|entry| raw::bytes_of(entry).to_vec())
        .collect()
}

/// And back.
pub fn from_bytes(bytes: &[u8]) -> Result<Vec<kvm_cpuid_entry2>, StateError> {
    let chunks = bytes.chunks(size_of::<kvm_cpuid_entry2>());
    chunks
        .map(|chunk| raw::from_bytes("cpuid", chunk))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            ..Default::default()
        }
    }

    #[test]
    fn each_vcpu_sees_its_own_id_and_all_the_same_count() {
        for count in [1, 2, 3, 8] {
            let mut one = leaf(1);
            topology(&mut one, count, true, true);
            assert_eq!(one.ebx >> 16 & 0xff, count.next_power_of_two());
            assert_eq!(one.edx >> 28 & 1, u32::from(count > 1));
            assert_eq!(one.ecx >> 24 & 1, 1, "TSC deadline");
            let entries = [one]
                .into_iter()
                .chain(extended_topology(count))
                .collect::<Vec<_>>();
            for id in 0..u8::try_from(count).expect("small") {
                let own = for_vcpu(&entries, id).expect("entries");
                assert_eq!(own.as_slice()[0].ebx >> 24, u32::from(id));
                assert_eq!(own.as_slice()[1].edx, u32::from(id));
                assert_eq!(own.as_slice()[2].ebx, count);
            }
        }
    }

    #[test]
    fn cores_are_counted_amds_way_on_amd_alone() {
        for amd_way in [true, false] {
            let (mut features, mut sizes) = (leaf(0x8000_0001), leaf(0x8000_0008));
            topology(&mut features, 4, true, amd_way);
            topology(&mut sizes, 4, true, amd_way);
            assert_eq!(features.ecx >> 1 & 1, u32::from(amd_way));
            assert_eq!(sizes.ecx, if amd_way { 2 << 12 | 3 } else { 0 });
        }
    }

    #[test]
    fn bytes_there_and_back() {
        let entries = vec![leaf(1), leaf(0xb)];
        assert_eq!(from_bytes(&to_bytes(&entries)).expect("bytes"), entries);
        from_bytes(&to_bytes(&entries)[1..]).expect_err("cut off");
    }
}

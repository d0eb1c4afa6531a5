//! What the host's KVM could give a guest and we don't.
//!
//! Two reasons: state that the saved form has no place for, so that a swap would lose it (nested
//! guests, shadow stacks, FRED, tiles), and features that need something of the VMM which ours
//! does not do (enclave memory, encrypted guests). Performance counters are withheld because
//! loading them makes KVM build perf events in the midst of a blackout, and because a stock kernel
//! puts one to use at once, for its lockup detector.
//!
//! A guest keeps the CPUID of its boot for its life, whatever a later release withholds.

use kvm_bindings::kvm_cpuid_entry2;

/// A bit of a leaf. Sources: SDM vol. 2A, "CPUID"; APM vol. 3, appendix E.
struct Feature {
    leaf: u32,
    index: u32,
    register: Register,
    bit: u32,
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

const fn bit(leaf: u32, index: u32, register: Register, bit: u32) -> Feature {
    Feature {
        leaf,
        index,
        register,
        bit,
    }
}

/// Counters of performance events.
const COUNTERS: [Feature; 8] = [
    bit(0x1, 0, Register::Ecx, 2),          // DTES64
    bit(0x1, 0, Register::Ecx, 15),         // PDCM: PEBS, last branch records
    bit(0x1, 0, Register::Edx, 21),         // DS
    bit(0x7, 1, Register::Eax, 8),          // ArchPerfmonExt
    bit(0x8000_0001, 0, Register::Ecx, 23), // PerfCtrExtCore
    bit(0x8000_0001, 0, Register::Ecx, 24), // PerfCtrExtNB
    bit(0x8000_0001, 0, Register::Ecx, 28), // PerfCtrExtLLC
    bit(0x8000_0022, 0, Register::Eax, 0),  // PerfMonV2
];

const OTHERS: [Feature; 7] = [
    bit(0x1, 0, Register::Ecx, 5),         // VMX
    bit(0x7, 0, Register::Ebx, 2),         // SGX
    bit(0x7, 0, Register::Ecx, 7),         // CET_SS: the stack pointer is in no MSR of KVM's list
    bit(0x7, 0, Register::Ecx, 30),        // SGX_LC
    bit(0x7, 0, Register::Edx, 1),         // SGX-KEYS
    bit(0x7, 1, Register::Eax, 17),        // FRED
    bit(0x8000_0001, 0, Register::Ecx, 2), // SVM
];

/// Matrix tiles. A process must ask the kernel for them before KVM lets a guest have their state
/// (XTILECFG and XTILEDATA of leaf 0xd), but KVM tells of the instructions all the same.
const TILES: [Feature; 5] = [
    bit(0x7, 0, Register::Edx, 22), // AMX-BF16
    bit(0x7, 0, Register::Edx, 24), // AMX-TILE
    bit(0x7, 0, Register::Edx, 25), // AMX-INT8
    bit(0x7, 1, Register::Eax, 21), // AMX-FP16
    bit(0x7, 1, Register::Edx, 8),  // AMX-COMPLEX
];
const TILE_STATE: u32 = 3 << 17;

/// Leaves that only describe what is withheld: performance counters (0xa, 0x23, 0x80000022),
/// enclaves (0x12), SVM (0x8000000a), encrypted memory (0x8000001f; a kernel that finds SEV there
/// reads an MSR which faults in an ordinary guest).
const LEAVES: [u32; 6] = [0xa, 0x12, 0x23, 0x8000_000a, 0x8000_001f, 0x8000_0022];

/// Takes away what is not for the guest.
pub(super) fn take_away(entries: &mut [kvm_cpuid_entry2]) {
    let has_tiles = entries
        .iter()
        .any(|e| (e.function, e.index) == (0xd, 0) && e.eax & TILE_STATE == TILE_STATE);
    for entry in entries {
        let tiles: &[Feature] = if has_tiles { &[] } else { &TILES };
        for feature in COUNTERS.iter().chain(&OTHERS).chain(tiles) {
            clear(entry, feature);
        }
        if LEAVES.contains(&entry.function) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
    }
}

/// Whether a guest with this CPUID has performance counters: one booted by a release that did not
/// withhold them.
pub fn has_counters(entries: &[kvm_cpuid_entry2]) -> bool {
    entries.iter().any(|entry| {
        let architectural = entry.function == 0xa && entry.eax & 0xff != 0;
        architectural || COUNTERS.iter().any(|feature| has(entry, feature))
    })
}

fn register(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut entry.eax,
        Register::Ebx => &mut entry.ebx,
        Register::Ecx => &mut entry.ecx,
        Register::Edx => &mut entry.edx,
    }
}

fn is_of(entry: &kvm_cpuid_entry2, feature: &Feature) -> bool {
    (entry.function, entry.index) == (feature.leaf, feature.index)
}

fn clear(entry: &mut kvm_cpuid_entry2, feature: &Feature) {
    if is_of(entry, feature) {
        *register(entry, feature.register) &= !(1 << feature.bit);
    }
}

fn has(entry: &kvm_cpuid_entry2, feature: &Feature) -> bool {
    let mut entry = *entry;
    is_of(&entry, feature) && *register(&mut entry, feature.register) >> feature.bit & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn host() -> Vec<kvm_cpuid_entry2> {
        let leaves = [
            (0x1, 0),
            (0x7, 0),
            (0x7, 1),
            (0xa, 0),
            (0xd, 0),
            (0xd, 1),
            (0x8000_0001, 0),
            (0x8000_000a, 0),
            (0x8000_001f, 0),
        ];
        leaves.map(|(leaf, index)| full(leaf, index)).to_vec()
    }

    #[test]
    fn no_nesting_no_counters_and_the_rest_stays() {
        let mut entries = host();
        assert!(has_counters(&entries));
        take_away(&mut entries);
        assert!(!has_counters(&entries));
        let leaf = |function, index| {
            let found = entries
                .iter()
                .find(|e| (e.function, e.index) == (function, index));
            *found.expect("leaf")
        };
        assert_eq!(leaf(1, 0).ecx, !(1 << 2 | 1 << 5 | 1 << 15));
        assert_eq!(leaf(1, 0).edx, !(1 << 21));
        assert_eq!(leaf(7, 0).ebx, !(1 << 2));
        assert_eq!(leaf(7, 0).ecx, !(1 << 7 | 1 << 30));
        assert_eq!(leaf(7, 0).edx, !(1 << 1), "this host gives tiles");
        assert_eq!(
            leaf(0x8000_0001, 0).ecx,
            !(1 << 2 | 1 << 23 | 1 << 24 | 1 << 28)
        );
        assert_eq!(leaf(0x8000_000a, 0).edx, 0);
        assert_eq!(leaf(0x8000_001f, 0).eax, 0);
        assert_eq!(leaf(0xd, 1), full(0xd, 1));
    }

    #[test]
    fn tiles_go_where_their_state_is_not_to_be_had() {
        let mut entries = host();
        let state = entries.iter_mut().find(|e| e.function == 0xd);
        state.expect("leaf 0xd").eax = 7;
        take_away(&mut entries);
        let leaf = entries.iter().find(|e| (e.function, e.index) == (7, 0));
        let edx = leaf.expect("leaf 7").edx;
        assert_eq!(edx & (1 << 22 | 1 << 24 | 1 << 25), 0);
        assert_eq!(edx >> 23 & 1, 1);
    }
}

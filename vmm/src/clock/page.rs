//! A vCPU's pvclock page: the clock as the guest itself computes it.

use vm_memory::{Bytes, GuestAddress};

use super::Scale;
use crate::memory::Memory;

/// Flag of a page: what one vCPU reads, every other does too (KVM's masterclock is on).
pub const TSC_STABLE: u8 = 1 << 0;
/// Flag of a page: the guest stood still. The guest takes it back when it has seen it.
pub const GUEST_STOPPED: u8 = 1 << 1;

/// A vCPU's `pvclock_vcpu_time_info` (Documentation/virt/kvm/x86/msr.rst), as the guest reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Even when at rest; KVM raises it by two with each update.
    pub version: u32,
    tsc_timestamp: u64,
    system_time: u64,
    scale: Scale,
    /// [`TSC_STABLE`], [`GUEST_STOPPED`].
    pub flags: u8,
}

impl Page {
    /// Reads it from guest RAM; `None` while KVM writes it, or outside RAM.
    pub fn read(memory: &Memory, at: GuestAddress) -> Option<Self> {
        let bytes: [u8; 32] = memory.read_obj(at).ok()?;
        let word = |at: usize| {
            bytes[at..]
                .first_chunk()
                .copied()
                .map(u64::from_le_bytes)
                .unwrap_or_default()
        };
        let half = |at: usize| {
            bytes[at..]
                .first_chunk()
                .copied()
                .map(u32::from_le_bytes)
                .unwrap_or_default()
        };
        let page = Self {
            version: half(0),
            tsc_timestamp: word(8),
            system_time: word(16),
            scale: Scale {
                mul: half(24),
                shift: i8::from_le_bytes([bytes[28]]),
            },
            flags: bytes[29],
        };
        let sane = page.version & 1 == 0 && page.scale.shift.unsigned_abs() < 64;
        (sane && memory.read_obj::<u32>(at).ok() == Some(page.version)).then_some(page)
    }

    /// The clock this page gives at a guest TSC, ns.
    pub fn at(&self, guest_tsc: u64) -> u64 {
        let passed = self.scale.ns_between(self.tsc_timestamp, guest_tsc);
        self.system_time.saturating_add_signed(passed)
    }

    /// How much later this page's clock is than `before`'s at one guest TSC, ns.
    pub fn error_to(&self, before: &Self, guest_tsc: u64) -> i64 {
        self.at(guest_tsc)
            .wrapping_sub(before.at(guest_tsc))
            .cast_signed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page_in(memory: &Memory, version: u32, system_time: u64) {
        let mut bytes = [0u8; 32];
        bytes[..4].copy_from_slice(&version.to_le_bytes());
        bytes[8..16].copy_from_slice(&1_000u64.to_le_bytes());
        bytes[16..24].copy_from_slice(&system_time.to_le_bytes());
        let Scale { mul, shift } = Scale::of_khz(2_000_000);
        bytes[24..28].copy_from_slice(&mul.to_le_bytes());
        bytes[28] = shift.to_le_bytes()[0];
        memory.write_obj(bytes, GuestAddress(64)).expect("write");
    }

    #[test]
    fn pages_are_compared_at_one_tsc() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 4096)]).expect("memory");
        page_in(&memory, 2, 500);
        let before = Page::read(&memory, GuestAddress(64)).expect("page");
        assert!(before.at(3_000).abs_diff(1_500) <= 1);
        page_in(&memory, 4, 507);
        let after = Page::read(&memory, GuestAddress(64)).expect("page");
        assert_eq!(after.error_to(&before, 9_000), 7);
        page_in(&memory, 5, 507);
        assert_eq!(Page::read(&memory, GuestAddress(64)), None, "being written");
        assert_eq!(Page::read(&memory, GuestAddress(4090)), None, "outside RAM");
    }
}

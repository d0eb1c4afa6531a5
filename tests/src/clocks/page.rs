//! A vCPU's pvclock page (Documentation/virt/kvm/x86/msr.rst, `pvclock_vcpu_time_info`).

use crate::guest::Pulse;
use crate::patience::{PATIENCE, wait_for};

/// Every vCPU reads the same.
const STABLE: u8 = 1 << 0;
/// The guest stood still.
const STOPPED: u8 = 1 << 1;
/// Offset of the flags.
const FLAGS: u64 = 29;

/// The clock of a vCPU: nanoseconds at each TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    version: u32,
    tsc: u64,
    ns: u64,
    mul: u32,
    shift: i8,
    flags: u8,
}

impl Page {
    /// Reads it when KVM is not writing it.
    pub fn read(pulse: &Pulse, at: u64) -> anyhow::Result<Self> {
        wait_for("a pvclock page at rest", PATIENCE, || {
            let bytes: [u8; 32] = pulse.physical(at)?;
            let again: [u8; 32] = pulse.physical(at)?;
            let page = Self::of(&bytes);
            Ok((bytes == again && page.version & 1 == 0 && page.mul != 0).then_some(page))
        })
    }

    fn of(bytes: &[u8; 32]) -> Self {
        let half = |at: usize| {
            let word = bytes[at..].first_chunk().copied();
            u32::from_le_bytes(word.unwrap_or_default())
        };
        let word = |at: usize| u64::from(half(at)) | u64::from(half(at + 4)) << 32;
        Self {
            version: half(0),
            tsc: word(8),
            ns: word(16),
            mul: half(24),
            shift: i8::from_le_bytes([bytes[28]]),
            flags: bytes[29],
        }
    }

    /// Whether every vCPU reads the same.
    pub fn is_stable(&self) -> bool {
        self.flags & STABLE != 0
    }

    /// Whether the guest is told that it stood still.
    pub fn was_stopped(&self) -> bool {
        self.flags & STOPPED != 0
    }

    /// TSC from which it counts.
    pub fn tsc(&self) -> u64 {
        self.tsc
    }

    /// The clock at a TSC, ns.
    pub fn at(&self, tsc: u64) -> i128 {
        let passed = i128::from(tsc) - i128::from(self.tsc);
        let shifted = match self.shift {
            0.. => passed << self.shift,
            _ => passed >> -self.shift,
        };
        i128::from(self.ns) + ((shifted * i128::from(self.mul)) >> 32)
    }

    /// Cycles in so many microseconds: the inverse of `at`.
    pub fn cycles(&self, us: u64) -> u64 {
        let shifted = ((u128::from(us) * 1000) << 32) / u128::from(self.mul.max(1));
        let cycles = match self.shift {
            0.. => shifted >> self.shift,
            _ => shifted << -self.shift,
        };
        u64::try_from(cycles).unwrap_or(u64::MAX)
    }

    /// How much later this clock is than another at one TSC, ns.
    pub fn error_to(&self, other: &Self) -> i64 {
        let tsc = self.tsc.max(other.tsc);
        i64::try_from(self.at(tsc) - other.at(tsc)).unwrap_or(i64::MAX)
    }
}

/// Takes back the word that the guest stood still, as its kernel does when it has seen it.
pub fn forget_stop(pulse: &Pulse, at: u64) -> anyhow::Result<()> {
    let [flags] = pulse.physical(at + FLAGS)?;
    pulse.poke(at + FLAGS, &[flags & !STOPPED])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_pages_are_compared_at_one_tsc() {
        // 2 GHz: half a nanosecond a cycle.
        let page = |tsc, ns| Page {
            version: 2,
            tsc,
            ns,
            mul: 1 << 31,
            shift: 0,
            flags: STABLE,
        };
        assert_eq!(page(1000, 500).at(3000), 1500);
        assert_eq!(page(3000, 1507).error_to(&page(1000, 500)), 7);
        assert_eq!(page(1000, 500).cycles(2), 4000);
        assert!(page(0, 0).is_stable() && !page(0, 0).was_stopped());
    }
}

//! KVM's wall clock structure in guest memory: the wall-clock time at which kvmclock was zero.
//!
//! Every write of its MSR has KVM compute it anew, from both clocks as they are then (x86.c,
//! `kvm_write_wall_clock`). What was there before is better: for clocks that included a pause it
//! is right as it is, and for clocks that left it out it is right when the pause is added.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::Memory;

const NS: u64 = 1_000_000_000;

/// `struct pvclock_wall_clock` (arch/x86/include/asm/pvclock-abi.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WallClock {
    version: u32,
    sec: u32,
    nsec: u32,
}

impl WallClock {
    /// Reads it; `None` outside RAM.
    pub fn read(memory: &Memory, at: GuestAddress) -> Option<Self> {
        let words: [u32; 3] = memory.read_obj(at).ok()?;
        let [version, sec, nsec] = words.map(u32::from_le);
        Some(Self { version, sec, nsec })
    }

    /// Writes it.
    pub fn write(&self, memory: &Memory, at: GuestAddress) -> Result<(), GuestMemoryError> {
        let words = [self.version, self.sec, self.nsec].map(u32::to_le);
        memory.write_obj(words, at)
    }

    /// Nanoseconds since 1970 at which kvmclock was zero; `None` for one that KVM has not written.
    pub fn epoch_ns(&self) -> Option<u64> {
        let ns = u64::from(self.sec) * NS + u64::from(self.nsec);
        (self.version != 0 && self.version & 1 == 0 && ns != 0).then_some(ns)
    }

    /// That of a kvmclock which left out `held_ns` more than this one's.
    pub fn after_hold(self, held_ns: u64) -> Self {
        if held_ns == 0 {
            return self;
        }
        let ns = u64::from(self.sec) * NS + u64::from(self.nsec) + held_ns;
        Self {
            // Seconds have 32 bits in the structure, until 2106.
            sec: (ns / NS) as u32,
            nsec: (ns % NS) as u32,
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back_to_the_byte() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 4096)]).expect("memory");
        let bytes: [u8; 12] = *b"\x04\0\0\0abcd\x01\x02\x03\x04";
        memory.write_obj(bytes, GuestAddress(100)).expect("write");
        let wall = WallClock::read(&memory, GuestAddress(100)).expect("in RAM");
        wall.after_hold(0)
            .write(&memory, GuestAddress(200))
            .expect("write");
        let again: [u8; 12] = memory.read_obj(GuestAddress(200)).expect("read");
        assert_eq!(again, bytes);
        assert_eq!(WallClock::read(&memory, GuestAddress(4090)), None);
    }

    #[test]
    fn a_pause_that_was_left_out_is_added() {
        let wall = WallClock {
            version: 2,
            sec: 100,
            nsec: 900_000_000,
        };
        let later = wall.after_hold(30_200_000_000);
        assert_eq!((later.sec, later.nsec), (131, 100_000_000));
        assert_eq!(wall.epoch_ns(), Some(100_900_000_000));
        let unwritten = WallClock { version: 0, ..wall };
        assert_eq!(unwritten.epoch_ns(), None);
    }
}

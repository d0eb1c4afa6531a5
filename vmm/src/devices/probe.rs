//! The probe: tells the host where the guest logs gaps in its TSC.
//!
//! Registers and table are documented in `stillpoint_guest_abi::probe`. The device reads guest
//! memory never by itself; [`gap_over`] does, after a swap, from the machine thread of the
//! process that owns the guest. Whatever the guest wrote there is taken as its own claim:
//! bounds are checked, and nothing in it is followed anywhere.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use stillpoint_guest_abi::probe as abi;
use stillpoint_state::contents::Contents;
use stillpoint_state::{Saved, StateError, Unclaimed, sections};
use vm_memory::{Bytes, GuestAddress};

use super::{Busy, Device};
use crate::memory::Memory;

#[derive(Clone, Copy, Debug, Default)]
struct Registers {
    scratch: u64,
    table: u64,
}

/// The probe device.
#[derive(Debug, Default)]
pub struct Probe {
    registers: Mutex<Registers>,
}

impl Probe {
    /// From saved state.
    pub fn restore(from: &mut Unclaimed) -> Result<Self, StateError> {
        let sections::Probe { scratch, table } = from.take("")?;
        Ok(Self {
            registers: Mutex::new(Registers { scratch, table }),
        })
    }

    fn registers(&self) -> std::sync::MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the guest keeps its table, if it does.
    pub fn table(&self) -> Option<GuestAddress> {
        Some(self.registers().table)
            .filter(|&table| table != 0)
            .map(GuestAddress)
    }
}

impl Device for Probe {
    fn name(&self) -> &str {
        "probe"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = *self.registers();
        let value = match (offset, data.len()) {
            (abi::REG_ID, 4) => u64::from(abi::DEVICE_ID),
            (abi::REG_VERSION, 4) => u64::from(abi::VERSION),
            (abi::REG_SCRATCH, 8) => registers.scratch,
            (abi::REG_TABLE, 8) => registers.table,
            _ => return,
        };
        let len = data.len();
        data.copy_from_slice(&value.to_le_bytes()[..len]);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u64::from_le_bytes) else {
            return;
        };
        match offset {
            abi::REG_SCRATCH => self.registers().scratch = value,
            abi::REG_TABLE => self.registers().table = value,
            _ => {}
        }
    }

    fn drain(&self, _deadline: Instant) -> Result<(), Busy> {
        Ok(())
    }

    fn freeze(&self, _deadline: Instant) -> Result<(), Busy> {
        Ok(())
    }

    fn resume(&self) {}

    fn announce(&self, to: &mut Contents) {
        to.announce(&sections::Probe::KIND, "");
    }

    fn save(&self, to: &mut Saved) -> Result<(), StateError> {
        let Registers { scratch, table } = *self.registers();
        to.put("", &sections::Probe { scratch, table })
    }
}

/// Bytes of a record that every guest keeps.
const ALWAYS: usize = std::mem::offset_of!(abi::Record, work);

/// The address of a vCPU's record, if the table is there and valid, and records are so long in it.
fn record(memory: &Memory, table: GuestAddress, vcpu: u8, bytes: usize) -> Option<u64> {
    let word = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).ok();
    let half = |at: u64| memory.read_obj::<u32>(GuestAddress(at)).ok();
    if word(table.0)? != abi::TABLE_MAGIC || half(table.0.checked_add(8)?)? != abi::VERSION {
        return None;
    }
    if u32::from(vcpu) >= half(table.0.checked_add(12)?)? {
        return None;
    }
    let (offset, stride) = (
        half(table.0.checked_add(16)?)?,
        half(table.0.checked_add(20)?)?,
    );
    if (stride as usize) < bytes {
        return None;
    }
    let from = u64::from(offset) + u64::from(stride) * u64::from(vcpu);
    table.0.checked_add(from)
}

/// The latest reading that `vcpu` logged: a heartbeat. `None` if the table is not there or not valid.
pub fn beat(memory: &Memory, table: GuestAddress, vcpu: u8) -> Option<u64> {
    let last = std::mem::offset_of!(abi::Record, last) as u64;
    let at = record(memory, table, vcpu, ALWAYS)?.checked_add(last)?;
    memory.read_obj(GuestAddress(at)).ok()
}

/// The pieces of work that all of `vcpus` have counted. `None` if the table is not there or not valid, or if none
/// counts.
pub fn work(memory: &Memory, table: GuestAddress, vcpus: u8) -> Option<u64> {
    let work = std::mem::offset_of!(abi::Record, work) as u64;
    let of = |vcpu| -> Option<u64> {
        let at = record(memory, table, vcpu, size_of::<abi::Record>())?.checked_add(work)?;
        memory.read_obj(GuestAddress(at)).ok()
    };
    let sum = (0..vcpus).try_fold(0_u64, |sum, vcpu| Some(sum.wrapping_add(of(vcpu)?)))?;
    (sum > 0).then_some(sum)
}

/// The longest gap logged by `vcpu` that overlaps `from..to` (guest TSC), in cycles. `None` if
/// the table is not there or not valid, or no such gap was logged.
pub fn gap_over(
    memory: &Memory,
    table: GuestAddress,
    vcpu: u8,
    window: std::ops::Range<u64>,
) -> Option<u64> {
    let word = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).ok();
    let record = record(memory, table, vcpu, ALWAYS)?;
    let count = word(record)?;
    let ring = record.checked_add(std::mem::offset_of!(abi::Record, ring) as u64)?;
    let kept = count.min(abi::RING as u64);
    (0..kept)
        .filter_map(|back| {
            let slot = (count - 1 - back) % abi::RING as u64;
            let entry = ring.checked_add(slot * 16)?;
            Some(word(entry)?..word(entry.checked_add(8)?)?)
        })
        .filter(|gap| gap.start < gap.end && gap.start < window.end && window.start < gap.end)
        .map(|gap| gap.end - gap.start)
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(probe: &Probe) -> Vec<u8> {
        let mut saved = Saved::default();
        probe.freeze(Instant::now()).expect("freeze");
        probe.save(&mut saved).expect("save");
        saved.finish(2, "", "", 0)
    }

    #[test]
    fn round_trip_and_every_field_counts() {
        let probe = Probe::default();
        let fresh = saved(&probe);
        probe.write(abi::REG_SCRATCH, &7u64.to_le_bytes());
        let scratch = saved(&probe);
        assert_ne!(fresh, scratch);
        probe.write(abi::REG_TABLE, &0x1000u64.to_le_bytes());
        let both = saved(&probe);
        assert_ne!(scratch, both);
        let again = Probe::restore(&mut Unclaimed::decode(&both).expect("decode")).expect("take");
        assert_eq!(saved(&again), both);
    }

    #[test]
    fn accesses_of_other_sizes_do_nothing() {
        let probe = Probe::default();
        probe.write(abi::REG_SCRATCH, &[1, 2]);
        let mut data = [0xff; 2];
        probe.read(abi::REG_SCRATCH, &mut data);
        assert_eq!(data, [0xff; 2]);
        assert_eq!(probe.table(), None);
    }

    fn guest_with_gaps(gaps: &[(u64, u64)]) -> Memory {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
        let put = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).expect("write");
        put(0x1000, abi::TABLE_MAGIC);
        put(0x1008, u64::from(abi::VERSION) | 1 << 32);
        put(0x1010, 4096 | 4096 << 32);
        put(0x2000, gaps.len() as u64);
        let ring = 0x2000 + std::mem::offset_of!(abi::Record, ring) as u64;
        for (n, (start, end)) in gaps.iter().enumerate() {
            let entry = ring + (n % abi::RING) as u64 * 16;
            put(entry, *start);
            put(entry + 8, *end);
        }
        memory
    }

    #[test]
    fn the_gap_that_overlaps_is_found() {
        let memory = guest_with_gaps(&[(10, 900), (1000, 1500), (1600, 1700), (3000, 9000)]);
        let table = GuestAddress(0x1000);
        assert_eq!(gap_over(&memory, table, 0, 1400..2000), Some(500));
        assert_eq!(gap_over(&memory, table, 0, 2000..2500), None);
        assert_eq!(
            gap_over(&memory, table, 1, 1400..2000),
            None,
            "a vCPU without a record"
        );
    }

    #[test]
    fn a_hostile_table_is_no_more_than_wrong() {
        let memory = guest_with_gaps(&[(5, 1)]);
        let table = GuestAddress(0x1000);
        assert_eq!(
            gap_over(&memory, table, 0, 0..u64::MAX),
            None,
            "a gap that ends before it began"
        );
        assert_eq!(gap_over(&memory, GuestAddress(u64::MAX - 3), 0, 0..9), None);
        memory
            .write_obj(u64::MAX, GuestAddress(0x1010))
            .expect("write");
        assert_eq!(
            gap_over(&memory, table, 0, 0..9),
            None,
            "records outside RAM"
        );
        memory
            .write_obj(u64::MAX, GuestAddress(0x2000))
            .expect("write");
        memory
            .write_obj(4096u64 | 4096 << 32, GuestAddress(0x1010))
            .expect("write");
        let _ = gap_over(&memory, table, 0, 0..9);
    }
}

//! Reads what pulse logs in guest memory.

use std::mem::offset_of;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stillpoint_guest_abi::probe::{Gap, Header, RECORD_STRIDE, RING, Record, TABLE_MAGIC};
use stillpoint_guest_abi::pulse::{GLOBALS_OFFSET, Globals};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PATIENCE: Duration = Duration::from_secs(5);
/// For the guest to touch its memory: some 5 s for each GiB.
const TOUCH_PATIENCE: Duration = Duration::from_secs(300);
/// A vCPU that has not read its TSC for so long idles.
const SURELY_LIVE: Duration = Duration::from_millis(100);
const LAST: u64 = offset_of!(Record, last) as u64;

/// The guest's table.
#[derive(Debug)]
pub(crate) struct Probe<'a> {
    memory: &'a GuestMemoryMmap,
    table: u64,
    tsc_khz: u64,
    /// Which vCPUs read their TSC now and then; those that idle do not.
    live: Vec<bool>,
}

impl<'a> Probe<'a> {
    /// Checks that there is a table.
    pub(crate) fn new(
        memory: &'a GuestMemoryMmap,
        table: u64,
        vcpus: u8,
        tsc_khz: u64,
    ) -> Result<Self> {
        let mut probe = Self {
            memory,
            table,
            tsc_khz,
            live: vec![true; vcpus.into()],
        };
        let magic = probe.word(table + offset_of!(Header, magic) as u64)?;
        ensure!(magic == TABLE_MAGIC, "no table at {table:#x}");
        let first = probe.heartbeats()?;
        sleep(SURELY_LIVE);
        let second = probe.heartbeats()?;
        probe.live = first
            .iter()
            .zip(&second)
            .map(|(first, second)| second > first)
            .collect();
        Ok(probe)
    }

    /// Waits until the guest has touched all the memory that its command line told it to.
    pub(crate) fn wait_touched(&self) -> Result<()> {
        let begin = Instant::now();
        let global = |field: usize| self.word(self.table + GLOBALS_OFFSET + field as u64);
        while global(offset_of!(Globals, touched))? < global(offset_of!(Globals, touch_wanted))? {
            ensure!(
                begin.elapsed() < TOUCH_PATIENCE,
                "the guest does not come to the end of its touch="
            );
            sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The latest TSC reading of each vCPU.
    pub(crate) fn heartbeats(&self) -> Result<Vec<u64>> {
        (0..self.vcpus())
            .map(|vcpu| self.word(self.record(vcpu) + LAST))
            .collect()
    }

    /// Waits until every vCPU has read its TSC again, past `before`.
    pub(crate) fn wait_past(&self, before: &[u64]) -> Result<Vec<u64>> {
        let begin = Instant::now();
        loop {
            let now = self.heartbeats()?;
            let moved = now.iter().zip(before).zip(&self.live);
            if moved
                .into_iter()
                .all(|((now, before), live)| now > before || !live)
            {
                return Ok(now);
            }
            ensure!(
                begin.elapsed() < PATIENCE,
                "a vCPU is silent: {before:?}, {now:?}"
            );
            sleep(Duration::from_millis(1));
        }
    }

    /// The longest gap of each vCPU between two heartbeats, in ns; 0 if none was logged.
    pub(crate) fn longest_between(&self, from: &[u64], to: &[u64]) -> Result<Vec<u64>> {
        let each = (0..self.vcpus()).zip(from.iter().zip(to));
        each.map(|(vcpu, (from, to))| {
            let gaps = self.gaps(vcpu)?;
            let overlapping = gaps
                .iter()
                .filter(|gap| gap.end >= *from && gap.start <= *to);
            let longest = overlapping
                .map(|gap| gap.end - gap.start)
                .max()
                .unwrap_or(0);
            Ok((u128::from(longest) * 1_000_000 / u128::from(self.tsc_khz)) as u64)
        })
        .collect()
    }

    fn vcpus(&self) -> u64 {
        self.live.len() as u64
    }

    fn gaps(&self, vcpu: u64) -> Result<Vec<Gap>> {
        let record = self.record(vcpu);
        let count = self.word(record)?;
        let entries = count.min(RING as u64);
        (0..entries)
            .map(|entry| {
                let at = record + (offset_of!(Record, ring) + 16 * entry as usize) as u64;
                Ok(Gap {
                    start: self.word(at)?,
                    end: self.word(at + 8)?,
                })
            })
            .collect()
    }

    fn record(&self, vcpu: u64) -> u64 {
        self.table + u64::from(RECORD_STRIDE) * (1 + vcpu)
    }

    fn word(&self, at: u64) -> Result<u64> {
        self.memory
            .read_obj(GuestAddress(at))
            .context("read the guest's table")
    }
}

//! What pulse writes down, read from the RAM file while the guest runs.

use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, ensure};
use stillpoint_carveout::layout::Extent;
use stillpoint_carveout::map::{Device, Mapping};
use stillpoint_control::spec::MachineSpec;
use stillpoint_guest_abi::disk::Block;
pub use stillpoint_guest_abi::probe::Gap;
use stillpoint_guest_abi::probe::{self, Record};
use stillpoint_guest_abi::pulse::{
    GLOBALS_MAGIC, GLOBALS_OFFSET, Globals, REPORT_OFFSET, Report, VERSION,
};

use crate::devices;
use crate::patience::{PATIENCE, wait_for};

/// A view of a pulse guest.
#[derive(Debug)]
pub struct Pulse {
    ram: Ram,
    table: u64,
}

/// Guest RAM, as it was lent.
#[derive(Debug)]
enum Ram {
    /// A memfd.
    File(OwnedFd),
    /// A part of a carve-out, which can only be mapped.
    Carved(Mapping),
}

impl Ram {
    /// Of this machine.
    fn of(fd: OwnedFd, spec: &MachineSpec) -> anyhow::Result<Self> {
        let Some(at) = &spec.memory.carve_out else {
            return Ok(Self::File(fd));
        };
        let extent = Extent {
            start: at.ram,
            len: spec.memory.size,
        };
        Ok(Self::Carved(Device::of(&at.path, fd)?.map(extent)?))
    }

    /// Reads; tells how much there was.
    fn read(&self, bytes: &mut [u8], at: u64) -> std::io::Result<usize> {
        match self {
            Self::File(fd) => Ok(rustix::io::pread(fd, bytes, at)?),
            Self::Carved(ram) => {
                let left = usize::try_from(ram.len().saturating_sub(at)).unwrap_or(usize::MAX);
                let count = bytes.len().min(left);
                if count > 0 {
                    ram.read(at, &mut bytes[..count]);
                }
                Ok(count)
            }
        }
    }
}

/// Plain structures of the guest ABI.
trait Plain: Default {}
impl Plain for Globals {}
impl Plain for Report {}

/// One look at all that pulse keeps.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// What all vCPUs share.
    pub globals: Globals,
    /// Each vCPU that is online or was announced.
    pub vcpus: Vec<Report>,
    /// TSC of each vCPU's latest reading.
    pub last_tsc: Vec<u64>,
}

impl Pulse {
    /// Finds pulse's table in guest RAM.
    pub fn find(ram: OwnedFd, patience: Duration) -> anyhow::Result<Self> {
        Self::find_in(Ram::File(ram), patience)
    }

    /// As [`Pulse::find`], in the RAM of this machine, which may lie in a carve-out.
    pub fn find_of(ram: OwnedFd, spec: &MachineSpec, patience: Duration) -> anyhow::Result<Self> {
        Self::find_in(Ram::of(ram, spec)?, patience)
    }

    fn find_in(ram: Ram, patience: Duration) -> anyhow::Result<Self> {
        let table = wait_for("pulse to come up", patience, || {
            let probed = |table: &u64| Self::is_table(&ram, *table);
            Ok((0..64u64 << 20).step_by(4096).find(probed))
        })?;
        let pulse = Self { ram, table };
        let version = pulse.structure::<Globals>(GLOBALS_OFFSET)?.version;
        ensure!(
            version >= VERSION,
            "pulse of version {version}: run `make images`"
        );
        Ok(pulse)
    }

    fn is_table(ram: &Ram, table: u64) -> bool {
        let word = |at: u64| {
            let mut bytes = [0; 8];
            let n = ram.read(&mut bytes, at).unwrap_or(0);
            (n == 8).then_some(u64::from_le_bytes(bytes))
        };
        word(table) == Some(probe::TABLE_MAGIC)
            && word(table + GLOBALS_OFFSET) == Some(GLOBALS_MAGIC)
    }

    /// Guest RAM below 3 GiB, at a guest-physical address.
    pub fn physical<const N: usize>(&self, at: u64) -> anyhow::Result<[u8; N]> {
        let mut bytes = [0; N];
        let n = self.ram.read(&mut bytes, at)?;
        ensure!(n == N, "guest RAM ends at {at:#x}");
        Ok(bytes)
    }

    /// Writes there, as the guest's own kernel would.
    pub fn poke(&self, at: u64, bytes: &[u8]) -> anyhow::Result<()> {
        let n = match &self.ram {
            Ram::File(fd) => rustix::io::pwrite(fd, bytes, at)?,
            Ram::Carved(ram) => {
                ensure!(
                    at + bytes.len() as u64 <= ram.len(),
                    "guest RAM ends at {at:#x}"
                );
                ram.write(at, bytes);
                bytes.len()
            }
        };
        ensure!(n == bytes.len(), "guest RAM ends at {at:#x}");
        Ok(())
    }

    fn bytes(&self, at: u64, buffer: &mut [u8]) -> anyhow::Result<()> {
        let n = self.ram.read(buffer, self.table.wrapping_add(at))?;
        ensure!(
            n == buffer.len(),
            "guest RAM ends at {:#x}",
            self.table.wrapping_add(at)
        );
        Ok(())
    }

    fn word(&self, at: u64) -> anyhow::Result<u64> {
        let mut bytes = [0; 8];
        self.bytes(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[allow(unsafe_code)] // A plain structure out of bytes.
    fn structure<T: Plain>(&self, at: u64) -> anyhow::Result<T> {
        let mut bytes = vec![0; size_of::<T>()];
        self.bytes(at, &mut bytes)?;
        let mut value = T::default();
        // SAFETY: T is made of integers alone, so any bytes are a value of it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                std::ptr::from_mut(&mut value).cast(),
                bytes.len(),
            );
        }
        Ok(value)
    }

    /// The table of a disk's blocks at an address that the guest gave.
    pub(crate) fn blocks(&self, gpa: u64, count: u64) -> anyhow::Result<Vec<Block>> {
        let entry = |n: u64| -> anyhow::Result<Block> {
            let at = gpa + n * size_of::<Block>() as u64;
            let word = |word: u64| self.word((at + 8 * word).wrapping_sub(self.table));
            Ok(Block {
                issued: word(0)?,
                durable: word(1)?,
                zeroed: word(2)?,
            })
        };
        (0..count).map(entry).collect()
    }

    fn record(vcpu: usize) -> u64 {
        u64::from(probe::RECORD_STRIDE) * (vcpu as u64 + 1)
    }

    /// A look at everything.
    pub fn look(&self) -> anyhow::Result<Snapshot> {
        let globals: Globals = self.structure(GLOBALS_OFFSET)?;
        let count = (self.word(8)? >> 32) as usize;
        let vcpus = (0..count)
            .map(|vcpu| self.structure(Self::record(vcpu) + REPORT_OFFSET))
            .collect::<anyhow::Result<Vec<Report>>>()?;
        let last = std::mem::offset_of!(Record, last) as u64;
        let last_tsc = (0..count)
            .map(|v| self.word(Self::record(v) + last))
            .collect::<anyhow::Result<_>>()?;
        Ok(Snapshot {
            globals,
            vcpus,
            last_tsc,
        })
    }

    /// Waits until `good` is true of what pulse shows.
    pub fn wait(
        &self,
        what: &str,
        patience: Duration,
        good: impl Fn(&Snapshot) -> bool,
    ) -> anyhow::Result<Snapshot> {
        wait_for(what, patience, || Ok(Some(self.look()?).filter(&good)))
            .with_context(|| format!("the guest shows {:#?}", self.look()))
    }

    /// Waits until `n` vCPUs are in ring 3.
    pub fn wait_online(&self, n: u32) -> anyhow::Result<Snapshot> {
        self.wait("all vCPUs", PATIENCE, |s| s.globals.online >= n)
            .context("pulse's boot")
    }

    /// Waits until the guest has written all the RAM that `touch=` told it to.
    pub fn wait_touched(&self, patience: Duration) -> anyhow::Result<Snapshot> {
        self.wait("touch= to end", patience, |s| {
            s.globals.touched >= s.globals.touch_wanted
        })
    }

    /// The gaps that a vCPU has in its ring, in guest TSC cycles, in no order.
    pub fn gaps(&self, vcpu: usize) -> anyhow::Result<Vec<Gap>> {
        let count = self.word(Self::record(vcpu))?.min(probe::RING as u64);
        let ring = Self::record(vcpu) + std::mem::offset_of!(Record, ring) as u64;
        (0..count)
            .map(|n| {
                let (start, end) = (self.word(ring + n * 16)?, self.word(ring + n * 16 + 8)?);
                Ok(Gap { start, end })
            })
            .collect()
    }

    /// Waits until every vCPU of those given has gone through `loops` more loops.
    pub fn wait_progress(&self, vcpus: &[usize], loops: u64) -> anyhow::Result<Snapshot> {
        let from = self.look()?;
        self.wait("progress on every vCPU", PATIENCE, |s| {
            vcpus
                .iter()
                .all(|&v| s.vcpus[v].counter >= from.vcpus[v].counter + loops)
        })
    }

    /// Checks that what all vCPUs counted together is what each counted by itself: two VMMs
    /// that run one guest would lose some of the latter. A running vCPU may be between the two.
    pub fn ran_once(&self) -> anyhow::Result<()> {
        let total = std::mem::offset_of!(Globals, total) as u64;
        let before = self.word(GLOBALS_OFFSET + total)?;
        let vcpus = self.look()?.vcpus;
        let after = self.word(GLOBALS_OFFSET + total)?;
        let (sum, slack) = (
            vcpus.iter().map(|v| v.counter).sum::<u64>(),
            vcpus.len() as u64,
        );
        ensure!(
            before <= sum + slack && sum <= after + slack,
            "vCPUs counted {sum} loops one by one, and {before} to {after} together"
        );
        Ok(())
    }

    /// Bytes of host memory behind guest RAM.
    pub fn allocated(&self) -> anyhow::Result<u64> {
        match &self.ram {
            Ram::File(fd) => Ok(u64::try_from(rustix::fs::fstat(fd)?.st_blocks)? * 512),
            Ram::Carved(ram) => Ok(ram.len()),
        }
    }
}

impl Snapshot {
    /// Everything that must be zero in a guest that was treated well, by name.
    pub fn faults(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut must_be_zero = |vcpu: Option<usize>, name: &str, value: u64| {
            if value != 0 {
                let whose = vcpu.map_or("guest".to_owned(), |v| format!("vCPU {v}"));
                found.push(format!("{whose}: {name} = {value}"));
            }
        };
        must_be_zero(None, "kvmclock warps between vCPUs", self.globals.warps);
        for (v, report) in self.vcpus.iter().enumerate() {
            let v = Some(v);
            must_be_zero(v, "TSC readings backwards", report.tsc_backwards);
            must_be_zero(v, "kvmclock readings backwards", report.clock_backwards);
            must_be_zero(v, "one-shot timers doubled", report.oneshot.doubled);
            must_be_zero(v, "one-shot timers early", report.oneshot.early);
            must_be_zero(v, "deadline timers doubled", report.deadline.doubled);
            must_be_zero(v, "deadline timers early", report.deadline.early);
            must_be_zero(v, "RAM words wrong", report.ram_errors);
            must_be_zero(v, "RAM checksums wrong", report.ram_sums_wrong);
            must_be_zero(v, "MMIO accesses wrong", report.mmio_errors);
            must_be_zero(v, "register patterns lost", report.fpu_errors);
            must_be_zero(v, "stray interrupts", report.stray_interrupts);
            for (name, count) in devices::faults(report) {
                must_be_zero(v, &name, count);
            }
            for (kind, timers) in [("one-shot", report.oneshot), ("deadline", report.deadline)] {
                let lost = timers.armed.saturating_sub(timers.fired).saturating_sub(1);
                must_be_zero(v, &format!("{kind} timers lost"), lost);
            }
        }
        found
    }
}

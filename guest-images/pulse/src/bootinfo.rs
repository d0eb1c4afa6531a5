//! What the loader told us, by either boot protocol: the command line and the memory map.

/// `ring3_main`'s protocol of a PVH boot.
pub(crate) const PVH: u64 = 0;
/// `ring3_main`'s protocol of an AP, which has nothing to read.
pub(crate) const AP: u64 = 2;

const PVH_MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
/// Regions looked at.
const REGIONS: usize = 32;
const COMMAND_LINE: usize = 1024;

/// A range of usable RAM.
#[derive(Clone, Copy)]
pub(crate) struct Region {
    /// First byte.
    pub(crate) start: u64,
    /// One past the last byte.
    pub(crate) end: u64,
}

/// A copy of everything of interest; the originals may be overwritten.
pub(crate) struct BootInfo {
    line: [u8; COMMAND_LINE],
    len: usize,
    ram: [Region; REGIONS],
    regions: usize,
}

/// Reads the structure at `boot`.
pub(crate) fn read(boot: u64, protocol: u64) -> BootInfo {
    let mut info = BootInfo {
        line: [0; COMMAND_LINE],
        len: 0,
        ram: [Region { start: 0, end: 0 }; REGIONS],
        regions: 0,
    };
    if protocol == PVH {
        info.read_pvh(boot);
    } else {
        info.read_linux(boot);
    }
    info
}

impl BootInfo {
    /// The command line; empty if it is not UTF-8.
    pub(crate) fn command_line(&self) -> &str {
        core::str::from_utf8(&self.line[..self.len]).unwrap_or("")
    }

    /// Usable RAM.
    pub(crate) fn ram(&self) -> &[Region] {
        &self.ram[..self.regions]
    }

    /// The end of the highest RAM.
    pub(crate) fn top(&self) -> u64 {
        self.ram().iter().map(|r| r.end).max().unwrap_or(0)
    }

    /// struct hvm_start_info; a memory map since its version 1.
    fn read_pvh(&mut self, boot: u64) {
        if peek::<u32>(boot) != PVH_MAGIC {
            return;
        }
        self.copy_line(peek(boot + 24));
        if peek::<u32>(boot + 4) == 0 {
            return;
        }
        let (map, entries): (u64, u32) = (peek(boot + 40), peek(boot + 48));
        for entry in (0..u64::from(entries)).map(|i| map + 24 * i) {
            self.add(peek(entry), peek(entry + 8), peek(entry + 16));
        }
    }

    /// struct boot_params ("zero page"); its map has packed entries of 20 bytes.
    fn read_linux(&mut self, boot: u64) {
        self.copy_line(u64::from(peek::<u32>(boot + 0x228)));
        let entries = peek::<u8>(boot + 0x1e8);
        for entry in (0..u64::from(entries)).map(|i| boot + 0x2d0 + 20 * i) {
            self.add(peek(entry), peek(entry + 8), peek(entry + 16));
        }
    }

    fn copy_line(&mut self, from: u64) {
        if from == 0 {
            return;
        }
        while self.len < COMMAND_LINE {
            match peek::<u8>(from + self.len as u64) {
                0 => return,
                byte => self.line[self.len] = byte,
            }
            self.len += 1;
        }
    }

    fn add(&mut self, start: u64, len: u64, kind: u32) {
        if kind == RAM && self.regions < REGIONS {
            self.ram[self.regions] = Region {
                start,
                end: start.saturating_add(len),
            };
            self.regions += 1;
        }
    }
}

fn peek<T: Copy>(at: u64) -> T {
    // SAFETY: all of the first 4 GiB is mapped, and `T` is an integer. Loaders keep their
    // structures there; nonsense reads as nonsense.
    unsafe { (at as *const T).read_unaligned() }
}

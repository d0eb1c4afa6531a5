//! Guest RAM over its memory backend: a memfd of sealed size, or a part of the host's carve-out. Of these a
//! carve-out outlives the kernel, and so does a memfd that live update keeps; behind RAM such a one has
//! room for the guest's record.
//!
//! The file outlives any process that maps it: predecessor, successor and daemon all hold it.
//! Layout: RAM from 0 to [`HOLE_START`], then from [`HOLE_END`] on; the hole holds device
//! registers and the APICs. In the file the two parts lie one after the other.
//!
//! Must never: write a byte of a guest that another process owns. [`GuestRam::populate`] maps
//! pages that the file already holds and changes no content. A rehearsal has a [`GuestRam::view`],
//! whose writes are its own, over a file that it can't write to; a device-dax has no such writes, so its
//! view takes none.
#![allow(unsafe_code)] // Memory slots and madvise take raw addresses.

mod carved;
mod hold;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::Advice;
use stillpoint_carveout::map::{Device, MapError};
use stillpoint_control::spec::{MemorySpec, Pages, Survive};
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

/// The one type of mapped guest memory.
pub type Memory = GuestMemoryMmap<()>;

/// End of low RAM; device registers begin here (3 GiB).
pub const HOLE_START: u64 = 0xc000_0000;
/// Start of high RAM (4 GiB).
pub const HOLE_END: u64 = 0x1_0000_0000;

/// What of the hole KVM keeps for itself on Intel hosts: an identity map of one page, and a TSS of
/// three (api.rst, KVM_SET_IDENTITY_MAP_ADDR and KVM_SET_TSS_ADDR).
pub const KVM_PRIVATE: std::ops::Range<u64> = 0xfffb_c000..0xfffc_0000;

/// Bytes populated by one call, so that a swap can be called off in between.
const POPULATE_STEP: u64 = 32 << 20;

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// More than there is.
    #[error(
        "machine spec: field `memory.size`: {wanted} MiB is more than this host's {total} MiB of RAM"
    )]
    TooLarge {
        /// Asked for, MiB.
        wanted: u64,
        /// `MemTotal`, MiB.
        total: u64,
    },
    /// The memfd could not be made, sized or sealed.
    #[error("cannot {what} guest RAM: {source}{remedy}")]
    File {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        source: Errno,
        /// What to do.
        remedy: &'static str,
    },
    /// It could not be mapped.
    #[error("cannot map guest RAM: {0}")]
    Map(#[from] vm_memory::mmap::FromRangesError),
    /// It could not be mapped for a rehearsal.
    #[error("cannot map a private view of guest RAM: {0}")]
    View(vm_memory::mmap::MmapRegionError),
    /// Its regions don't fit together.
    #[error("cannot map a private view of guest RAM: {0}")]
    Regions(vm_memory::GuestRegionCollectionError),
    /// KVM refused a memory slot.
    #[error("KVM refused a memory slot: {0}")]
    Slot(#[from] kvm_ioctls::Error),
    /// The carve-out.
    #[error(transparent)]
    CarveOut(#[from] MapError),
    /// Nodes that this host doesn't have, or that this process may not use.
    #[error(
        "machine spec: field `memory.nodes`: RAM can't come from node {nodes} of this host alone: {source}; \
         `ls /sys/devices/system/node` shows its nodes, and a cgroup (cpuset.mems) may allow some of them only"
    )]
    Nodes {
        /// Asked for.
        nodes: String,
        /// Why not.
        source: Errno,
    },
    /// It may not be locked.
    #[error(
        "machine spec: field `memory.lock`: RAM can't be locked: {0}; it takes CAP_IPC_LOCK, or a limit that holds \
         it (`ulimit -l`; LimitMEMLOCK=infinity in the daemon's unit)"
    )]
    Lock(Errno),
    /// Nobody said where in the carve-out.
    #[error(
        "machine spec: field `memory.survive`: `kernel` needs a place in what outlives the kernel, which \
         the daemon finds; start the guest by `stillpoint run --survive kernel`"
    )]
    NoPlace,
}

/// Guest RAM: the file and this process's mapping of it.
#[derive(Debug)]
pub struct GuestRam {
    fd: OwnedFd,
    map: Memory,
    size: u64,
    /// Where it begins in the file.
    base: u64,
    /// A view that can only be read.
    is_read_only: bool,
}

/// Guest-physical ranges of `size` bytes of RAM: (start, bytes), lowest first.
pub fn ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low)];
    if size > low {
        ranges.push((GuestAddress(HOLE_END), size - low));
    }
    ranges
}

fn memfd_flags(pages: Pages) -> MemfdFlags {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match pages {
        Pages::Base | Pages::Thp => flags,
        Pages::Hugetlb2m => flags | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        Pages::Hugetlb1g => flags | MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    }
}

fn mem_total_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib >> 10)
}

/// That something could not be done to the file of RAM.
fn not_to(what: &'static str) -> impl Fn(Errno) -> MemoryError {
    move |source| MemoryError::File {
        what,
        source,
        remedy: "",
    }
}

/// Bytes of a memfd of RAM: with the room of the record, where it has one.
fn file_size(spec: &MemorySpec) -> u64 {
    let record = spec.carve_out.as_ref().filter(|at| at.is_memfd());
    spec.size + record.map_or(0, |at| at.record_len)
}

/// A file of RAM is as large as the spec says; `what` is what can't be done if it isn't.
fn check_size(fd: &OwnedFd, spec: &MemorySpec, what: &'static str) -> Result<(), MemoryError> {
    let len = rustix::fs::fstat(fd).map_err(not_to("look at"))?.st_size;
    match u64::try_from(len) {
        Ok(len) if len == file_size(spec) => Ok(()),
        _ => Err(not_to(what)(Errno::INVAL)),
    }
}

impl GuestRam {
    /// New, zeroed RAM.
    pub fn create(spec: &MemorySpec) -> Result<Self, MemoryError> {
        let wanted = spec.size >> 20;
        if spec.survive == Survive::Kernel {
            let place = spec.carve_out.as_ref().ok_or(MemoryError::NoPlace)?;
            if !place.is_memfd() {
                return Self::in_carve_out(place, spec);
            }
        }
        if let Some(total) = mem_total_mib().filter(|&total| wanted > total) {
            return Err(MemoryError::TooLarge { wanted, total });
        }
        let huge = matches!(spec.pages, Pages::Hugetlb2m | Pages::Hugetlb1g);
        let remedy = if huge {
            " (reserve huge pages first: /sys/kernel/mm/hugepages/*/nr_hugepages)"
        } else {
            ""
        };
        let file = |what| {
            move |source| MemoryError::File {
                what,
                source,
                remedy,
            }
        };
        let fd = rustix::fs::memfd_create("stillpoint-ram", memfd_flags(spec.pages))
            .map_err(file("create"))?;
        rustix::fs::ftruncate(&fd, file_size(spec)).map_err(file("size"))?;
        // Nobody who is lent this file may cut it off under the guest.
        let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals).map_err(file("seal"))?;
        let ram = match Self::adopt(fd, spec) {
            // What is mapped of huge pages is set aside.
            Err(MemoryError::Map(_)) if huge => {
                return Err(file("find huge pages for")(Errno::NOMEM));
            }
            other => other?,
        };
        if huge {
            // Now, and with an error: a huge page that is missing later kills the process.
            let flags = rustix::fs::FallocateFlags::empty();
            let made = rustix::fs::fallocate(&ram.fd, flags, 0, spec.size);
            made.map_err(file("find huge pages for"))?;
        }
        Ok(ram)
    }

    /// RAM that another process made.
    pub fn adopt(fd: OwnedFd, spec: &MemorySpec) -> Result<Self, MemoryError> {
        if let Some(place) = carved::at(spec) {
            let device = Device::of(&place.path, fd)?;
            return Self::carved(&device, place, spec);
        }
        check_size(&fd, spec, "adopt: its size is not the spec's;")?;
        let dup = || {
            let dup = fd.try_clone();
            dup.map_err(|_| not_to("duplicate")(Errno::MFILE))
        };
        let mut offset = 0;
        let mut parts = Vec::new();
        for (start, len) in ranges(spec.size) {
            let backing = FileOffset::new(File::from(dup()?), offset);
            parts.push((
                start,
                usize::try_from(len).unwrap_or(usize::MAX),
                Some(backing),
            ));
            offset += len;
        }
        let map = Memory::from_ranges_with_files(parts)?;
        hold::hold(&map, spec)?;
        let ram = Self {
            fd,
            map,
            size: spec.size,
            base: 0,
            is_read_only: false,
        };
        if spec.pages == Pages::Thp {
            // Best effort: whether it does anything is the host's setting, which `doctor` shows.
            let _ = ram.advise(0..spec.size, Advice::LinuxHugepage);
        }
        Ok(ram)
    }

    /// A view of RAM that another process's guest runs in: read from the file page by page, and
    /// copied where it is written (`MAP_PRIVATE`), so that no write gets out of this process; of a
    /// device-dax one that [can't be written](Self::takes_writes). The file may be open for reading only.
    pub fn view(fd: OwnedFd, spec: &MemorySpec) -> Result<Self, MemoryError> {
        if let Some(place) = carved::at(spec) {
            let device = Device::of(&place.path, fd)?;
            return Self::view_in_carve_out(&device, place, spec);
        }
        check_size(&fd, spec, "view: its size is not the spec's;")?;
        let mut offset = 0;
        let mut regions = Vec::new();
        for (start, len) in ranges(spec.size) {
            let dup = fd
                .try_clone()
                .map_err(|_| not_to("duplicate")(Errno::MFILE))?;
            let backing = FileOffset::new(File::from(dup), offset);
            let region = MmapRegion::build(
                Some(backing),
                usize::try_from(len).unwrap_or(usize::MAX),
                libc::PROT_READ | libc::PROT_WRITE,
                // Nothing is reserved: next to none of it is written.
                libc::MAP_PRIVATE | libc::MAP_NORESERVE,
            )
            .map_err(MemoryError::View)?;
            let region = GuestRegionMmap::new(region, start);
            regions
                .push(region.ok_or(not_to("view: it ends beyond all addresses;")(Errno::INVAL))?);
            offset += len;
        }
        let map = Memory::from_regions(regions).map_err(MemoryError::Regions)?;
        Ok(Self {
            fd,
            map,
            size: spec.size,
            base: 0,
            is_read_only: false,
        })
    }

    /// The same file, open for reading only.
    pub fn read_only(&self) -> Result<OwnedFd, MemoryError> {
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).map_err(|source| MemoryError::File {
            what: "open for reading only",
            source,
            remedy: "",
        })
    }

    /// Whether it may be written: not so a view of a device-dax, where a write ends the process.
    pub fn takes_writes(&self) -> bool {
        !self.is_read_only
    }

    /// This process's mapping.
    pub fn map(&self) -> &Memory {
        &self.map
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Makes the RAM known to a virtual machine, one slot a range.
    pub fn register(&self, vm: &VmFd) -> Result<(), MemoryError> {
        for (slot, region) in self.map.iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: u32::try_from(slot).unwrap_or(u32::MAX),
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr().addr() as u64,
            };
            // SAFETY: the region is mapped for as long as `self`, which outlives the VM: both are
            // fields of one `Machine`, the VM dropped first.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        Ok(())
    }

    /// Takes the RAM out of a virtual machine again.
    pub fn unregister(&self, vm: &VmFd) -> Result<(), MemoryError> {
        for (slot, _) in self.map.iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: u32::try_from(slot).unwrap_or(u32::MAX),
                ..Default::default()
            };
            // SAFETY: a slot of no size is removed; no address is taken.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        Ok(())
    }

    /// Gives the RAM back to the host and reads as zero afterwards (a reset of the machine).
    pub fn clear(&self) -> Result<(), MemoryError> {
        use rustix::fs::{FallocateFlags, fallocate};
        if self.is_carved() {
            self.zero();
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.fd, flags, 0, self.size) {
            // Live update keeps it right now, and lets nobody take a page out of it.
            Err(Errno::PERM) => {
                self.zero();
                Ok(())
            }
            done => done.map_err(not_to("clear")),
        }
    }

    /// Fills this process's page tables for every page the file already holds, and for no other:
    /// populating holes would blow a sparse guest up to its full size. `go_on` is asked between
    /// steps. Gives the bytes populated; a host that can't do it leaves them to be faulted in.
    pub fn populate(&self, mut go_on: impl FnMut() -> bool) -> u64 {
        let mut done = 0;
        self.each_step(|step| {
            let goes = go_on()
                && self
                    .advise(step.clone(), Advice::LinuxPopulateWrite)
                    .is_ok();
            if goes {
                done += step.end - step.start;
            }
            goes
        });
        done
    }

    /// Shows `visit` every range of guest-physical addresses whose pages the file already holds, in steps, until it says
    /// no.
    pub fn each_held(&self, mut visit: impl FnMut(std::ops::Range<u64>) -> bool) {
        self.each_step(|step| {
            let mut offset = 0;
            for region in self.map.iter() {
                let from = step.start.max(offset);
                let to = step.end.min(offset + region.len());
                let base = region.start_addr().0;
                if from < to && !visit(base + from - offset..base + to - offset) {
                    return false;
                }
                offset += region.len();
            }
            true
        });
    }

    /// Shows `visit` every range of the file that holds pages, in steps, until it says no. Between two of them the running
    /// guest's vCPUs may have this core.
    fn each_step(&self, mut visit: impl FnMut(std::ops::Range<u64>) -> bool) {
        let mut at = 0;
        while let Some(held) = self.next_held(at) {
            let mut from = held.start;
            while from < held.end {
                let to = held.end.min(from + POPULATE_STEP);
                if !visit(from..to) {
                    return;
                }
                std::thread::yield_now();
                from = to;
            }
            at = held.end;
        }
    }

    /// The next range of the file that holds pages. A carve-out has no holes.
    fn next_held(&self, at: u64) -> Option<std::ops::Range<u64>> {
        if self.is_carved() {
            return (at < self.size).then_some(at..self.size);
        }
        let start = rustix::fs::seek(&self.fd, SeekFrom::Data(at)).ok()?;
        let end = rustix::fs::seek(&self.fd, SeekFrom::Hole(start)).unwrap_or(self.size);
        // Behind RAM a file may hold a record.
        let end = end.min(self.size);
        (start < end).then_some(start..end)
    }

    /// Advises on a range of the file, in every region that maps a part of it.
    fn advise(&self, range: std::ops::Range<u64>, advice: Advice) -> Result<(), Errno> {
        let mut offset = 0;
        for region in self.map.iter() {
            let from = range.start.max(offset);
            let to = range.end.min(offset + region.len());
            if from < to {
                let base = region.as_ptr().wrapping_add((from - offset) as usize);
                // SAFETY: the range lies within the region's mapping, and neither advice used
                // here changes what it holds.
                unsafe { rustix::mm::madvise(base.cast(), (to - from) as usize, advice) }?;
            }
            offset += region.len();
        }
        Ok(())
    }
}

impl AsFd for GuestRam {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests;

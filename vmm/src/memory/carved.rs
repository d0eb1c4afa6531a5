//! RAM in the host's carve-out: at a place that the daemon found, of a device that outlives the kernel.
#![allow(unsafe_code)] // Regions are made of raw addresses.

use std::os::fd::AsFd;

use rustix::io::Errno;
use stillpoint_carveout::layout::Extent;
use stillpoint_carveout::map::{Device, MapError};
use stillpoint_control::spec::{CarveOutSpec, MemorySpec};
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestMemoryBackend, GuestRegionMmap};

use super::{GuestRam, Memory, MemoryError, not_to, ranges};

/// The place, if it is one in a carve-out.
pub(super) fn at(spec: &MemorySpec) -> Option<&CarveOutSpec> {
    spec.carve_out.as_ref().filter(|at| !at.is_memfd())
}

impl GuestRam {
    /// RAM at its place in the carve-out, zeroed: it may hold what another guest left.
    pub(super) fn in_carve_out(
        place: &CarveOutSpec,
        spec: &MemorySpec,
    ) -> Result<Self, MemoryError> {
        let device = Device::open(&place.path)?;
        let ram = Self::carved(&device, place, spec)?;
        ram.zero();
        Ok(ram)
    }

    /// RAM at its place in the carve-out, as it is.
    pub(super) fn carved(
        device: &Device,
        place: &CarveOutSpec,
        spec: &MemorySpec,
    ) -> Result<Self, MemoryError> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        Self::mapped(device, place, spec, |extent| {
            Ok((device.map(extent)?.keep(), prot, libc::MAP_SHARED))
        })
    }

    /// A view of RAM at its place in the carve-out.
    pub(super) fn view_in_carve_out(
        device: &Device,
        place: &CarveOutSpec,
        spec: &MemorySpec,
    ) -> Result<Self, MemoryError> {
        let mut is_read_only = false;
        let ram = Self::mapped(device, place, spec, |extent| {
            let view = device.view(extent)?;
            is_read_only |= !view.is_private;
            Ok(match view.is_private {
                true => (
                    view.base,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE,
                ),
                false => (view.base, libc::PROT_READ, libc::MAP_SHARED),
            })
        })?;
        Ok(Self {
            is_read_only,
            ..ram
        })
    }

    /// RAM in the carve-out; `map` maps a part of it for the rest of the process's life, and says how.
    fn mapped(
        device: &Device,
        place: &CarveOutSpec,
        spec: &MemorySpec,
        mut map: impl FnMut(Extent) -> Result<(*mut u8, i32, i32), MapError>,
    ) -> Result<Self, MemoryError> {
        let fd = device.as_fd().try_clone_to_owned();
        let fd = fd.map_err(|_| not_to("duplicate")(Errno::MFILE))?;
        let mut base = place.ram;
        let mut regions = Vec::new();
        for (start, len) in ranges(spec.size) {
            let length = usize::try_from(len).unwrap_or(usize::MAX);
            let (at, prot, how) = map(Extent { start: base, len })?;
            // SAFETY: mapped just now, of this length, and for the rest of the process's life.
            let region = unsafe { MmapRegion::build_raw(at, length, prot, how) };
            let region = region.map_err(MemoryError::View)?;
            let region = GuestRegionMmap::new(region, start);
            regions.push(region.ok_or(not_to("map: it ends beyond all addresses;")(Errno::INVAL))?);
            base += len;
        }
        Ok(Self {
            fd,
            map: Memory::from_regions(regions).map_err(MemoryError::Regions)?,
            size: spec.size,
            base: place.ram,
            is_read_only: false,
        })
    }

    /// Whether it lies in a carve-out.
    pub(super) fn is_carved(&self) -> bool {
        self.base != 0
    }

    pub(super) fn zero(&self) {
        for region in self.map.iter() {
            // SAFETY: a region's own mapping, which nobody else uses: no guest runs in it.
            unsafe { std::ptr::write_bytes(region.as_ptr(), 0, region.size()) };
        }
    }
}

//! Guest RAM, as its owner wanted it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{SpecError, field};

/// The least RAM: below this no kernel we load finds room.
pub const MIN_MEMORY: u64 = 16 << 20;
/// The most memory nodes of a host that a spec may name (Linux: `MAX_NUMNODES` of x86-64).
pub const MAX_NODES: u16 = 1024;

/// Guest RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MemorySpec {
    /// Bytes; a multiple of the page size of the backing.
    pub size: u64,
    /// Which pages lie behind it.
    #[serde(default)]
    pub pages: Pages,
    /// What it outlives.
    #[serde(default, skip_serializing_if = "is_vmm")]
    pub survive: Survive,
    /// Its pages stay in the host's memory and are never swapped out, in whichever process the guest runs.
    /// Pages that the guest has not touched are not there yet, and are not made for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lock: bool,
    /// The host's memory nodes (NUMA) that its pages come from, and from no others, in whichever process the
    /// guest runs. None: whatever policy the process that touches a page has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<u16>,
    /// Where it lies, if it outlives the kernel. The daemon writes this; nobody else does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub carve_out: Option<CarveOutSpec>,
}

impl Default for MemorySpec {
    fn default() -> Self {
        Self {
            size: 256 << 20,
            pages: Pages::Base,
            survive: Survive::Vmm,
            lock: false,
            nodes: Vec::new(),
            carve_out: None,
        }
    }
}

impl MemorySpec {
    /// Checks everything that can be checked without touching the host.
    pub(super) fn validate(&self) -> Result<(), SpecError> {
        let Self { size, pages, .. } = *self;
        if size < MIN_MEMORY {
            return Err(field(
                "memory.size",
                format!("{size} bytes, at least {MIN_MEMORY}"),
            ));
        }
        // 46 bits of physical address are what every x86-64 host with KVM has.
        if size > 1 << 45 {
            return Err(field(
                "memory.size",
                format!("{size} bytes is beyond 32 TiB"),
            ));
        }
        if !size.is_multiple_of(pages.size()) {
            let page = pages.size();
            return Err(field(
                "memory.size",
                format!("{size} is no multiple of {page} bytes"),
            ));
        }
        self.validate_nodes()?;
        self.validate_carve_out()
    }

    fn validate_carve_out(&self) -> Result<(), SpecError> {
        let Self {
            size,
            pages,
            survive,
            carve_out,
            ..
        } = self;
        let huge = Pages::Hugetlb2m.size();
        if *survive == Survive::Vmm {
            return match carve_out {
                None => Ok(()),
                Some(_) => Err(field(
                    "memory.carve_out",
                    "is for `memory.survive`: `kernel` alone",
                )),
            };
        }
        if *pages != Pages::Base {
            let text = "memory that outlives the kernel has its own pages; leave `pages` out with \
                        `survive`: `kernel`";
            return Err(field("memory.pages", text));
        }
        if !size.is_multiple_of(huge) {
            let text = format!(
                "{size} is no multiple of the {huge} bytes that memory which outlives the kernel is given out by"
            );
            return Err(field("memory.size", text));
        }
        let places = carve_out
            .iter()
            .flat_map(|at| [at.ram, at.record, at.record_len]);
        if places.into_iter().any(|at| !at.is_multiple_of(huge)) {
            let text = format!("a place that is no multiple of {huge} bytes");
            return Err(field("memory.carve_out", text));
        }
        let own = carve_out.as_ref().filter(|at| at.is_memfd());
        if own.is_some_and(|at| *at != CarveOutSpec::memfd(*size, at.record_len)) {
            let text = "in a memfd of the guest's own RAM comes first, and its record behind it";
            return Err(field("memory.carve_out", text));
        }
        Ok(())
    }

    fn validate_nodes(&self) -> Result<(), SpecError> {
        if let Some(node) = self.nodes.iter().find(|&&node| node >= MAX_NODES) {
            let text = format!(
                "{node} is no memory node of any host; `ls /sys/devices/system/node` shows them"
            );
            return Err(field("memory.nodes", text));
        }
        if !self.nodes.is_empty() && self.survive == Survive::Kernel {
            let text = "memory that outlives the kernel lies where it was set aside; leave `nodes` out with \
                        `survive`: `kernel`";
            return Err(field("memory.nodes", text));
        }
        Ok(())
    }
}

/// What guest RAM outlives, and so what can be swapped under the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Survive {
    /// Its VMM: a memfd.
    #[default]
    Vmm,
    /// The host's kernel too: memory of the host's carve-out, or a memfd that live update keeps.
    Kernel,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_vmm(survive: &Survive) -> bool {
    *survive == Survive::Vmm
}

/// The path in the place of a guest whose RAM and record are a memfd of its own, which live update keeps for the
/// next kernel. No release that knows only carve-outs takes it for one.
pub const LIVE_UPDATE: &str = "/dev/liveupdate";

/// A guest's place in what outlives the kernel. All of it in whole 2 MiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CarveOutSpec {
    /// The carve-out: a device-dax, or a file for tests. `/dev/liveupdate`: a memfd of the guest's own.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub path: PathBuf,
    /// Where RAM begins, bytes.
    pub ram: u64,
    /// Where the guest's record begins, bytes.
    pub record: u64,
    /// Bytes of the record's room.
    pub record_len: u64,
}

impl CarveOutSpec {
    /// A memfd of the guest's own: RAM of this size, and the record behind it.
    pub fn memfd(size: u64, record_len: u64) -> Self {
        Self {
            path: LIVE_UPDATE.into(),
            ram: 0,
            record: size,
            record_len,
        }
    }

    /// Whether it is a memfd of the guest's own.
    pub fn is_memfd(&self) -> bool {
        self.path.as_os_str() == LIVE_UPDATE
    }
}

/// Pages behind guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Pages {
    /// 4 KiB pages of a memfd.
    #[default]
    Base,
    /// 4 KiB pages with `MADV_HUGEPAGE`: transparent huge pages where the host's
    /// `/sys/kernel/mm/transparent_hugepage/shmem_enabled` allows them.
    Thp,
    /// A memfd of 2 MiB huge pages; they must be reserved on the host.
    Hugetlb2m,
    /// A memfd of 1 GiB huge pages; they must be reserved on the host.
    Hugetlb1g,
}

impl Pages {
    /// Bytes of one page.
    pub fn size(self) -> u64 {
        match self {
            Self::Base | Self::Thp => 4 << 10,
            Self::Hugetlb2m => 2 << 20,
            Self::Hugetlb1g => 1 << 30,
        }
    }
}

//! What a machine is, as its owner wrote it.
//!
//! A [`MachineSpec`] comes from a JSON file or from flags, and is validated once, by
//! [`MachineSpec::validate`], before anything is created. Every error names the field. Unknown
//! fields are refused: a misspelt option must not silently mean its default.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::{ClockSpec, Correction, Policy, is_default};

/// The most vCPUs of a machine: 8-bit APIC ids, 255 being the broadcast.
pub const MAX_VCPUS: u8 = 254;
/// The least RAM: below this no kernel we load finds room.
pub const MIN_MEMORY: u64 = 16 << 20;
/// The ceiling of every blackout budget.
pub const MAX_BUDGET: Duration = Duration::from_secs(30);
/// The budget of a VMM swap when nothing else is said.
pub const DEFAULT_BUDGET: Duration = Duration::from_secs(1);
/// The longest command line, bytes (the Linux boot protocol's `cmdline_size` of current kernels).
pub const MAX_CMDLINE: usize = 2047;

/// The most pairs of queues of a network interface.
pub const MAX_QUEUE_PAIRS: u8 = 8;
/// The least context id of a guest: 0 to 2 are the hypervisor's, the loopback's and the host's.
pub const MIN_CID: u32 = 3;
/// The most disks, network interfaces, vsock and entropy devices together: each has an interrupt line
/// of the I/O APIC to itself.
pub const MAX_DEVICES: usize = 18;

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// Name: 1 to 48 characters of `a-z A-Z 0-9 . _ -`, beginning with a letter or digit.
    pub name: String,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    #[serde(default = "one")]
    pub cpus: u8,
    /// Guest RAM.
    #[serde(default)]
    pub memory: MemorySpec,
    /// What to boot.
    pub kernel: KernelSpec,
    /// Disks, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSpec>,
    /// Network interfaces, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetSpec>,
    /// A vsock device: sockets between guest and host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockSpec>,
    /// Whether there is an entropy device.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rng: bool,
    /// Its clock.
    #[serde(default, skip_serializing_if = "is_default")]
    pub clock: ClockSpec,
    /// The longest blackout a swap of this machine may take, ns; at most [`MAX_BUDGET`].
    #[serde(
        rename = "blackout_budget_ns",
        with = "crate::nanos",
        default = "default_budget"
    )]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub blackout_budget: Duration,
}

fn one() -> u8 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_one(value: &u8) -> bool {
    *value == 1
}

fn default_budget() -> Duration {
    DEFAULT_BUDGET
}

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
            carve_out: None,
        }
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

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct KernelSpec {
    /// An ELF (PVH note, or 64-bit entry) or a bzImage.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub path: PathBuf,
    /// An initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default)]
    pub cmdline: String,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// A raw image, or a block device.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub path: PathBuf,
    /// The guest can't write to it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// Name of a tap interface of the host.
    pub tap: String,
    /// The guest's MAC address, such as `52:54:00:12:34:56`; made from the machine's name and
    /// the interface's number when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Pairs of queues, 1 to [`MAX_QUEUE_PAIRS`]; more than one needs a tap with `IFF_MULTI_QUEUE`.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub queue_pairs: u8,
}

/// A vsock device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// The guest's context id, at least [`MIN_CID`].
    pub cid: u32,
}

impl VsockSpec {
    /// For a machine of that name when nobody chose a context id: always the same. Two machines
    /// may have one in common, since the host reaches each by its own Unix socket.
    pub fn for_name(name: &str) -> Self {
        // FNV-1a, 32 bits.
        let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
        // The last one means "any" (`VMADDR_CID_ANY`).
        Self {
            cid: MIN_CID + hash % (u32::MAX - MIN_CID),
        }
    }
}

/// Why a spec is refused. The text names the field.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not JSON, or not the JSON of a spec.
    #[error("machine spec: {0} (see `stillpoint run --help` for the fields)")]
    Syntax(#[from] serde_json::Error),
    /// A field with a value that can't be.
    #[error("machine spec: field `{field}`: {problem}")]
    Field {
        /// Path of the field, dots between.
        field: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
}

fn field(field: &'static str, problem: impl Into<String>) -> SpecError {
    SpecError::Field {
        field,
        problem: problem.into(),
    }
}

impl MachineSpec {
    /// Reads a spec from JSON and validates it.
    pub fn from_json(text: &str) -> Result<Self, SpecError> {
        let spec: Self = serde_json::from_str(text)?;
        spec.validate()?;
        Ok(spec)
    }

    /// Checks everything that can be checked without touching the host.
    pub fn validate(&self) -> Result<(), SpecError> {
        validate_name(&self.name)?;
        if self.cpus == 0 || self.cpus > MAX_VCPUS {
            return Err(field(
                "cpus",
                format!("{} is not in 1 to {MAX_VCPUS}", self.cpus),
            ));
        }
        self.validate_memory()?;
        if self.kernel.path.as_os_str().is_empty() {
            return Err(field(
                "kernel.path",
                "is empty; give the path of an ELF or bzImage",
            ));
        }
        if self.kernel.cmdline.len() > MAX_CMDLINE {
            let len = self.kernel.cmdline.len();
            return Err(field(
                "kernel.cmdline",
                format!("{len} bytes, {MAX_CMDLINE} at most"),
            ));
        }
        if !self
            .kernel
            .cmdline
            .bytes()
            .all(|b| b == b'\t' || (0x20..0x7f).contains(&b))
        {
            return Err(field(
                "kernel.cmdline",
                "holds a character that is not printable ASCII",
            ));
        }
        self.validate_devices()?;
        self.validate_clock()?;
        if self.blackout_budget.is_zero() || self.blackout_budget > MAX_BUDGET {
            let given = self.blackout_budget;
            return Err(field(
                "blackout_budget_ns",
                format!("{given:?} is not more than 0 and at most {MAX_BUDGET:?}"),
            ));
        }
        Ok(())
    }

    /// How many virtio devices there are.
    pub fn device_count(&self) -> usize {
        self.disks.len()
            + self.nets.len()
            + usize::from(self.vsock.is_some())
            + usize::from(self.rng)
    }

    /// MAC address of the network interface with this number; `None` if there is no such interface.
    ///
    /// The default is locally administered, and made of the machine's name and the number alone:
    /// the same on every host and by every release, so that a guest keeps its address.
    pub fn mac(&self, number: usize) -> Option<[u8; 6]> {
        let given = self.nets.get(number)?.mac.as_deref();
        let default = || default_mac(&self.name, number);
        Some(given.map_or_else(default, |text| {
            parse_mac(text).unwrap_or_else(|_| default())
        }))
    }

    fn validate_devices(&self) -> Result<(), SpecError> {
        let count = self.device_count();
        if count > MAX_DEVICES {
            let text =
                format!("{count} devices with `nets`, `vsock` and `rng`, {MAX_DEVICES} at most");
            return Err(field("disks", text));
        }
        if self
            .disks
            .iter()
            .any(|disk| disk.path.as_os_str().is_empty())
        {
            return Err(field(
                "disks.path",
                "is empty; give the path of a raw image or block device",
            ));
        }
        let mut paths: Vec<_> = self.disks.iter().map(|disk| &disk.path).collect();
        paths.sort();
        if let Some(twice) = paths.windows(2).find(|pair| pair[0] == pair[1]) {
            let path = twice[0].display();
            return Err(field("disks.path", format!("{path} is there twice")));
        }
        for (number, net) in self.nets.iter().enumerate() {
            validate_net(net)?;
            if self.nets[..number].iter().any(|other| other.tap == net.tap) {
                return Err(field("nets.tap", format!("`{}` is there twice", net.tap)));
            }
        }
        match self.vsock {
            Some(VsockSpec { cid }) if cid < MIN_CID || cid == u32::MAX => Err(field(
                "vsock.cid",
                format!("{cid} is not in {MIN_CID} to {}", u32::MAX - 1),
            )),
            _ => Ok(()),
        }
    }

    fn validate_clock(&self) -> Result<(), SpecError> {
        let clock = &self.clock;
        let by_agent = matches!(clock.correction, Some(Correction::Step | Correction::Slew));
        if by_agent && self.vsock.is_none() {
            let text = "the guest's agent is reached by vsock; give the machine a `vsock`, or \
                        leave the correction to `ptp`";
            return Err(field("clock.correction", text));
        }
        if clock.policy == Policy::Hold && self.correction().is_none() {
            let text = "hold leaves the guest's wall clock late by the pause; give the machine a \
                        `vsock` for its agent to correct it, or set `clock.correction` to `ptp`";
            return Err(field("clock.policy", text));
        }
        Ok(())
    }

    /// How wall-clock time is corrected after a pause that was held; `None` if nothing would.
    pub fn correction(&self) -> Option<Correction> {
        self.clock.corrects(self.vsock.is_some())
    }

    fn validate_memory(&self) -> Result<(), SpecError> {
        let MemorySpec { size, pages, .. } = self.memory;
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
        self.validate_carve_out()
    }

    fn validate_carve_out(&self) -> Result<(), SpecError> {
        let MemorySpec {
            size,
            pages,
            survive,
            carve_out,
        } = &self.memory;
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
}

fn validate_net(net: &NetSpec) -> Result<(), SpecError> {
    // IFNAMSIZ, with the terminating zero (include/uapi/linux/if.h).
    let name_ok = (1..16).contains(&net.tap.len())
        && net
            .tap
            .bytes()
            .all(|b| b.is_ascii_graphic() && b != b'/' && b != b':');
    if !name_ok {
        let text = format!("{:?} is no interface name: 1 to 15 characters", net.tap);
        return Err(field("nets.tap", text));
    }
    if net.queue_pairs == 0 || net.queue_pairs > MAX_QUEUE_PAIRS {
        let text = format!("{} is not in 1 to {MAX_QUEUE_PAIRS}", net.queue_pairs);
        return Err(field("nets.queue_pairs", text));
    }
    match net.mac.as_deref().map(parse_mac) {
        Some(Err(problem)) => Err(field("nets.mac", problem)),
        _ => Ok(()),
    }
}

/// FNV-1a of the name and the number, 64 bits, folded into the 46 that a locally administered
/// address of one machine has free (IEEE 802: the second-lowest bit of the first byte set, the
/// lowest clear).
fn default_mac(name: &str, number: usize) -> [u8; 6] {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let bytes = name
        .bytes()
        .chain([b'/'])
        .chain((number as u64).to_le_bytes());
    let hash = bytes.fold(OFFSET, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(PRIME)
    });
    let [a, b, c, d, e, f, g, h] = hash.to_le_bytes();
    [a & 0xfc | 0x02, b, c ^ g, d ^ h, e, f]
}

/// Writes a MAC address as [`parse_mac`] reads it.
pub fn format_mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Reads a MAC address such as `52:54:00:12:34:56`.
pub fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("`{text}` is no MAC address; write 52:54:00:12:34:56");
    let parts: Vec<_> = text.split(':').collect();
    let parts: [&str; 6] = parts.try_into().map_err(|_| wrong())?;
    let mut mac = [0; 6];
    for (byte, part) in mac.iter_mut().zip(parts) {
        if part.len() != 2 {
            return Err(wrong());
        }
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(format!(
            "`{text}` is a group's address or none; a guest needs one of its own"
        ));
    }
    Ok(mac)
}

/// Checks a machine's name: it becomes part of paths and unit names.
pub fn validate_name(name: &str) -> Result<(), SpecError> {
    let first_ok = name
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric());
    let rest_ok = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if first_ok && rest_ok && name.len() <= 48 {
        return Ok(());
    }
    Err(field(
        "name",
        format!("{name:?} is not 1 to 48 of a-z A-Z 0-9 . _ - beginning with a letter or digit"),
    ))
}

/// Reads a size such as `256M`, `2G`, `8GiB` or a number of bytes. Units are powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("`{text}` is no size; write 512M or 2G"))?;
    let shift = match &text[digits.len()..] {
        "" | "B" => 0,
        "K" | "KiB" | "k" => 10,
        "M" | "MiB" | "m" => 20,
        "G" | "GiB" | "g" => 30,
        "T" | "TiB" | "t" => 40,
        unit => return Err(format!("`{unit}` is no unit of size; use K, M, G or T")),
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("`{text}` is more bytes than 64 bits can count"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> MachineSpec {
        MachineSpec {
            name: "web-1".into(),
            cpus: 2,
            memory: MemorySpec::default(),
            kernel: KernelSpec {
                path: "/k".into(),
                initrd: None,
                cmdline: String::new(),
            },
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            rng: false,
            clock: ClockSpec::default(),
            blackout_budget: DEFAULT_BUDGET,
        }
    }

    fn net(tap: &str) -> NetSpec {
        NetSpec {
            tap: tap.into(),
            mac: None,
            queue_pairs: 1,
        }
    }

    fn disk(path: &str) -> DiskSpec {
        DiskSpec {
            path: path.into(),
            read_only: false,
        }
    }

    #[test]
    fn memory_that_outlives_the_kernel_is_of_whole_2_mib() {
        let kernel = |change: fn(&mut MemorySpec)| {
            refused(|s| {
                s.memory.survive = Survive::Kernel;
                change(&mut s.memory);
            })
        };
        assert!(kernel(|m| m.size = 33 << 20).contains("`memory.size`"));
        assert!(kernel(|m| m.pages = Pages::Thp).contains("`memory.pages`"));
        let at = || CarveOutSpec {
            path: "/dev/dax0.0".into(),
            ram: 4 << 20,
            record: 3 << 20,
            record_len: 2 << 20,
        };
        let placed = refused(|s| {
            s.memory.survive = Survive::Kernel;
            s.memory.carve_out = Some(at());
        });
        assert!(placed.contains("`memory.carve_out`"), "{placed}");
        assert!(refused(|s| s.memory.carve_out = Some(at())).contains("`kernel` alone"));
        assert!(CarveOutSpec::memfd(4 << 20, 4 << 20).is_memfd() && !at().is_memfd());
        let apart = kernel(|m| {
            let own = CarveOutSpec::memfd(m.size, 4 << 20);
            let record = own.record + (2 << 20);
            m.carve_out = Some(CarveOutSpec { record, ..own });
        });
        assert!(apart.contains("behind it"), "{apart}");
        let mut sound = spec();
        sound.memory.survive = Survive::Kernel;
        sound.validate().expect("the daemon finds its place later");
        let plain = serde_json::to_string(&spec()).expect("JSON");
        assert!(
            !plain.contains("survive"),
            "an older release reads it: {plain}"
        );
    }

    #[test]
    fn a_context_id_made_of_a_name_is_one_that_may_be() {
        let cids: Vec<_> = (0..1000)
            .map(|n| VsockSpec::for_name(&format!("web-{n}")).cid)
            .collect();
        assert!(cids.iter().all(|cid| (MIN_CID..u32::MAX).contains(cid)));
        // Kept for ever: a guest that is started anew finds its own.
        assert_eq!(VsockSpec::for_name("web-1").cid, 1_991_751_458);
    }

    #[test]
    fn devices_that_can_not_be_are_named() {
        assert!(refused(|s| s.disks = vec![disk("")]).contains("`disks.path`"));
        assert!(refused(|s| s.disks = vec![disk("/a"), disk("/a")]).contains("twice"));
        assert!(refused(|s| s.disks = vec![disk("/a"); 19]).contains("`disks`"));
        assert!(
            refused(|s| s.nets = vec![net("a-name-too-long-for-linux")]).contains("`nets.tap`")
        );
        assert!(refused(|s| s.nets = vec![net("")]).contains("`nets.tap`"));
        assert!(refused(|s| s.nets = vec![net("t"), net("t")]).contains("twice"));
        let pairs = |n| {
            move |s: &mut MachineSpec| {
                s.nets = vec![NetSpec {
                    queue_pairs: n,
                    ..net("t")
                }];
            }
        };
        assert!(refused(pairs(0)).contains("`nets.queue_pairs`"));
        assert!(refused(pairs(9)).contains("`nets.queue_pairs`"));
        for mac in [
            "52:54",
            "01:00:00:00:00:01",
            "zz:54:00:12:34:56",
            "00:00:00:00:00:00",
        ] {
            let with = |s: &mut MachineSpec| {
                s.nets = vec![NetSpec {
                    mac: Some(mac.into()),
                    ..net("t")
                }];
            };
            assert!(refused(with).contains("`nets.mac`"), "{mac}");
        }
        assert!(refused(|s| s.vsock = Some(VsockSpec { cid: 2 })).contains("`vsock.cid`"));
        assert_eq!(
            parse_mac("52:54:00:12:34:56"),
            Ok([0x52, 0x54, 0, 0x12, 0x34, 0x56])
        );
    }

    #[test]
    fn a_clock_that_is_held_is_corrected() {
        let hold = |s: &mut MachineSpec| s.clock.policy = Policy::Hold;
        assert!(refused(hold).contains("`clock.policy`"));
        let by = |correction| move |s: &mut MachineSpec| s.clock.correction = Some(correction);
        assert!(refused(by(Correction::Step)).contains("`clock.correction`"));
        assert!(refused(by(Correction::Slew)).contains("`clock.correction`"));
        let mut spec = spec();
        hold(&mut spec);
        by(Correction::Ptp)(&mut spec);
        spec.validate().expect("the guest sees to it");
        spec.clock.correction = None;
        spec.vsock = Some(VsockSpec { cid: 3 });
        spec.validate().expect("the agent sees to it");
        assert_eq!(spec.correction(), Some(Correction::Step));
    }

    #[test]
    fn an_interface_keeps_its_address_for_ever() {
        let mut spec = spec();
        assert_eq!(spec.mac(0), None);
        spec.nets = vec![net("t"), net("u")];
        // Guests know these: they never change.
        let text = |number| spec.mac(number).map(format_mac).expect("there");
        assert_eq!(text(0), "92:a9:20:aa:09:e7");
        assert_ne!(text(0), text(1));
        assert_eq!(parse_mac(&text(0)).expect("no group's")[0] & 3, 2);
        spec.nets[0].mac = Some("52:54:00:12:34:56".into());
        assert_eq!(spec.mac(0), Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
    }

    fn refused(change: impl FnOnce(&mut MachineSpec)) -> String {
        let mut spec = spec();
        change(&mut spec);
        spec.validate().expect_err("must be refused").to_string()
    }

    #[test]
    fn errors_name_the_field() {
        assert!(refused(|s| s.name = "../x".into()).contains("`name`"));
        assert!(refused(|s| s.name = String::new()).contains("`name`"));
        assert!(refused(|s| s.cpus = 0).contains("`cpus`"));
        assert!(refused(|s| s.cpus = 255).contains("`cpus`"));
        assert!(refused(|s| s.memory.size = 4096).contains("`memory.size`"));
        assert!(refused(|s| s.memory.size += 1).contains("`memory.size`"));
        assert!(refused(|s| s.memory.size = 1 << 50).contains("`memory.size`"));
        assert!(refused(|s| s.kernel.path = "".into()).contains("`kernel.path`"));
        assert!(refused(|s| s.kernel.cmdline = "x".repeat(4000)).contains("`kernel.cmdline`"));
        assert!(refused(|s| s.kernel.cmdline = "a\nb".into()).contains("`kernel.cmdline`"));
        assert!(refused(|s| s.blackout_budget = Duration::ZERO).contains("`blackout_budget_ns`"));
        assert!(
            refused(|s| s.blackout_budget = Duration::from_secs(31))
                .contains("`blackout_budget_ns`")
        );
        spec().validate().expect("a good spec");
    }

    #[test]
    fn unknown_fields_are_named() {
        let error = MachineSpec::from_json(r#"{"name":"a","kernel":{"path":"/k"},"cpu":2}"#)
            .expect_err("unknown field");
        assert!(error.to_string().contains("`cpu`"), "{error}");
    }

    #[test]
    fn json_round_trip() {
        let text = serde_json::to_string(&spec()).expect("to JSON");
        assert_eq!(MachineSpec::from_json(&text).expect("from JSON"), spec());
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("256M"), Ok(256 << 20));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert!(parse_size("2Q").expect_err("unit").contains("`Q`"));
        assert!(parse_size("99999999T").is_err());
        assert!(parse_size("").is_err());
    }
}

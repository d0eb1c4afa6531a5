//! What a machine is, as its owner wrote it.
//!
//! A [`MachineSpec`] comes from a JSON file or from flags, and is validated once, by
//! [`MachineSpec::validate`], before anything is created. Every error names the field. Unknown
//! fields are refused: a misspelt option must not silently mean its default.

mod devices;
mod memory;

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::devices::{
    DiskSpec, MAX_QUEUE_PAIRS, MIN_CID, NetSpec, VsockSpec, format_mac, parse_mac,
};
use self::devices::{default_mac, validate_net};
pub use self::memory::{
    CarveOutSpec, LIVE_UPDATE, MAX_NODES, MIN_MEMORY, MemorySpec, Pages, Survive,
};
use crate::clock::{ClockSpec, Correction, Policy, is_default};

/// The most vCPUs of a machine: 8-bit APIC ids, 255 being the broadcast.
pub const MAX_VCPUS: u8 = 254;
/// The ceiling of every blackout budget.
pub const MAX_BUDGET: Duration = Duration::from_secs(30);
/// The budget of a VMM swap when nothing else is said.
pub const DEFAULT_BUDGET: Duration = Duration::from_secs(1);
/// The longest command line, bytes (the Linux boot protocol's `cmdline_size` of current kernels).
pub const MAX_CMDLINE: usize = 2047;

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

fn default_budget() -> Duration {
    DEFAULT_BUDGET
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
        self.memory.validate()?;
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
mod tests;

//! What a machine is, as its owner wrote it.
//!
//! A [`MachineSpec`] comes from a JSON file or from flags, and is validated once, by
//! [`MachineSpec::validate`], before anything is created. Every error names the field. Unknown
//! fields are refused: a misspelt option must not silently mean its default.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

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
}

impl Default for MemorySpec {
    fn default() -> Self {
        Self {
            size: 256 << 20,
            pages: Pages::Base,
        }
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
        if self.blackout_budget.is_zero() || self.blackout_budget > MAX_BUDGET {
            let given = self.blackout_budget;
            return Err(field(
                "blackout_budget_ns",
                format!("{given:?} is not more than 0 and at most {MAX_BUDGET:?}"),
            ));
        }
        Ok(())
    }

    fn validate_memory(&self) -> Result<(), SpecError> {
        let MemorySpec { size, pages } = self.memory;
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
        Ok(())
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
            blackout_budget: DEFAULT_BUDGET,
        }
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

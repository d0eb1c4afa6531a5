//! The machine it ran on.
#![allow(unsafe_code)] // Reading the TSC.

use std::time::{Duration, Instant};

use serde::Serialize;
use stillpoint_control::spec::Pages;
use stillpoint_tests::ground;

/// Over this the TSC's frequency is measured.
const CALIBRATION: Duration = Duration::from_millis(100);
/// Host RAM that must be free beside a guest's, MiB.
const BESIDE_MIB: u64 = 2048;

/// Facts that a figure means nothing without.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Facts {
    /// Cores this process may use.
    pub(crate) cores: usize,
    /// Model of the processor.
    pub(crate) cpu: String,
    /// `uname -r`.
    pub(crate) kernel: String,
    /// Frequency of the TSC, measured.
    pub(crate) tsc_khz: u64,
    /// The host's clocksource.
    pub(crate) clocksource: String,
    /// Whose KVM: modules in use.
    pub(crate) kvm: String,
    /// Whether the memfd of a guest may get huge pages.
    pub(crate) thp_shmem: String,
    /// Load average over a minute, before.
    pub(crate) load_before: f64,
    /// And after.
    pub(crate) load_after: f64,
    /// Whether the bench pinned anything to cores (releases may place their own threads).
    pub(crate) pinned: bool,
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .unwrap_or_else(|_| "unknown".into())
}

/// The load average over a minute.
pub(crate) fn load() -> f64 {
    let text = read("/proc/loadavg");
    let first = text.split_whitespace().next().map(str::parse);
    first.and_then(Result::ok).unwrap_or(0.0)
}

/// Memory that this host could still give, KiB.
pub(crate) fn available_kib() -> u64 {
    let meminfo = read("/proc/meminfo");
    let line = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").parse().ok());
    kib.unwrap_or(0)
}

/// What this host lacks for a guest with so much RAM in such pages.
pub(crate) fn lacks(memory_mib: u64, pages: Pages) -> Option<String> {
    let free = available_kib() >> 10;
    match pages {
        Pages::Thp if ["never", "deny"].contains(&thp_of_shared_memory().as_str()) => {
            Some("this host gives shared memory no transparent huge pages (/sys/kernel/mm/transparent_hugepage/shmem_enabled)".into())
        }
        Pages::Hugetlb2m if free_huge_pages() * 2 < memory_mib => {
            Some("this host has not so many huge pages reserved (/proc/sys/vm/nr_hugepages)".into())
        }
        Pages::Base | Pages::Thp if free < memory_mib + BESIDE_MIB => {
            Some(format!("only {free} MiB of this host's RAM are free"))
        }
        _ => None,
    }
}

/// Whether this host gives shared memory transparent huge pages, in the kernel's words.
fn thp_of_shared_memory() -> String {
    chosen(&read("/sys/kernel/mm/transparent_hugepage/shmem_enabled"))
}

/// Huge pages of 2 MiB that are reserved and not in use.
fn free_huge_pages() -> u64 {
    let free = read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    free.parse().unwrap_or(0)
}

/// What can be known of this machine; `load_before` as it was before measuring.
pub(crate) fn facts(load_before: f64) -> Facts {
    let modules = std::fs::read_dir("/sys/module").into_iter().flatten();
    let mut kvm: Vec<_> = modules
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm"))
        .collect();
    kvm.sort();
    let cpu = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map(|rest| rest.trim_start_matches(['\t', ' ', ':']).to_owned());
    Facts {
        cores: ground::cores(),
        cpu: cpu.unwrap_or_else(|| "unknown".into()),
        kernel: read("/proc/sys/kernel/osrelease"),
        tsc_khz: tsc_khz(),
        clocksource: read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        kvm: kvm.join(", "),
        thp_shmem: thp_of_shared_memory(),
        load_before,
        load_after: load(),
        pinned: false,
    }
}

/// The word in brackets of a setting that shows its choices.
fn chosen(setting: &str) -> String {
    ground::chosen(setting).unwrap_or(setting).to_owned()
}

/// Frequency of the TSC by the monotonic clock.
pub(crate) fn tsc_khz() -> u64 {
    let (begin, first) = (Instant::now(), tsc());
    std::thread::sleep(CALIBRATION);
    let (took, last) = (begin.elapsed(), tsc());
    let cycles = u128::from(last.saturating_sub(first));
    u64::try_from(cycles * 1_000_000 / took.as_nanos().max(1)).unwrap_or(0)
}

fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

//! The command line: `key=value` words, unknown ones ignored.

use core::cell::UnsafeCell;

use stillpoint_guest_abi::pulse::{MAX_VCPUS, Mode};

use crate::modes;

/// Which timers the loop arms.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kinds {
    /// One-shot and TSC-deadline in turn.
    Both,
    /// LAPIC one-shot only.
    Oneshot,
    /// TSC-deadline only.
    Deadline,
    /// LAPIC periodic.
    Periodic,
    /// None.
    None,
}

/// What the command line asked for.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    /// `mode=` and `modeN=`.
    pub(crate) modes: [Mode; MAX_VCPUS],
    /// `cpus=`, or what CPUID says.
    pub(crate) cpus: usize,
    /// `online=`: vCPUs started at boot.
    pub(crate) online: usize,
    /// `ram=`: length of the RAM pattern in bytes (`K`, `M`, `G`).
    pub(crate) ram: u64,
    /// `touch=`: bytes of RAM written once, the pattern among them.
    pub(crate) touch: u64,
    /// `ram_from=`: the pattern lies at or above this address.
    pub(crate) ram_from: u64,
    /// `timers=`.
    pub(crate) timers: Kinds,
    /// `duty=`: percent of each 10 ms to be awake.
    pub(crate) duty: u64,
    /// `gap_us=`: gaps longer than this are logged.
    pub(crate) gap_us: u64,
}

struct Cell(UnsafeCell<Options>);

// SAFETY: written once, by the BSP, before any other vCPU runs.
unsafe impl Sync for Cell {}

static OPTIONS: Cell = Cell(UnsafeCell::new(DEFAULT));

/// Everything below holds the image and what the loader left.
pub(crate) const ABOVE_IMAGE: u64 = 16 << 20;

const DEFAULT: Options = Options {
    modes: [Mode::Spin; MAX_VCPUS],
    cpus: 1,
    online: MAX_VCPUS,
    ram: 4 << 20,
    touch: 0,
    ram_from: ABOVE_IMAGE,
    timers: Kinds::Both,
    duty: 100,
    gap_us: 100,
};

/// The options in force.
pub(crate) fn get() -> &'static Options {
    // SAFETY: no one writes after bring-up.
    unsafe { &*OPTIONS.0.get() }
}

/// Puts options in force. The BSP calls it once, alone.
pub(crate) fn set(options: Options) {
    // SAFETY: as `get`.
    unsafe { *OPTIONS.0.get() = options };
}

/// Reads a command line for a machine of `cpus` vCPUs.
pub(crate) fn parse(line: &str, cpus: usize) -> Options {
    let mut options = Options { cpus, ..DEFAULT };
    let words = || {
        line.split_ascii_whitespace()
            .filter_map(|word| word.split_once('='))
    };
    for (key, value) in words() {
        match key {
            "mode" => options.modes = [modes::parse(value).unwrap_or(Mode::Spin); MAX_VCPUS],
            "cpus" => options.cpus = number(value, cpus as u64) as usize,
            "online" => options.online = number(value, u64::MAX) as usize,
            "ram" => options.ram = size(value, DEFAULT.ram),
            "touch" => options.touch = size(value, DEFAULT.touch),
            "duty" => options.duty = number(value, 100).clamp(1, 100),
            "gap_us" => options.gap_us = number(value, DEFAULT.gap_us).max(1),
            // Below lie the image and what the loader left.
            "ram_from" => {
                options.ram_from = size(value, DEFAULT.ram_from).max(DEFAULT.ram_from);
            }
            "timers" => options.timers = kinds(value),
            _ => {}
        }
    }
    // After `mode=`, wherever it stood.
    for (key, value) in words() {
        let vcpu = key
            .strip_prefix("mode")
            .and_then(|n| n.parse::<usize>().ok());
        if let (Some(vcpu @ 0..MAX_VCPUS), Some(mode)) = (vcpu, modes::parse(value)) {
            options.modes[vcpu] = mode;
        }
    }
    options.cpus = options.cpus.clamp(1, MAX_VCPUS);
    options.online = options.online.clamp(1, options.cpus);
    options
}

fn kinds(value: &str) -> Kinds {
    match value {
        "oneshot" => Kinds::Oneshot,
        "deadline" => Kinds::Deadline,
        "periodic" => Kinds::Periodic,
        "none" => Kinds::None,
        _ => Kinds::Both,
    }
}

fn number(value: &str, default: u64) -> u64 {
    value.parse().unwrap_or(default)
}

fn size(value: &str, default: u64) -> u64 {
    let (digits, unit) = match value.as_bytes().last() {
        Some(b'K') => (&value[..value.len() - 1], 1 << 10),
        Some(b'M') => (&value[..value.len() - 1], 1 << 20),
        Some(b'G') => (&value[..value.len() - 1], 1 << 30),
        _ => (value, 1),
    };
    digits
        .parse::<u64>()
        .map_or(default, |n| n.saturating_mul(unit))
}

//! The command line: `key=value` words, unknown ones ignored.

use core::cell::UnsafeCell;

use stillpoint_guest_abi::attack;
use stillpoint_guest_abi::pulse::{MAX_VCPUS, Mode};
use stillpoint_guest_virtio::registers::kind;

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

/// How a vCPU learns of what a device has done.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waits {
    /// It looks at the used rings, and asks for no interrupt.
    Poll = 0,
    /// It looks after an interrupt only.
    Interrupt = 1,
    /// That, and it halts until there is one.
    Halt = 2,
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
    /// `touch=`: bytes of RAM written once, the pattern among them; until then the other vCPUs hardly run.
    pub(crate) touch: u64,
    /// `ram_from=`: the pattern lies at or above this address.
    pub(crate) ram_from: u64,
    /// `timers=`.
    pub(crate) timers: Kinds,
    /// `period_us=`: of periodic timers.
    pub(crate) period_us: u64,
    /// `duty=`: percent of each 10 ms to be awake, once all of `touch=` is written.
    pub(crate) duty: u64,
    /// `gap_us=`: gaps longer than this are logged.
    pub(crate) gap_us: u64,
    /// `devN=`: the virtio device of vCPU N, counted from 0; without it, the first of the kind
    /// that is free.
    pub(crate) slots: [Option<usize>; MAX_VCPUS],
    /// `tscN=`: cycles by which vCPU N moves its TSC before anything else.
    pub(crate) skews: [u64; MAX_VCPUS],
    /// `wait=`.
    pub(crate) waits: Waits,
    /// `queue=`: descriptors in each ring.
    pub(crate) queue: u16,
    /// `blocks=`: how many blocks of a disk are written.
    pub(crate) blocks: u64,
    /// `port=`: the host's vsock port to connect to; 0: none.
    pub(crate) port: u32,
    /// `hostile=`: the kind of device to attack, all if none is named.
    pub(crate) victim: Option<u32>,
    /// `attack=`: the only attack to make, by its name's number.
    pub(crate) attack: Option<usize>,
    /// `seed=`: of mode `hostile`.
    pub(crate) seed: u64,
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
    period_us: 2000,
    duty: 100,
    gap_us: 100,
    slots: [None; MAX_VCPUS],
    skews: [0; MAX_VCPUS],
    waits: Waits::Interrupt,
    queue: 64,
    blocks: 1024,
    port: 0,
    victim: None,
    attack: None,
    seed: 1,
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
            // KVM's shortest is 200 µs; a count has 32 bits of nanoseconds.
            "period_us" => {
                options.period_us = number(value, DEFAULT.period_us).clamp(200, 4_000_000);
            }
            "wait" => options.waits = waits(value),
            "queue" => options.queue = number(value, DEFAULT.queue.into()).clamp(8, 64) as u16,
            "blocks" => options.blocks = number(value, DEFAULT.blocks),
            "port" => options.port = number(value, 0) as u32,
            "hostile" => options.victim = device_kind(value),
            "attack" => options.attack = attack::NAMES.iter().position(|name| *name == value),
            "seed" => options.seed = number(value, DEFAULT.seed),
            _ => {}
        }
    }
    // After `mode=`, wherever it stood.
    for (key, value) in words() {
        let vcpu = |prefix| {
            let number = key.strip_prefix(prefix)?.parse::<usize>().ok()?;
            (number < MAX_VCPUS).then_some(number)
        };
        if let (Some(vcpu), Some(mode)) = (vcpu("mode"), modes::parse(value)) {
            options.modes[vcpu] = mode;
        }
        if let (Some(vcpu), Ok(slot)) = (vcpu("dev"), value.parse()) {
            options.slots[vcpu] = Some(slot);
        }
        if let Some(vcpu) = vcpu("tsc") {
            options.skews[vcpu] = number(value, 0);
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

fn waits(value: &str) -> Waits {
    match value {
        "poll" => Waits::Poll,
        "halt" => Waits::Halt,
        _ => Waits::Interrupt,
    }
}

fn device_kind(value: &str) -> Option<u32> {
    match value {
        "blk" => Some(kind::BLK),
        "net" => Some(kind::NET),
        "rng" => Some(kind::RNG),
        "vsock" => Some(kind::VSOCK),
        _ => None,
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

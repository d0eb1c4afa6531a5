//! What each vCPU is to do: names, the mode wanted of each, and the extra work of some modes.

use core::fmt::Write;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering::Acquire, Ordering::Release};

use stillpoint_guest_abi::probe::{MMIO_BASE, REG_SCRATCH};
use stillpoint_guest_abi::pulse::{MAX_VCPUS, Mode, Report};

use crate::gaps::Gaps;
use crate::pages::{self, add, field};
use crate::serial::Serial;

const NAMES: [(Mode, &str); 12] = [
    (Mode::Offline, "offline"),
    (Mode::Spin, "spin"),
    (Mode::Halt, "halt"),
    (Mode::Pio, "pio"),
    (Mode::Mmio, "mmio"),
    (Mode::Masked, "masked"),
    (Mode::Idle, "idle"),
    (Mode::Blk, "blk"),
    (Mode::Net, "net"),
    (Mode::Rng, "rng"),
    (Mode::Vsock, "vsock"),
    (Mode::Hostile, "hostile"),
];

static WANTED: [AtomicU32; MAX_VCPUS] = [const { AtomicU32::new(0) }; MAX_VCPUS];
/// Only one vCPU at a time uses the scratch register.
static SCRATCH_BUSY: AtomicBool = AtomicBool::new(false);

/// A mode by its name, but for `offline`.
pub(crate) fn parse(name: &str) -> Option<Mode> {
    NAMES[1..]
        .iter()
        .find(|(_, n)| *n == name)
        .map(|(mode, _)| *mode)
}

/// The name of a mode's number.
pub(crate) fn name(mode: u32) -> &'static str {
    NAMES.get(mode as usize).map_or("?", |(_, name)| name)
}

/// The mode wanted of a vCPU.
pub(crate) fn wanted(vcpu: usize) -> Mode {
    let number = WANTED[vcpu].load(Acquire);
    NAMES
        .get(number as usize)
        .map_or(Mode::Spin, |(mode, _)| *mode)
}

/// Asks a mode of a vCPU; it follows when it next looks.
pub(crate) fn want(vcpu: usize, mode: Mode) {
    WANTED[vcpu].store(mode as u32, Release);
}

/// Writes the next known line, a few bytes in each `rep outsb`: between bytes a vCPU is in the
/// midst of an instruction. Skips its turn while another vCPU writes.
pub(crate) fn pio(vcpu: usize, report: *mut Report, gaps: &mut Gaps) {
    const BURST: usize = 8;
    let Some(mut serial) = Serial::try_lock() else {
        return;
    };
    let lines = field!(report.pio_lines);
    let mut line = Line {
        bytes: [0; 64],
        len: 0,
    };
    let number = lines.load(core::sync::atomic::Ordering::Relaxed);
    if writeln!(
        line,
        "pio {vcpu} {number:08} abcdefghijklmnopqrstuvwxyz0123456789"
    )
    .is_err()
    {
        return;
    }
    for burst in line.bytes[..line.len].chunks(BURST) {
        serial.write(burst);
        gaps.tick();
    }
    add(lines, 1);
}

/// Writes numbers to the probe's scratch register and expects each back, twice: by a plain read,
/// and by a string read that goes on into the table register. Does nothing without a probe.
pub(crate) fn mmio(report: *mut Report, gaps: &mut Gaps) {
    const ROUNDS: u64 = 4;
    if SCRATCH_BUSY.swap(true, Acquire) {
        return;
    }
    if pages::is_announced() && pages::has_probe() {
        for _ in 0..ROUNDS {
            gaps.tick();
            exercise_scratch(report);
        }
    }
    SCRATCH_BUSY.store(false, Release);
}

fn exercise_scratch(report: *mut Report) {
    let (ops, errors) = (field!(report.mmio_ops), field!(report.mmio_errors));
    let scratch = (MMIO_BASE + REG_SCRATCH) as *mut u64;
    let number = ops.load(core::sync::atomic::Ordering::Relaxed) ^ 0x5350_0000_0000_0000;
    let mut string = [0u64; 2];
    // SAFETY: the device is there, and has these two registers side by side.
    let plain = unsafe {
        scratch.write_volatile(number);
        let plain = scratch.read_volatile();
        core::arch::asm!("rep movsq", inout("rcx") 2u64 => _, inout("rsi") scratch => _,
            inout("rdi") string.as_mut_ptr() => _, options(nostack, preserves_flags));
        plain
    };
    add(ops, 4);
    add(errors, u64::from(plain != number));
    add(errors, u64::from(string != [number, pages::table()]));
}

/// A line being made.
struct Line {
    bytes: [u8; 64],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let end = self.len + text.len();
        let room = self.bytes.get_mut(self.len..end).ok_or(core::fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}

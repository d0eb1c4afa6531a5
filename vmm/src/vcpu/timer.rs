//! The local APIC's timer across a swap: fired once, never twice, never lost.
//!
//! KVM keeps a timer that has expired but whose interrupt it has not injected yet in a counter of
//! its own, which no ioctl shows (lapic.c, `lapic_timer.pending`); it injects at the next
//! `KVM_RUN`. And `KVM_SET_LAPIC` starts a one-shot timer again whenever its initial count is not
//! zero, also one that has long fired. So:
//! * a vCPU with a timer that is due is *settled* before it is read, until what is read before
//!   and after agrees: then a fired timer is in the IRR (or was taken), and nowhere else;
//! * a one-shot timer that has fired is saved disarmed (initial count 0);
//! * a count that still runs is moved on by the pause when it is loaded; a periodic timer keeps
//!   its phase (`phase`), and a tick that the pause swallowed is put into the IRR, as KVM would
//!   coalesce it.

pub(super) mod phase;

use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;

use super::error::VcpuError;
use super::msrs;
use super::placement::Home;
use super::settle::settle;
use crate::clock;

// Register offsets (Intel SDM vol. 3, table 11-1).
const IRR: usize = 0x200;
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE: usize = 0x3e0;
const MASKED: u32 = 1 << 16;

/// What the timer is set to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Counts down once.
    OneShot,
    /// Counts down again and again.
    Periodic,
    /// Fires when the TSC passes IA32_TSC_DEADLINE.
    Deadline,
}

/// A local APIC's registers by name.
#[derive(Clone, Copy, Debug)]
pub struct Lapic(pub kvm_lapic_state);

impl Lapic {
    /// Reads one register.
    pub fn register(&self, at: usize) -> u32 {
        self.0.regs[at..]
            .first_chunk()
            .map_or(0, |bytes| u32::from_le_bytes(bytes.map(i8::cast_unsigned)))
    }

    pub(super) fn set(&mut self, at: usize, value: u32) {
        let bytes = value.to_le_bytes().map(u8::cast_signed);
        self.0.regs[at..at + 4].copy_from_slice(&bytes);
    }

    /// The timer's mode; `None` for the reserved encoding.
    pub fn mode(&self) -> Option<Mode> {
        match self.register(LVT_TIMER) >> 17 & 3 {
            0 => Some(Mode::OneShot),
            1 => Some(Mode::Periodic),
            2 => Some(Mode::Deadline),
            _ => None,
        }
    }

    /// Whether a count was ever started (and the guest has not stopped it).
    fn is_counting(&self) -> bool {
        self.register(INITIAL_COUNT) != 0
    }

    /// Whether its timer ticks again and again, now.
    pub(super) fn is_periodic(&self) -> bool {
        self.is_counting() && self.mode() == Some(Mode::Periodic)
    }

    /// Bus cycles (1 ns each in KVM) a count lasts.
    fn divisor(&self) -> u64 {
        // SDM vol. 3, figure 11-10: bits 3,1,0; 0b111 divides by 1, n by 2^(n+1).
        let bits = self.register(DIVIDE);
        let code = bits & 3 | bits >> 1 & 4;
        1 << ((code + 1) & 7)
    }

    fn pend_timer_interrupt(&mut self) {
        let lvt = self.register(LVT_TIMER);
        let vector = lvt & 0xff;
        if lvt & MASKED == 0 && vector >= 16 {
            let word = IRR + (vector / 32) as usize * 16;
            self.set(word, self.register(word) | 1 << (vector % 32));
        }
    }

    /// Moves a running count on by `passed` nanoseconds.
    pub fn advance(&mut self, passed_ns: u64) {
        let (initial, current) = (self.register(INITIAL_COUNT), self.register(CURRENT_COUNT));
        // Of a periodic timer 0 is a tick that is due; of a one-shot one that has fired.
        if initial == 0 || (current == 0 && self.mode() != Some(Mode::Periodic)) {
            return;
        }
        let passed = passed_ns / self.divisor();
        let left = u64::from(current)
            .checked_sub(passed)
            .filter(|&left| left > 0);
        match (self.mode(), left) {
            (Some(Mode::OneShot | Mode::Periodic), Some(left)) => {
                self.set(CURRENT_COUNT, u32::try_from(left).unwrap_or(current));
            }
            // Overdue: the least count that KVM takes for a running timer fires at once.
            (Some(Mode::OneShot), None) => self.set(CURRENT_COUNT, 1),
            (Some(Mode::Periodic), None) => {
                self.pend_timer_interrupt();
                let into = (passed - u64::from(current)) % u64::from(initial);
                let left = u64::from(initial) - into;
                self.set(CURRENT_COUNT, u32::try_from(left).unwrap_or(initial));
            }
            _ => {}
        }
    }
}

fn read(fd: &VcpuFd) -> Result<Lapic, VcpuError> {
    fd.get_lapic()
        .map(Lapic)
        .map_err(VcpuError::kvm("save the local APIC"))
}

/// A local APIC as it was saved.
#[derive(Debug)]
pub struct SavedLapic {
    /// Registers.
    pub lapic: Lapic,
    /// IA32_TSC_DEADLINE as it belongs to them.
    pub deadline: Option<u64>,
    /// Host TSC when they were read.
    pub host_tsc: u64,
    /// Whether the vCPU was settled for it, which may have ended a halt.
    pub settled: bool,
}

/// Saves local APIC and TSC deadline so that they belong together. The vCPU is parked, its kick
/// pending.
pub fn save(fd: &mut VcpuFd, deadline: Option<u64>) -> Result<SavedLapic, VcpuError> {
    // KVM tells of one in this mode alone (lapic.c, `kvm_get_lapic_tscdeadline_msr`).
    if deadline.is_some_and(is_armed) {
        return save_deadline(fd);
    }
    let lapic = read(fd)?;
    let host_tsc = clock::host_tsc();
    match lapic.mode() {
        Some(Mode::OneShot) if lapic.is_counting() => save_one_shot(fd, lapic, host_tsc),
        Some(Mode::Periodic) if lapic.is_periodic() => phase::save(fd),
        _ => Ok(SavedLapic {
            lapic,
            deadline,
            host_tsc,
            settled: false,
        }),
    }
}

fn save_one_shot(fd: &mut VcpuFd, lapic: Lapic, host_tsc: u64) -> Result<SavedLapic, VcpuError> {
    if lapic.register(CURRENT_COUNT) != 0 {
        return Ok(SavedLapic {
            lapic,
            deadline: None,
            host_tsc,
            settled: false,
        });
    }
    gather_expired(fd)?;
    let mut lapic = read(fd)?;
    lapic.set(INITIAL_COUNT, 0);
    Ok(SavedLapic {
        lapic,
        deadline: None,
        host_tsc,
        settled: true,
    })
}

/// Brings the interrupt of an expired one-shot timer into the IRR, or further, wherever it is on
/// its way.
///
/// KVM's timer lives on the core on which the vCPU ran last. After a halt that need not be the one
/// we woke up on, and KVM moves the timer only when the vCPU is entered (x86.c,
/// KVM_REQ_MIGRATE_TIMER), which one that is halted is not. So, made runnable and bound to one
/// core: settle, and the timer is here; sleep, and as our own timer is due later on the same
/// core's clock, KVM's has fired; settle, and what fired is injected.
fn gather_expired(fd: &mut VcpuFd) -> Result<(), VcpuError> {
    let halted = mp_state(fd)? == kvm_bindings::KVM_MP_STATE_HALTED;
    if halted {
        set_mp_state(fd, kvm_bindings::KVM_MP_STATE_RUNNABLE)?;
    }
    let home = Home::stay();
    let gathered = settle(fd).and_then(|()| {
        let _ = rustix::thread::nanosleep(&rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: 1_000,
        });
        settle(fd)
    });
    home.return_to();
    gathered?;
    // With an event injected it has left its halt; nothing else but an interrupt may end that.
    if halted && !has_event(fd)? {
        set_mp_state(fd, kvm_bindings::KVM_MP_STATE_HALTED)?;
    }
    Ok(())
}

/// What the vCPU is doing, by `KVM_MP_STATE_*`.
pub(super) fn mp_state(fd: &VcpuFd) -> Result<u32, VcpuError> {
    let state = fd.get_mp_state();
    Ok(state.map_err(VcpuError::kvm("save MP state"))?.mp_state)
}

fn set_mp_state(fd: &VcpuFd, mp_state: u32) -> Result<(), VcpuError> {
    fd.set_mp_state(kvm_bindings::kvm_mp_state { mp_state })
        .map_err(VcpuError::kvm("set MP state"))
}

/// Whether an event is on its way into the guest.
fn has_event(fd: &VcpuFd) -> Result<bool, VcpuError> {
    let events = fd
        .get_vcpu_events()
        .map_err(VcpuError::kvm("save pending events"))?;
    let injected = [
        events.interrupt.injected,
        events.nmi.injected,
        events.exception.injected,
    ];
    Ok(injected.iter().any(|&injected| injected != 0))
}

/// Whether a deadline is one; injection clears it.
fn is_armed(deadline: u64) -> bool {
    deadline != 0
}

fn save_deadline(fd: &mut VcpuFd) -> Result<SavedLapic, VcpuError> {
    settle(fd)?;
    let mut lapic = read(fd)?;
    let mut host_tsc = clock::host_tsc();
    let deadline = msrs::read_one(fd, msrs::TSC_DEADLINE)?;
    // One that is armed still was so before. On hosts that post timer interrupts one that is not may have been injected
    // between the two; from now on nothing arms it.
    if !deadline.is_some_and(is_armed) {
        lapic = read(fd)?;
        host_tsc = clock::host_tsc();
    }
    Ok(SavedLapic {
        lapic,
        deadline,
        host_tsc,
        settled: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lapic(lvt: u32, initial: u32, current: u32, divide: u32) -> Lapic {
        let mut lapic = Lapic(kvm_lapic_state::default());
        lapic.set(LVT_TIMER, lvt);
        lapic.set(INITIAL_COUNT, initial);
        lapic.set(CURRENT_COUNT, current);
        lapic.set(DIVIDE, divide);
        lapic
    }

    #[test]
    fn divisors_are_the_manuals() {
        let divisors = [
            (0, 2),
            (1, 4),
            (2, 8),
            (3, 16),
            (8, 32),
            (9, 64),
            (10, 128),
            (11, 1),
        ];
        for (bits, divisor) in divisors {
            assert_eq!(lapic(0, 1, 1, bits).divisor(), divisor, "{bits:#b}");
        }
    }

    #[test]
    fn a_one_shot_moves_on_and_an_overdue_one_fires_at_once() {
        let mut timer = lapic(0x30, 1_000, 800, 11);
        timer.advance(300);
        assert_eq!(timer.register(CURRENT_COUNT), 500);
        timer.advance(10_000);
        assert_eq!(timer.register(CURRENT_COUNT), 1);
        assert_eq!(timer.register(IRR + 16), 0, "KVM raises it, not we");
    }

    #[test]
    fn a_periodic_timer_keeps_its_phase_and_one_tick_of_those_missed() {
        let mut timer = lapic(0x30 | 1 << 17, 1_000, 800, 11);
        timer.advance(800 + 2_300);
        assert_eq!(timer.register(CURRENT_COUNT), 700);
        assert_eq!(timer.register(IRR + 16), 1 << 16, "vector 0x30 pends");
        let mut masked = lapic(0x30 | 1 << 17 | MASKED, 1_000, 800, 11);
        masked.advance(5_000);
        assert_eq!(masked.register(IRR + 16), 0);
    }

    /// One that is due, and that its host was late to fire, has not begun anew.
    #[test]
    fn a_periodic_tick_that_is_due_is_given_and_keeps_the_phase() {
        let mut timer = lapic(0x30 | 1 << 17, 1_000, 0, 11);
        timer.advance(300);
        assert_eq!(timer.register(CURRENT_COUNT), 700);
        assert_eq!(timer.register(IRR + 16), 1 << 16, "vector 0x30 pends");
    }

    #[test]
    fn a_stopped_timer_stays_stopped() {
        let mut timer = lapic(0x30, 0, 0, 11);
        timer.advance(5_000);
        assert_eq!(timer.register(CURRENT_COUNT), 0);
    }
}

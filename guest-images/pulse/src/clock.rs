//! kvmclock: enabled on each vCPU, read in ring 3, checked on one vCPU and across all.

use core::cell::UnsafeCell;
use core::sync::atomic::{Ordering::Relaxed, Ordering::SeqCst, fence};

use stillpoint_guest_abi::pulse::Report;

use crate::local::{self, Local};
use crate::pages::{self, field};
use crate::{gate, tsc};

const MSR_WALL_CLOCK: u32 = 0x4b56_4d00;
const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;
const FEATURE_CLOCKSOURCE2: u32 = 1 << 3;
const ENABLE: u64 = 1;

/// struct pvclock_vcpu_time_info.
#[derive(Clone, Copy)]
#[repr(C)]
struct PvClock {
    version: u32,
    pad: u32,
    tsc_timestamp: u64,
    system_time: u64,
    mul: u32,
    shift: i8,
    flags: u8,
    pad2: [u8; 2],
}

#[repr(C, align(16))]
struct WallClock(UnsafeCell<[u32; 4]>);

// SAFETY: only KVM writes it, and no one here reads it.
unsafe impl Sync for WallClock {}

static WALL_CLOCK: WallClock = WallClock(UnsafeCell::new([0; 4]));

/// The first of KVM's CPUID leaves, if this is KVM. They move up where it also plays Hyper-V.
pub(crate) fn hypervisor_leaf() -> Option<u32> {
    let kvm = |leaf: &u32| {
        let [_, b, c, d] = gate::cpuid(*leaf, 0);
        [b, c, d] == [0x4b4d_564b, 0x564b_4d56, 0x4d]
    };
    [0x4000_0000, 0x4000_0100].into_iter().find(kvm)
}

/// Whether KVM announces the clock.
pub(crate) fn present() -> bool {
    hypervisor_leaf().is_some_and(|leaf| gate::cpuid(leaf + 1, 0)[0] & FEATURE_CLOCKSOURCE2 != 0)
}

/// Enables the clock of the vCPU we are on; false if there is none.
pub(crate) fn enable(local: &'static Local, report: *mut Report) -> bool {
    if !present() {
        return false;
    }
    let gpa = local.pvclock.get() as u64;
    gate::wrmsr(MSR_SYSTEM_TIME, gpa | ENABLE);
    field!(report.pvclock_gpa).store(gpa, Relaxed);
    true
}

/// Has KVM write the wall clock, and tells the host where.
pub(crate) fn publish_wall_clock() {
    if present() {
        let gpa = WALL_CLOCK.0.get() as u64;
        gate::wrmsr(MSR_WALL_CLOCK, gpa);
        let globals = pages::globals();
        field!(globals.wall_clock_gpa).store(gpa, Relaxed);
    }
}

/// The TSC frequency that KVM's scale implies. Enables the BSP's clock for it.
pub(crate) fn tsc_khz() -> Option<u64> {
    let local = local::of(0);
    if !enable(local, pages::report(0)) {
        return None;
    }
    let clock = snapshot(local).0;
    if clock.mul == 0 {
        return None;
    }
    let khz = (1_000_000u64 << 32) / u64::from(clock.mul);
    Some(if clock.shift < 0 {
        khz << -clock.shift
    } else {
        khz >> clock.shift
    })
}

/// A consistent copy, and the TSC read while it held.
fn snapshot(local: &Local) -> (PvClock, u64) {
    let page = local.pvclock.get().cast::<PvClock>();
    loop {
        // SAFETY: the structure is in our own page; KVM changes it under us, hence volatile
        // reads between two looks at the version, which is odd during a change.
        let (before, copy, now, after) = unsafe {
            let before = (&raw const (*page).version).read_volatile();
            fence(SeqCst);
            let now = tsc::read();
            let copy = page.read_volatile();
            fence(SeqCst);
            (
                before,
                copy,
                now,
                (&raw const (*page).version).read_volatile(),
            )
        };
        if before == after && before & 1 == 0 {
            return (copy, now);
        }
    }
}

/// Nanoseconds since the guest's boot.
fn read(local: &Local) -> u64 {
    let (clock, now) = snapshot(local);
    let delta = now.wrapping_sub(clock.tsc_timestamp);
    let delta = if clock.shift < 0 {
        delta >> -clock.shift
    } else {
        delta << clock.shift
    };
    let ns = (u128::from(delta) * u128::from(clock.mul)) >> 32;
    clock.system_time.wrapping_add(ns as u64)
}

/// Reads the clock, and checks it against this vCPU's last reading and every other vCPU's.
pub(crate) fn check(local: &Local, report: *mut Report) {
    let globals = pages::globals();
    let high = field!(globals.clock_high_ns);
    // Whatever is read from here on must not lie below what anyone had read before.
    let floor = high.load(SeqCst);
    let now = read(local);
    if now < floor {
        field!(globals.warps).fetch_add(1, Relaxed);
        field!(globals.worst_warp_ns).fetch_max(floor - now, Relaxed);
    } else {
        high.fetch_max(now, SeqCst);
    }
    let last = field!(report.clock_ns).load(Relaxed);
    if now < last {
        pages::add(field!(report.clock_backwards), 1);
        pages::raise(field!(report.worst_backwards_ns), last - now);
    }
    field!(report.clock_ns).store(now, Relaxed);
    pages::add(field!(report.clock_reads), 1);
}

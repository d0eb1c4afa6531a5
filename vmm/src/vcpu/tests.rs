//! What KVM itself makes of a vCPU that is saved and loaded: on `/dev/kvm`, without a guest.

mod ahead;

use std::time::Duration;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use stillpoint_control::spec::MemorySpec;
use stillpoint_state::sections::Vcpu as Section;
use vm_memory::{Bytes, GuestAddress};

use super::load::{Known, LoadedVcpu, Pause};
use super::msrs::{self, Late, Passed};
use super::settle::{arm, settle};
use super::state;
use super::timer::{Lapic, Mode};
use crate::boot::cpuid;
use crate::clock::align::align;
use crate::clock::{self, host_tsc, steal::RunDelay};
use crate::irq;
use crate::memory::GuestRam;

/// IA32_TSC_ADJUST, MSR_KVM_STEAL_TIME.
const TSC_ADJUST: u32 = 0x3b;
const STEAL_TIME: u32 = 0x4b56_4d03;
/// LVT timer and spurious-interrupt registers (SDM vol. 3, table 11-1).
const LVT_TIMER: usize = 0x320;
const SPURIOUS: usize = 0xf0;
const DEADLINE_MODE: u32 = 2 << 17;
const PERIODIC_MODE: u32 = 1 << 17;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE: usize = 0x3e0;

/// A machine of one vCPU that belongs to this thread. Fields are dropped in order.
struct Bare {
    vcpu: VcpuFd,
    vm: VmFd,
    ram: GuestRam,
    khz: u32,
}

impl Bare {
    /// `None`, and a word of it, where there is no KVM.
    fn new() -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                eprintln!("SKIPPED vcpu: /dev/kvm: {error}");
                return None;
            }
        };
        let vm = kvm.create_vm().expect("VM");
        irq::create(&vm).expect("irqchip");
        let mut vcpu = vm.create_vcpu(0).expect("vCPU");
        clock::settle_masterclock(&vm).expect("clock");
        let khz = vcpu.get_tsc_khz().expect("kHz");
        let entries = cpuid::host(&kvm, 1, khz).expect("CPUID");
        let own = cpuid::for_vcpu(&entries, 0).expect("CPUID of one");
        vcpu.set_cpuid2(&own).expect("CPUID");
        let size = 16 << 20;
        let ram = GuestRam::create(&MemorySpec {
            size,
            ..MemorySpec::default()
        });
        let ram = ram.expect("RAM");
        ram.register(&vm).expect("slot");
        // The second of a thread has its kick pending already.
        if arm(&vcpu).is_err() {
            crate::raw::set_signal_mask(&vcpu, 0).expect("signal mask");
        }
        settle(&mut vcpu).expect("prime");
        Some(Self { vcpu, vm, ram, khz })
    }

    fn save(&mut self) -> Section {
        let mut list = msrs::readable(&self.vcpu).expect("MSRs");
        let (section, _) = state::save(&mut self.vcpu, &mut list, 3, self.khz).expect("save");
        section
    }

    fn load(&mut self, from: &Section, pause: Pause) -> (LoadedVcpu, Late) {
        let mut known = Known::of(&self.vcpu);
        known.load(&mut self.vcpu, from, pause, ()).expect("load")
    }

    fn msr(&self, index: u32) -> Option<u64> {
        msrs::read_one(&self.vcpu, index).expect("read")
    }
}

/// In a thread of its own: the kick that keeps a vCPU out of the guest is a thread's.
fn alone<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(act);
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[test]
fn tsc_adjust_and_an_armed_deadline_survive() {
    let saved = alone(|| {
        let mut old = Bare::new()?;
        let mut lapic = Lapic(old.vcpu.get_lapic().expect("APIC"));
        lapic.set(SPURIOUS, 0x1ff);
        lapic.set(LVT_TIMER, 0x30 | DEADLINE_MODE);
        old.vcpu.set_lapic(&lapic.0).expect("APIC");
        assert_eq!(lapic.mode(), Some(Mode::Deadline));
        let offset = crate::raw::tsc_offset(&old.vcpu).unwrap_or(0);
        let due = host_tsc().wrapping_add_signed(offset) + u64::from(old.khz) * 60_000;
        let wanted = [(TSC_ADJUST, 0x1234_5678), (msrs::TSC_DEADLINE, due)];
        msrs::write(&old.vcpu, &wanted).expect("write");
        Some((wanted, old.save()))
    });
    let Some((wanted, section)) = saved else {
        return;
    };
    alone(move || {
        let Some(mut new) = Bare::new() else { return };
        let pause = Pause::default();
        let (loaded, _) = new.load(&section, pause);
        for (index, value) in wanted {
            assert_eq!(new.msr(index), Some(value), "{index:#x}");
        }
        assert!(loaded.tsc_offset_delta.is_none_or(|delta| delta == 0));
    });
}

/// Where a periodic timer's next tick is, as KVM has it: host TSC, to half of what a reading takes, by the
/// closest of many.
fn next_tick(vcpu: &VcpuFd, khz: u32) -> u64 {
    let read = || {
        let began = host_tsc();
        let left = Lapic(vcpu.get_lapic().expect("APIC")).register(CURRENT_COUNT);
        (host_tsc() - began, began, left)
    };
    let readings = (0..200).map(|_| read()).filter(|(_, _, left)| *left != 0);
    let (width, began, left) = readings.min().expect("one that counts");
    began + width / 2 + u64::from(left) * u64::from(khz) / 1_000_000
}

/// Saved in one machine and loaded in another, over and over.
#[test]
fn a_periodic_timer_ticks_on_where_it_was() {
    const PERIOD_NS: u32 = 5_000_000;
    let worst = alone(|| {
        let (mut old, mut new) = (Bare::new()?, Bare::new()?);
        let mut lapic = Lapic(old.vcpu.get_lapic().expect("APIC"));
        lapic.set(SPURIOUS, 0x1ff);
        lapic.set(LVT_TIMER, 0x30 | PERIODIC_MODE);
        lapic.set(DIVIDE, 0xb);
        lapic.set(INITIAL_COUNT, PERIOD_NS);
        old.vcpu.set_lapic(&lapic.0).expect("APIC");
        let period = u64::from(PERIOD_NS) * u64::from(old.khz) / 1_000_000;
        let mut moved: Vec<u64> = Vec::new();
        for _ in 0..50 {
            let before = next_tick(&old.vcpu, old.khz);
            let section = old.save();
            new.load(&section, Pause::default());
            let after = next_tick(&new.vcpu, new.khz);
            let by = (after + period * 1000 - before) % period;
            moved.push(by.min(period - by) * 1_000_000 / u64::from(old.khz));
            std::mem::swap(&mut old, &mut new);
        }
        moved.sort_unstable();
        eprintln!("moved by {moved:?} ns");
        // KVM itself begins anew where its host was late by a period.
        moved.get(25).copied()
    });
    assert!(worst.is_none_or(|median| median <= 2_000), "{worst:?} ns");
}

#[test]
fn the_clock_of_a_machine_goes_on_in_another() {
    let machines = (alone(Bare::new), alone(Bare::new));
    let (Some(old), Some(new)) = machines else {
        return;
    };
    let advance = stillpoint_control::clock::Policy::Advance;
    let saved = clock::save(&old.vm, old.khz, advance).expect("save");
    if !clock::is_master(saved.flags) {
        eprintln!("SKIPPED vcpu: no masterclock on this host");
        return;
    }
    let done = align(&new.vm, &saved, 0).expect("align");
    // Both run on; at one TSC they read the same, but for what each rounds.
    let (a, b) = (
        clock::save(&old.vm, old.khz, advance).expect("read"),
        clock::save(&new.vm, new.khz, advance).expect("read"),
    );
    let between = clock::Scale::of_khz(old.khz).ns_between(a.host_tsc, b.host_tsc);
    let apart = b.clock.wrapping_sub(a.clock).cast_signed() - between;
    assert!(apart.abs() <= 50, "{apart} ns apart; {done:?}");
}

#[test]
fn kvm_counts_stolen_time_on_from_what_was_there() {
    alone(|| {
        let Some(mut new) = Bare::new() else { return };
        let at = 0x4000;
        let memory = new.ram.map().clone();
        memory
            .write_obj(5_000_000_000u64, GuestAddress(at))
            .expect("write");
        let saved = vec![(STEAL_TIME, at | 1)];
        let (_, _, late) = msrs::split(saved);
        let delay = RunDelay::of_this_thread();
        let passed = Passed {
            held: Duration::ZERO,
            stolen: Duration::from_secs(2),
            waited: delay.read(),
        };
        if late.load(&new.vcpu, &memory, passed).is_err() {
            eprintln!("SKIPPED vcpu: this KVM keeps no account of stolen time");
            return;
        }
        settle(&mut new.vcpu).expect("settle");
        let steal: u64 = memory.read_obj(GuestAddress(at)).expect("read");
        let more = steal - 7_000_000_000;
        // What the thread waited meanwhile, and nothing of its life before.
        let since = delay.read().saturating_sub(passed.waited);
        let since = u64::try_from(since.as_nanos()).expect("short");
        assert!(more <= since + 1_000_000, "{more} ns too much");
    });
}

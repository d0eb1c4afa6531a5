//! A state that is loaded ahead, and completed: it must be what a whole load makes of the last word.

use stillpoint_state::sections::Vcpu as Section;

use super::super::load::{Known, Pause};
use super::super::msrs;
use super::{Bare, alone};

const MP_HALTED: u32 = kvm_bindings::KVM_MP_STATE_HALTED;
const MP_RUNNABLE: u32 = kvm_bindings::KVM_MP_STATE_RUNNABLE;
/// Where `cr2` and `cr3` are in `struct kvm_sregs`: after 8 segments of 24 bytes, 2 tables of 16, cr0.
const CR2: usize = 8 * 24 + 2 * 16 + 8;
/// The first of the XMM registers in an XSAVE area (SDM vol. 1, 13.4.1).
const XMM0: usize = 160;
/// XSTATE_BV: which parts of the area say something. SSE is bit 1.
const XSTATE_BV: usize = 512;
/// MSRs that a guest changes, and what KVM takes for them.
const CHANGED: [(u32, u64); 8] = [
    (0x174, 0x10),
    (0x175, 0xffff_8000_0000_1000),
    (0x176, 0xffff_8000_0000_2000),
    (0xc000_0081, 0x0023_0010_0000_0000),
    (0xc000_0082, 0xffff_8000_0000_3000),
    (0xc000_0084, 0x4_7700),
    (0xc000_0102, 0x7fff_0000_4000),
    (0x40c, u64::MAX),
];

/// The same numbers in every run (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn heads(&mut self) -> bool {
        self.roll() & 1 == 1
    }
}

/// What a guest may have done since.
fn live_on(section: &mut Section, dice: &mut Dice) {
    let mut put = |bytes: &mut Vec<u8>, at: usize| {
        if dice.heads() {
            bytes[at..at + 4].copy_from_slice(&(dice.roll() as u32).to_le_bytes());
        }
    };
    put(&mut section.regs, 0);
    put(&mut section.sregs, CR2);
    put(&mut section.xsave, XMM0);
    put(&mut section.debugregs, 0);
    section.xsave[XSTATE_BV] |= 2;
    if dice.heads() {
        section.mp_state = MP_HALTED + MP_RUNNABLE - section.mp_state;
    }
    let mut msrs = section.msrs().expect("MSRs");
    for (index, some) in CHANGED {
        let value = if dice.heads() { some } else { 0 };
        msrs.retain(|(saved, _)| *saved != index);
        // As a save does it: the control of a machine check bank that is zero is left out.
        if value != 0 || index != 0x40c {
            msrs.push((index, value));
        }
    }
    msrs.sort_unstable();
    section.set_msrs(3, msrs.into_iter());
}

/// What KVM holds, but for when it was read.
fn held(machine: &mut Bare) -> Section {
    let mut section = machine.save();
    section.lapic_tsc = 0;
    section
}

/// The parts that are not the same: the whole of them would be pages of numbers.
fn differing(a: &Section, b: &Section) -> String {
    let parts = [
        ("registers ", a.regs != b.regs),
        ("system registers ", a.sregs != b.sregs),
        ("XSAVE ", a.xsave != b.xsave),
        ("XCRs ", a.xcrs != b.xcrs),
        ("debug registers ", a.debugregs != b.debugregs),
        ("events ", a.events != b.events),
        ("MP state ", a.mp_state != b.mp_state),
        ("APIC ", a.lapic != b.lapic),
        ("MSRs ", a.msrs().ok() != b.msrs().ok()),
        (
            "TSC ",
            (a.tsc_offset, a.tsc_khz) != (b.tsc_offset, b.tsc_khz),
        ),
    ];
    let differ = parts.into_iter().filter(|(_, differ)| *differ);
    differ.map(|(part, _)| part).collect()
}

#[test]
fn what_was_loaded_ahead_and_completed_is_what_a_whole_load_makes() {
    alone(|| {
        let Some(mut first) = Bare::new() else { return };
        let mut dice = Dice(0x5113_7001);
        let mut early = first.save();
        let mut written = 0;
        for round in 0..60 {
            let (Some(mut whole), Some(mut ahead)) = (Bare::new(), Bare::new()) else {
                return;
            };
            live_on(&mut early, &mut dice);
            let mut late = early.clone();
            for _ in 0..round % 3 {
                live_on(&mut late, &mut dice);
            }
            whole.load(&late, Pause::default());
            let mut known = Known::of(&ahead.vcpu);
            known.load_ahead(&ahead.vcpu, &early).expect("ahead");
            let (_, _) = known
                .load(&mut ahead.vcpu, &late, Pause::default(), ())
                .expect("the rest");
            let (a, b) = (held(&mut whole), held(&mut ahead));
            assert!(a == b, "round {round}: {}", differing(&a, &b));
            written += usize::from(a.msrs().expect("MSRs").contains(&(0x40c, u64::MAX)));
        }
        // What was put in did arrive, in some rounds and not in others.
        assert!((10..50).contains(&written), "{written}");
    });
}

/// The comparison sees what a load that trusts its memory too far would leave behind; and a load ahead
/// that fails is not trusted.
#[test]
fn what_stands_is_what_was_written_and_nothing_else() {
    alone(|| {
        let (Some(mut whole), Some(mut ahead)) = (Bare::new(), Bare::new()) else {
            return;
        };
        let section = whole.save();
        let mut known = Known::of(&ahead.vcpu);
        known.load_ahead(&ahead.vcpu, &section).expect("ahead");
        msrs::write(&ahead.vcpu, &[(0x174, 0x77)]).expect("behind its back");
        let pause = Pause::default();
        known
            .load(&mut ahead.vcpu, &section, pause, ())
            .expect("load");
        whole.load(&section, pause);
        assert_eq!(differing(&held(&mut whole), &held(&mut ahead)), "MSRs ");

        let mut known = Known::of(&ahead.vcpu);
        let mut broken = section.clone();
        broken.debugregs.truncate(3);
        known
            .load_ahead(&ahead.vcpu, &broken)
            .expect_err("no debug registers");
        known
            .load(&mut ahead.vcpu, &section, pause, ())
            .expect("load");
        assert_eq!(differing(&held(&mut whole), &held(&mut ahead)), "");
    });
}

/// Takes one part out of a vCPU's section.
type Take = fn(&mut Section);

/// Nothing stands in a new vCPU, and "nothing" in a saved state is not the same as that.
#[test]
fn a_state_that_lacks_a_part_is_refused() {
    alone(|| {
        let Some(mut machine) = Bare::new() else {
            return;
        };
        let section = machine.save();
        let lacks: [(&str, Take); 3] = [
            ("system registers", |section| section.sregs.clear()),
            ("an XSAVE area", |section| section.xsave.clear()),
            ("debug registers", |section| section.debugregs.clear()),
        ];
        for (what, take) in lacks {
            let mut part = section.clone();
            take(&mut part);
            let mut known = Known::of(&machine.vcpu);
            let loaded = known.load(&mut machine.vcpu, &part, Pause::default(), ());
            assert!(loaded.is_err(), "without {what}");
        }
    });
}

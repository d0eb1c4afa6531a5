use super::*;
use crate::codec::Saved;

const TIMER: u8 = 0xec;
const KEYBOARD: u8 = 0x31;

fn apic() -> Vec<u8> {
    let mut lapic = vec![0; 1024];
    lapic[LVT_TIMER] = TIMER;
    lapic
}

fn request(lapic: &mut [u8], vector: u8) {
    let at = REQUESTED + usize::from(vector / 32) * 16 + usize::from(vector % 32 / 8);
    lapic[at] |= 1 << (vector % 8);
}

fn machine(vcpu: &Vcpu, disk: &VirtioBlk) -> Vec<u8> {
    let mut saved = Saved::default();
    saved.put("0", vcpu).expect("put");
    saved.put("disk0", disk).expect("put");
    saved.put("", &Irqchip::default()).expect("put");
    saved.finish(3, "test", "web-1", 1)
}

fn vcpu() -> Vcpu {
    Vcpu {
        lapic: apic(),
        sregs: vec![7; 312],
        events: vec![0; 64],
        msr_indices: vec![0x174, TSC_DEADLINE],
        msr_values: vec![8, 99],
        mp_state: 3,
        ..Vcpu::default()
    }
}

const DISK: VirtioBlk = VirtioBlk {
    size: 1 << 20,
    write_back: true,
};

fn against(change: impl FnOnce(&mut Vcpu)) -> Vec<String> {
    let mut again = vcpu();
    change(&mut again);
    differences(&machine(&vcpu(), &DISK), &machine(&again, &DISK)).expect("states")
}

#[test]
fn what_time_changes_is_no_difference() {
    let quiet: Vec<String> = Vec::new();
    assert_eq!(against(|_| ()), quiet);
    assert_eq!(against(|v| v.lapic_tsc = 5), quiet);
    assert_eq!(against(|v| v.lapic[CURRENT_COUNT] = 9), quiet);
    let fired = |v: &mut Vcpu| {
        request(&mut v.lapic, TIMER);
        v.msr_values[1] = 0;
        v.mp_state = 0;
    };
    assert_eq!(
        against(fired),
        quiet,
        "a timer that ran out, and woke its vCPU"
    );
    let injected = |v: &mut Vcpu| {
        v.events[8..10].copy_from_slice(&[1, TIMER]);
        v.sregs[300] ^= 1;
    };
    assert_eq!(against(injected), quiet, "and was handed to it");
}

#[test]
fn an_exception_that_waits_is_the_same_when_it_was_loaded() {
    // #UD, injected and pending, as KVM tells it; and after KVM_SET_VCPU_EVENTS.
    let of = |exception: [u8; 4]| {
        let mut vcpu = vcpu();
        vcpu.events[..4].copy_from_slice(&exception);
        machine(&vcpu, &DISK)
    };
    let alike = differences(&of([1, 6, 0, 1]), &of([1, 6, 0, 0])).expect("states");
    assert!(alike.is_empty(), "{alike:?}");
    for other in [[0, 0, 0, 0], [1, 14, 0, 0]] {
        let found = differences(&of([1, 6, 0, 1]), &of(other)).expect("states");
        assert!(found.len() == 1 && found[0].contains("events"), "{found:?}");
    }
}

#[test]
fn every_other_change_is_named() {
    let named = |change: fn(&mut Vcpu), what: &str| {
        let found = against(change);
        assert!(
            found.len() == 1 && found[0].contains(what),
            "{what}: {found:?}"
        );
    };
    named(|v| v.regs = vec![1], "vcpu/0: regs is");
    named(|v| v.sregs[9] = 1, "sregs is 1 at 9, and was 7");
    named(|v| v.xsave = vec![1], "xsave");
    named(|v| v.tsc_offset = Some(4), "tsc_offset");
    named(|v| v.mp_state = 1, "mp_state");
    named(
        |v| v.msr_values[0] = 9,
        "MSR 0x174 is 0x9, where it was 0x8",
    );
    named(|v| v.msr_values[1] = 98, "MSR 0x6e0");
    named(
        |v| (v.msr_indices, v.msr_values) = (vec![TSC_DEADLINE], vec![99]),
        "MSR 0x174 is gone",
    );
    named(
        |v| request(&mut v.lapic, KEYBOARD),
        "0x31 came from nowhere",
    );
    named(|v| v.lapic[0x80] = 1, "lapic");
}

#[test]
fn pages_that_are_there_again_are_told_of_after_a_load_where_the_guest_wants_that() {
    const PAGES: u8 = 0xf3;
    let told = |switched: u64| {
        let mut before = vcpu();
        before.msr_indices.extend([ASYNC_PF, ASYNC_PF_INTERRUPT]);
        before.msr_values.extend([switched, PAGES.into()]);
        let mut again = before.clone();
        request(&mut again.lapic, PAGES);
        differences(&machine(&before, &DISK), &machine(&again, &DISK)).expect("states")
    };
    let none: [&str; 0] = [];
    assert_eq!(told(0x1000 | BY_INTERRUPT), none);
    for other in [0, 1, 0x1000 | 1 << 3] {
        assert_eq!(told(other), ["vcpu/0: interrupt 0xf3 came from nowhere"]);
    }
}

#[test]
fn an_interrupt_that_waits_is_not_lost() {
    let mut waits = vcpu();
    request(&mut waits.lapic, KEYBOARD);
    let before = machine(&waits, &DISK);
    let lost = differences(&before, &machine(&vcpu(), &DISK)).expect("states");
    assert_eq!(lost, ["vcpu/0: interrupt 0x31 got lost"]);
    let mut served = vcpu();
    served.events[8..10].copy_from_slice(&[1, KEYBOARD]);
    let handed = differences(&before, &machine(&served, &DISK)).expect("states");
    assert!(handed.is_empty(), "on its way is not lost: {handed:?}");
}

#[test]
fn devices_and_sections_are_named() {
    let smaller = VirtioBlk { size: 512, ..DISK };
    let found = differences(&machine(&vcpu(), &DISK), &machine(&vcpu(), &smaller));
    let size = ["virtio-blk/disk0: size is 512, and was 1048576"];
    assert_eq!(found.expect("states"), size);
    let mut short = Saved::default();
    short.put("0", &vcpu()).expect("put");
    short.put("", &Irqchip::default()).expect("put");
    short.put("", &Probe::default()).expect("put");
    let short = short.finish(3, "test", "web-1", 1);
    let found = differences(&machine(&vcpu(), &DISK), &short).expect("states");
    assert_eq!(
        found,
        [
            "virtio-blk/disk0: not saved again",
            "probe: was not there before"
        ]
    );
}

/// KVM makes of an MSR what it will, whichever release writes it; of a missing one it makes nothing.
#[test]
fn what_kvm_makes_of_an_msr_is_told_and_does_not_count() {
    let a = Vcpu {
        msr_indices: vec![0x175, 0x176, 0x4000_0010, 0x4000_0020, 0xc000_0081],
        msr_values: vec![0xffff_fe00_0000_3000, 7, 1, 2, 3],
        ..Vcpu::default()
    };
    let mut b = a.clone();
    (b.msr_values[0], b.msr_values[2], b.msr_values[3]) = (0x3000, 5, 6);
    assert_eq!(msrs(&a, &b).expect("readable"), [""; 0]);
    b.msr_values[4] = 4;
    let found = msrs(&a, &b).expect("readable");
    let told = |what: &String| format!("vcpu/0: {what}");
    assert_eq!(found.len(), 1);
    assert!(is_kvms_own(&told(&found[0])), "{found:?}");
    b.msr_indices.pop();
    b.msr_values.pop();
    let found = msrs(&a, &b).expect("readable");
    assert!(!is_kvms_own(&told(&found[0])), "{found:?}");
    assert!(!is_kvms_own("probe: scratch is 2, and was 1"));
    // The upper half of a value that fits nobody's registers is no more the same.
    b = a.clone();
    b.msr_values[0] = 0x3001;
    assert_eq!(msrs(&a, &b).expect("readable").len(), 1);
}

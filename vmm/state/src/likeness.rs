//! Whether two saved states are of one guest at one point of its life: what one release saved, and
//! what another saved again after it had loaded that, with nothing run in between.
//!
//! All must be the same but what time alone changes: clocks and timers go on, and a timer that ran
//! out meanwhile has raised its interrupt. So of interrupts that wait none may be missing, and only
//! those of timers may be new, and the one by which KVM has a guest look for its pages after each load. Fields that this release doesn't know are passed over: a later
//! release may well save more of what it made of the same state.

use std::collections::BTreeMap;
use std::fmt::Debug;

use crate::codec::{Section, StateError, Unclaimed};
use crate::sections::{
    Clock, Console, Irqchip, Power, Probe, Serial, Vcpu, VirtioBlk, VirtioMmio, VirtioNet,
    VirtioRng, VirtioVsock, VmClock,
};

// Registers of a local APIC (Intel SDM vol. 3, table 11-1).
const PROCESSOR_PRIORITY: usize = 0xa0;
const IN_SERVICE: usize = 0x100;
const TRIGGER_MODE: usize = 0x180;
const REQUESTED: usize = 0x200;
const LVT_TIMER: usize = 0x320;
const CURRENT_COUNT: usize = 0x390;
const INITIAL_COUNT: usize = 0x380;
/// IA32_TSC_DEADLINE.
const TSC_DEADLINE: u32 = 0x6e0;
/// MSR_KVM_ASYNC_PF_EN and MSR_KVM_ASYNC_PF_INT, the interrupt of pages that are there again.
const ASYNC_PF: u32 = 0x4b56_4d02;
const ASYNC_PF_INTERRUPT: u32 = 0x4b56_4d06;
/// In the first: it is on, and tells by that interrupt (include/uapi/asm/kvm_para.h).
const BY_INTERRUPT: u64 = 1 << 0 | 1 << 3;
/// HV_X64_MSR_VP_RUNTIME and HV_X64_MSR_TIME_REF_COUNT: they count time.
const COUNTERS: [u32; 2] = [0x4000_0010, 0x4000_0020];
/// IA32_SYSENTER_ESP and _EIP. A processor of AMD's has 32 bits of them, and KVM keeps no more when they
/// are written from outside (svm.c, `svm_set_msr`), though a guest may have put more there.
const SYSENTER: [u32; 2] = [0x175, 0x176];
/// KVM_MP_STATE_RUNNABLE and KVM_MP_STATE_HALTED.
const RUNNABLE: u32 = 0;
const HALTED: u32 = 3;
/// How a difference of an MSR's value is told.
const VALUE: &str = ", where it was ";

/// Whether a difference is told for no more than its own sake: KVM may make of an MSR's value what it will
/// when it is written from outside, and makes it so whichever release writes. One that is gone counts.
pub fn is_kvms_own(difference: &str) -> bool {
    difference.contains(": MSR ") && difference.contains(VALUE)
}

/// What differs, by section and field; nothing if they are alike.
pub fn differences(before: &[u8], again: &[u8]) -> Result<Vec<String>, StateError> {
    let (before, again) = (Unclaimed::decode(before)?, Unclaimed::decode(again)?);
    let mut found = Vec::new();
    let mut theirs: BTreeMap<_, _> = again
        .contents()
        .map(|(name, instance, body)| ((name, instance), body))
        .collect();
    let timers = timer_vectors(&before)?;
    for (name, instance, body) in before.contents() {
        let Some(other) = theirs.remove(&(name, instance)) else {
            found.push(format!("{}: not saved again", label(name, instance)));
            continue;
        };
        for field in section(name, body, other, &timers)? {
            found.push(format!("{}: {field}", label(name, instance)));
        }
    }
    for (name, instance) in theirs.into_keys() {
        found.push(format!("{}: was not there before", label(name, instance)));
    }
    Ok(found)
}

fn label(name: &str, instance: &str) -> String {
    match instance {
        "" => name.to_owned(),
        instance => format!("{name}/{instance}"),
    }
}

/// The fields of one section that differ.
fn section(name: &str, a: &[u8], b: &[u8], timers: &[u8]) -> Result<Vec<String>, StateError> {
    match name {
        Vcpu::NAME => vcpu(decode(a)?, decode(b)?, timers),
        Irqchip::NAME => Ok(irqchip(decode(a)?, decode(b)?)),
        Clock::NAME => Ok(clock(&decode(a)?, &decode(b)?)),
        Console::NAME => Ok(console(decode(a)?, decode(b)?)),
        Serial::NAME => same::<Serial>(a, b),
        Probe::NAME => same::<Probe>(a, b),
        Power::NAME => same::<Power>(a, b),
        VmClock::NAME => same::<VmClock>(a, b),
        VirtioMmio::NAME => same::<VirtioMmio>(a, b),
        VirtioRng::NAME => same::<VirtioRng>(a, b),
        VirtioBlk::NAME => same::<VirtioBlk>(a, b),
        VirtioNet::NAME => same::<VirtioNet>(a, b),
        VirtioVsock::NAME => same::<VirtioVsock>(a, b),
        _ if a == b => Ok(Vec::new()),
        _ => Ok(vec!["its bytes differ".into()]),
    }
}

fn decode<S: Section>(body: &[u8]) -> Result<S, StateError> {
    S::decode(body).map_err(|source| StateError::Decode {
        section: S::NAME.into(),
        source,
    })
}

fn same<S: Section + Debug + PartialEq>(a: &[u8], b: &[u8]) -> Result<Vec<String>, StateError> {
    Ok(fields(&decode::<S>(a)?, &decode::<S>(b)?))
}

/// The fields in which two structures differ, by how they are printed, each with its first difference.
fn fields<S: Debug + PartialEq>(a: &S, b: &S) -> Vec<String> {
    if a == b {
        return Vec::new();
    }
    let (a, b) = (printed(a), printed(b));
    let mut found: Vec<String> = a
        .iter()
        .filter_map(|(field, was)| {
            let is = b.get(field).filter(|is| *is != was)?;
            Some(format!("{field} {}", first_difference(was, is)))
        })
        .collect();
    found.sort();
    found
}

/// Each field with the lines it takes.
fn printed<S: Debug>(value: &S) -> BTreeMap<String, Vec<String>> {
    let mut fields: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut current = String::new();
    for line in format!("{value:#?}").lines() {
        let own = line.strip_prefix("    ");
        let own = own.filter(|rest| !rest.starts_with(' '));
        let line = match own.and_then(|rest| rest.split_once(": ")) {
            Some((field, value)) => {
                current = field.to_owned();
                value
            }
            None => line,
        };
        let lines = fields.entry(current.clone()).or_default();
        lines.push(line.trim().trim_end_matches(',').to_owned());
    }
    fields.remove("");
    fields
}

fn first_difference(was: &[String], is: &[String]) -> String {
    let at = was.iter().zip(is).position(|(was, is)| was != is);
    match (was, is, at) {
        ([was], [is], _) => format!("is {is}, and was {was}"),
        // A line for what the field is, and one for each element of it.
        (_, _, Some(at)) if at > 0 => {
            format!("is {} at {}, and was {}", is[at], at - 1, was[at])
        }
        _ => format!("is {} long, and was {}", is.len(), was.len()),
    }
}

fn word(registers: &[u8], at: usize) -> u32 {
    let bytes = registers.get(at..).and_then(<[u8]>::first_chunk);
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn clear(registers: &mut [u8], at: usize) {
    if let Some(bytes) = registers.get_mut(at..at + 4) {
        bytes.fill(0);
    }
}

/// Vectors of 256 bits that a local APIC keeps in eight registers, 16 bytes apart.
fn vectors(registers: &[u8], at: usize) -> Vec<u8> {
    let bits = (0..=255u8).filter(|&vector| {
        let register = at + usize::from(vector / 32) * 16;
        word(registers, register) & 1 << (vector % 32) != 0
    });
    bits.collect()
}

/// The interrupts that time alone may raise: of the local APICs' timers, and of the PIT.
fn timer_vectors(state: &Unclaimed) -> Result<Vec<u8>, StateError> {
    /// `struct kvm_irqchip`: the chip's number and padding, then `struct kvm_ioapic_state`, whose
    /// table of 64-bit entries follows base, register, id, irr and padding.
    const ENTRIES: usize = 8 + 24;
    let mut timers = Vec::new();
    for (name, _, body) in state.contents() {
        match name {
            Vcpu::NAME => {
                let vcpu: Vcpu = decode(body)?;
                timers.push(word(&vcpu.lapic, LVT_TIMER) as u8);
            }
            Irqchip::NAME => {
                let chips: Irqchip = decode(body)?;
                // The PIT's line is 0, which a guest may have been told is 2.
                timers.extend([0, 2].map(|pin| word(&chips.ioapic, ENTRIES + 8 * pin) as u8));
            }
            _ => {}
        }
    }
    Ok(timers)
}

/// Interrupts that wait, are being handed to the vCPU, or are served.
fn waiting(vcpu: &Vcpu) -> Vec<u8> {
    /// `struct kvm_vcpu_events`: eight bytes of the exception, then `interrupt.injected` and `.nr`.
    const INTERRUPT: usize = 8;
    let mut all = vectors(&vcpu.lapic, REQUESTED);
    all.extend(vectors(&vcpu.lapic, IN_SERVICE));
    if let Some(&[injected, number]) = vcpu.events.get(INTERRUPT..INTERRUPT + 2)
        && injected != 0
    {
        all.push(number);
    }
    all.sort_unstable();
    all.dedup();
    all
}

/// The interrupt by which KVM tells a guest that pages are there again. It does when the MSR that switches this on is
/// loaded, lest a page that was awaited in another process is awaited for ever (x86.c, `kvm_pv_enable_async_pf`); and
/// that is seen as soon as `KVM_RUN` has looked.
fn pages_vector(vcpu: &Vcpu) -> Result<Option<u8>, StateError> {
    let msrs: BTreeMap<_, _> = vcpu.msrs()?.into_iter().collect();
    let is_on = |value: &u64| value & BY_INTERRUPT == BY_INTERRUPT;
    let vector = msrs.get(&ASYNC_PF_INTERRUPT);
    Ok(match msrs.get(&ASYNC_PF).filter(|value| is_on(value)) {
        Some(_) => vector.map(|vector| *vector as u8),
        None => None,
    })
}

fn vcpu(mut a: Vcpu, mut b: Vcpu, timers: &[u8]) -> Result<Vec<String>, StateError> {
    let mut found = msrs(&a, &b)?;
    let (waits, again) = (waiting(&a), waiting(&b));
    let pages = pages_vector(&a)?;
    for vector in &waits {
        if !again.contains(vector) {
            found.push(format!("interrupt {vector:#x} got lost"));
        }
    }
    for vector in &again {
        if !waits.contains(vector) && !timers.contains(vector) && pages != Some(*vector) {
            found.push(format!("interrupt {vector:#x} came from nowhere"));
        }
    }
    // An interrupt wakes a vCPU that halts, and a timer that ran out does so before its interrupt is
    // anywhere to be seen (x86.c, `vcpu_block`: a pending timer is enough). One too many is a halt that
    // ends early, which software expects.
    if (a.mp_state, b.mp_state) == (HALTED, RUNNABLE) {
        b.mp_state = a.mp_state;
    }
    for vcpu in [&mut a, &mut b] {
        without_time(vcpu);
    }
    found.extend(fields(&a, &b));
    Ok(found)
}

/// Takes out what is compared otherwise, and what time alone changes.
fn without_time(vcpu: &mut Vcpu) {
    /// `struct kvm_sregs` ends with `interrupt_bitmap`, four words of 64 bits.
    const BITMAP: usize = 32;
    (vcpu.msrs, vcpu.msr_indices, vcpu.msr_values) = Default::default();
    vcpu.lapic_tsc = 0;
    for bank in [IN_SERVICE, TRIGGER_MODE, REQUESTED] {
        for register in 0..8 {
            clear(&mut vcpu.lapic, bank + register * 16);
        }
    }
    clear(&mut vcpu.lapic, PROCESSOR_PRIORITY);
    clear(&mut vcpu.lapic, CURRENT_COUNT);
    // A one-shot that ran out is saved disarmed.
    if word(&vcpu.lapic, LVT_TIMER) >> 17 & 3 == 0 {
        clear(&mut vcpu.lapic, INITIAL_COUNT);
    }
    if let Some(interrupt) = vcpu.events.get_mut(8..12) {
        interrupt.fill(0);
    }
    // Without KVM_CAP_EXCEPTION_PAYLOAD an exception that is pending is told as injected too, and is
    // nothing but injected when it was loaded (x86.c, `kvm_vcpu_ioctl_x86_set_vcpu_events`).
    if let [1, _, _, pending, ..] = vcpu.events.as_mut_slice() {
        *pending = 0;
    }
    let bitmap = vcpu.sregs.len().saturating_sub(BITMAP);
    vcpu.sregs.truncate(bitmap);
}

fn msrs(a: &Vcpu, b: &Vcpu) -> Result<Vec<String>, StateError> {
    let theirs: BTreeMap<_, _> = b.msrs()?.into_iter().collect();
    let mut found = Vec::new();
    for (index, value) in a.msrs()? {
        match theirs.get(&index) {
            Some(&other) if other == value => {}
            _ if COUNTERS.contains(&index) => {}
            Some(&other) if SYSENTER.contains(&index) && other == value & 0xffff_ffff => {}
            // It passed meanwhile.
            Some(0) if index == TSC_DEADLINE => {}
            Some(other) => {
                found.push(format!("MSR {index:#x} is {other:#x}{VALUE}{value:#x}"));
            }
            // One that another kernel or release does not list, and that held nothing.
            None if value == 0 => {}
            None => found.push(format!("MSR {index:#x} is gone, and was {value:#x}")),
        }
    }
    Ok(found)
}

fn irqchip(mut a: Irqchip, mut b: Irqchip) -> Vec<String> {
    /// In `struct kvm_irqchip`: number and padding, then base, register and id; then `irr`.
    const IRR: usize = 8 + 16;
    /// The first entry of its table, and bytes of each; bit 12 is "not taken yet".
    const ENTRIES: usize = 8 + 24;
    /// In `struct kvm_pit_channel_state`: when the count was loaded, its last eight bytes of 24.
    const CHANNEL: usize = 24;
    for chips in [&mut a, &mut b] {
        for pin in [0, 2] {
            if let Some(byte) = chips.ioapic.get_mut(IRR) {
                *byte &= !(1 << pin);
            }
            if let Some(byte) = chips.ioapic.get_mut(ENTRIES + 8 * pin + 1) {
                *byte &= !(1 << 4);
            }
        }
        for channel in 0..3 {
            if let Some(loaded) = chips
                .pit
                .get_mut(CHANNEL * channel + 16..CHANNEL * (channel + 1))
            {
                loaded.fill(0);
            }
        }
        // The PIT's line at the first PIC: `last_irr` and `irr` of `struct kvm_pic_state`.
        for at in [8, 9] {
            if let Some(byte) = chips.pic_master.get_mut(at) {
                *byte &= !1;
            }
        }
    }
    fields(&a, &b)
}

fn clock(a: &Clock, b: &Clock) -> Vec<String> {
    let mut found = Vec::new();
    if a.hold != b.hold || a.tsc_khz != b.tsc_khz {
        found.push("what it is to do".into());
    }
    if b.clock < a.clock && !a.hold {
        found.push(format!("clock goes back by {} ns", a.clock - b.clock));
    }
    found
}

/// Viewers' sockets go to no rehearsal.
fn console(mut a: Console, mut b: Console) -> Vec<String> {
    for console in [&mut a, &mut b] {
        console.viewers = 0;
        console.behind = Vec::new();
    }
    fields(&a, &b)
}

#[cfg(test)]
mod tests;

//! Line commands on COM1, answered by vCPU 0.

use core::sync::atomic::Ordering::Relaxed;

use stillpoint_guest_abi::power;
use stillpoint_guest_abi::pulse::Timers;

use crate::pages::{self, field, field32};
use crate::serial::{self, say};
use crate::{apic, gaps, modes, options, touch, tsc, vcpu};

/// The line being received.
pub(crate) struct Console {
    line: [u8; 64],
    len: usize,
}

impl Console {
    /// An empty line.
    pub(crate) const fn new() -> Self {
        Self {
            line: [0; 64],
            len: 0,
        }
    }

    /// Takes what came in, and runs each whole line. True if a command ran, which may be slow.
    pub(crate) fn poll(&mut self) -> bool {
        let mut ran = false;
        while let Some(byte) = serial::read() {
            if byte == b'\n' || byte == b'\r' {
                let line = core::str::from_utf8(&self.line[..self.len]).unwrap_or("?");
                if !line.is_empty() {
                    run(line);
                    ran = true;
                }
                self.len = 0;
            } else if self.len < self.line.len() {
                self.line[self.len] = byte;
                self.len += 1;
            }
        }
        ran
    }
}

fn run(line: &str) {
    let mut words = line.split_ascii_whitespace();
    let command = words.next().unwrap_or("");
    let vcpu = words
        .next()
        .and_then(|n| n.parse().ok())
        .filter(|n| *n < options::get().cpus);
    let mode = words.next().and_then(modes::parse);
    match (command, vcpu, mode) {
        ("ping", ..) => say!("pong"),
        ("report", ..) => report(),
        ("devices", ..) => (0..options::get().cpus).for_each(report_device),
        ("forget", ..) => {
            (0..options::get().cpus).for_each(gaps::forget);
            say!("forgotten");
        }
        ("touch", ..) => {
            match line.ends_with(" always") {
                true => touch::always(),
                false => touch::again(),
            }
            say!("touching");
        }
        ("mode", Some(vcpu), Some(mode)) => {
            modes::want(vcpu, mode);
            if vcpu != 0 && vcpu::is_online(vcpu) {
                apic::wake(vcpu);
            }
            say!("mode {vcpu} {}", modes::name(mode as u32));
        }
        ("start", Some(vcpu), _) if vcpu::is_online(vcpu) => say!("error: {vcpu} is online"),
        ("start", Some(vcpu), _) => match vcpu::start(vcpu) {
            true => say!("started {vcpu}"),
            false => say!("error: {vcpu} did not start"),
        },
        ("poweroff", ..) => serial::outl(power::PORT, power::POWER_OFF),
        ("reset", ..) => serial::outl(power::PORT, power::RESET),
        _ => say!("error: {line:?}"),
    }
}

/// A line for each vCPU, then one for what they share. Times in us unless named otherwise.
fn report() {
    for vcpu in 0..options::get().cpus {
        report_vcpu(vcpu);
    }
    let globals = pages::globals();
    say!(
        "globals online={} kvmclock={} warps={} worst_warp_ns={} clock_high_ns={} total={} \
         pattern_base={:#x} pattern_len={:#x} tsc_khz={}",
        field32!(globals.online).load(Relaxed),
        field32!(globals.kvmclock).load(Relaxed),
        field!(globals.warps).load(Relaxed),
        field!(globals.worst_warp_ns).load(Relaxed),
        field!(globals.clock_high_ns).load(Relaxed),
        field!(globals.total).load(Relaxed),
        field!(globals.pattern_base).load(Relaxed),
        field!(globals.pattern_len).load(Relaxed),
        tsc::khz(),
    );
}

fn report_vcpu(vcpu: usize) {
    let (r, record) = (pages::report(vcpu), pages::record(vcpu));
    let largest = field!(record.largest.end)
        .load(Relaxed)
        .saturating_sub(field!(record.largest.start).load(Relaxed));
    say!(
        "vcpu={vcpu} mode={} apic={} loops={} gaps={} largest={} tsc_backwards={} clock_reads={} \
         clock_ns={} clock_backwards={} worst_backwards_ns={} oneshot={} deadline={} periodic={} \
         ram_passes={} ram_errors={} ram_ok={} mmio_ops={} mmio_errors={} pio_lines={} \
         fpu_errors={} strays={}",
        modes::name(field32!(r.mode).load(Relaxed)),
        field32!(r.apic_id).load(Relaxed),
        field!(r.counter).load(Relaxed),
        field!(record.count).load(Relaxed),
        tsc::micros(largest),
        field!(r.tsc_backwards).load(Relaxed),
        field!(r.clock_reads).load(Relaxed),
        field!(r.clock_ns).load(Relaxed),
        field!(r.clock_backwards).load(Relaxed),
        field!(r.worst_backwards_ns).load(Relaxed),
        Fate(field!(r.oneshot.armed).as_ptr().cast()),
        Fate(field!(r.deadline.armed).as_ptr().cast()),
        Fate(field!(r.periodic.armed).as_ptr().cast()),
        field!(r.ram_passes).load(Relaxed),
        field!(r.ram_errors).load(Relaxed),
        u8::from(field!(r.ram_checksum).load(Relaxed) == field!(r.ram_expected).load(Relaxed)),
        field!(r.mmio_ops).load(Relaxed),
        field!(r.mmio_errors).load(Relaxed),
        field!(r.pio_lines).load(Relaxed),
        field!(r.fpu_errors).load(Relaxed),
        field!(r.stray_interrupts).load(Relaxed),
    );
}

/// What a vCPU does with a virtio device; all counters are in its report in RAM.
fn report_device(vcpu: usize) {
    let report = pages::report(vcpu);
    let driver = pages::shown(pages::place!(report.driver));
    let hostile = pages::shown(pages::place!(report.hostile));
    say!(
        "vcpu={vcpu} device={} kind={} submitted={} completed={} doubled={} lost={} needs_reset={} \
         interrupts={} interrupts_lost={} absent={} refused={} attacks={}/{}/{}/{}/{}/{}/{}",
        driver.slot,
        driver.kind,
        driver.submitted,
        driver.completed,
        driver.doubled,
        driver.lost,
        driver.needs_reset,
        driver.interrupts,
        driver.interrupts_lost,
        driver.absent,
        driver.refused,
        hostile.worked,
        hostile.needs_reset,
        hostile.silent,
        hostile.stuck,
        hostile.reset_stuck,
        hostile.dead,
        hostile.scribbled,
    );
}

/// Prints as armed/fired/doubled/early/worst_late.
struct Fate(*mut Timers);

impl core::fmt::Display for Fate {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let t = self.0;
        write!(
            f,
            "{}/{}/{}/{}/{}",
            field!(t.armed).load(Relaxed),
            field!(t.fired).load(Relaxed),
            field!(t.doubled).load(Relaxed),
            field!(t.early).load(Relaxed),
            tsc::micros(field!(t.worst_late).load(Relaxed)),
        )
    }
}

//! The loop of one vCPU, and how the others are started.

use core::sync::atomic::{Ordering::Relaxed, Ordering::Release};

use stillpoint_guest_abi::pulse::{Mode, Report};

use crate::console::Console;
use crate::gaps::Gaps;
use crate::local::{self, Local};
use crate::pages::{self, add, field, field32};
use crate::pattern::Pattern;
use crate::serial::say;
use crate::timers::Timers;
use crate::touch::{self, Touch};
use crate::virtio::Driving;
use crate::{apic, clock, gate, modes, options, registers, tsc};

/// A halt of mode `halt`, and the slice of which `duty=` is a part.
const SLICE_US: u64 = 10_000;
/// How long mode `masked` keeps interrupts off.
const MASKED_US: u64 = 50_000;
/// The console is looked at this often: each look is an exit.
const CONSOLE_US: u64 = 4000;
/// An AP that takes longer to come up will not, however busy the host is.
const START_US: u64 = 20_000_000;

/// One vCPU, once it is in ring 3.
pub(crate) struct Vcpu {
    index: usize,
    local: &'static Local,
    report: *mut Report,
    gaps: Gaps,
    timers: Timers,
    pattern: Pattern,
    touch: Touch,
    console: Console,
    kvmclock: bool,
    mode: Mode,
    masked_since: Option<u64>,
    slice_start: u64,
    console_at: u64,
    strays: u64,
    /// The virtio device in use.
    driving: Option<Driving>,
}

/// Whether a vCPU has reached ring 3.
pub(crate) fn is_online(vcpu: usize) -> bool {
    let report = pages::report(vcpu);
    field32!(report.mode).load(Relaxed) != Mode::Offline as u32
}

/// Starts an AP and waits until it is online; false if it does not come.
pub(crate) fn start(vcpu: usize) -> bool {
    if modes::wanted(vcpu) == Mode::Offline {
        modes::want(vcpu, options::get().modes[vcpu]);
    }
    apic::start(vcpu);
    let begin = tsc::read();
    while !is_online(vcpu) {
        if tsc::read() - begin > tsc::cycles(START_US) {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

impl Vcpu {
    /// Readies this vCPU; vCPU 0 brings up the others.
    pub(crate) fn new(index: usize) -> Self {
        let (local, report) = (local::of(index), pages::report(index));
        tsc::move_by(options::get().skews[index]);
        apic::init();
        let kvmclock = clock::enable(local, report);
        let globals = pages::globals();
        if index == 0 {
            field32!(globals.kvmclock).store(kvmclock.into(), Relaxed);
            modes::want(0, options::get().modes[0]);
        }
        field32!(report.apic_id).store(apic::id(), Relaxed);
        field32!(globals.online).fetch_add(1, Relaxed);
        let mode = modes::wanted(index);
        field32!(report.mode).store(mode as u32, Release);
        if index == 0 {
            start_others();
        }
        Self {
            index,
            local,
            report,
            gaps: Gaps::new(index),
            timers: Timers::new(local, report, options::get().timers),
            pattern: Pattern::new(index),
            touch: Touch::new(index),
            console: Console::new(),
            kvmclock,
            mode,
            masked_since: None,
            slice_start: tsc::read(),
            console_at: 0,
            strays: 0,
            driving: None,
        }
    }

    /// The loop.
    pub(crate) fn run(mut self) -> ! {
        gate::set_interrupts(true);
        loop {
            self.follow_mode();
            if self.mode == Mode::Idle {
                self.idle();
                continue;
            }
            self.watch();
            match self.mode {
                Mode::Pio => modes::pio(self.index, self.report, &mut self.gaps),
                Mode::Mmio => modes::mmio(self.report, &mut self.gaps),
                Mode::Masked => self.mask(),
                Mode::Halt => self.nap(tsc::read() + tsc::cycles(SLICE_US), || false),
                Mode::Blk | Mode::Net | Mode::Rng | Mode::Vsock | Mode::Hostile => self.drive(),
                _ => {}
            }
            self.rest();
            self.poll_console();
        }
    }

    /// One round of everything that every mode does.
    fn watch(&mut self) {
        let report = self.report;
        let seed = self.gaps.tick();
        add(field!(report.fpu_errors), registers::check(seed));
        self.gaps.tick();
        if self.kvmclock {
            clock::check(self.local, report);
        }
        self.pattern.walk(&mut self.gaps);
        self.touch.walk(&mut self.gaps);
        if self.masked_since.is_none() && self.mode != Mode::Halt {
            self.timers.service();
        }
        self.gaps.tick();
        self.count_strays();
        let globals = pages::globals();
        field!(globals.total).fetch_add(1, Relaxed);
        add(field!(report.counter), 1);
    }

    fn count_strays(&mut self) {
        let report = self.report;
        let strays = self.local.strays.load(Relaxed);
        add(field!(report.stray_interrupts), strays - self.strays);
        self.strays = strays;
    }

    /// Takes up the mode wanted, out of whatever the last one held.
    fn follow_mode(&mut self) {
        let wanted = modes::wanted(self.index);
        if wanted != self.mode {
            self.unmask();
            if let Some(driving) = self.driving.take() {
                driving.finish(&mut self.gaps);
            }
            self.mode = wanted;
            let report = self.report;
            field32!(report.mode).store(wanted as u32, Relaxed);
        }
    }

    /// Mode `masked`: interrupts off while a timer comes due, then on again. An interrupt in
    /// between is one that nobody may have.
    fn mask(&mut self) {
        let now = self.gaps.tick();
        match self.masked_since {
            None if self.timers.busy() => {
                gate::set_interrupts(false);
                // One that came before the masking is in order.
                self.timers.account();
                self.masked_since = Some(now);
            }
            None => {}
            Some(_) if self.timers.has_news() => {
                let report = self.report;
                add(field!(report.stray_interrupts), 1);
                self.unmask();
            }
            Some(since) if now - since > tsc::cycles(MASKED_US) => self.unmask(),
            Some(_) => {}
        }
    }

    fn unmask(&mut self) {
        if self.masked_since.take().is_some() {
            self.timers.unmasked(tsc::read());
            gate::set_interrupts(true);
        }
    }

    /// The modes that drive a virtio device: what there is to do, then, if so asked, a halt until
    /// the device interrupts.
    fn drive(&mut self) {
        let (mode, index) = (self.mode, self.index);
        let driving = match &mut self.driving {
            Some(driving) => driving,
            none => none.insert(Driving::start(mode, index)),
        };
        driving.turn(&mut self.gaps);
        assert!(local::has_stack_left(index), "no stack left");
        if let Some(rest) = driving.rest() {
            self.nap(tsc::read() + tsc::cycles(SLICE_US), || rest.is_over());
        }
    }

    /// With `duty=` below 100: halts for what is left of the slice. Until all of `touch=` was written once, who writes does not
    /// rest, and the others hardly run: whoever wants such a guest would wait for it as many times longer.
    fn rest(&mut self) {
        let duty = match (touch::is_to_come(), self.touch.is_over()) {
            (true, true) => 1,
            (_, true) => options::get().duty,
            (_, false) => 100,
        };
        if duty >= 100 || self.masked_since.is_some() {
            return;
        }
        let slice = tsc::cycles(SLICE_US);
        if self.gaps.tick() - self.slice_start >= slice * duty / 100 {
            self.nap(self.slice_start + slice, || false);
            self.slice_start = tsc::read();
        }
    }

    /// Halts until `until`, until another mode is wanted, or until an interrupt has come after
    /// which it is `over`. A timer that is already armed is
    /// waited for first. If we wake late, the lateness is a gap.
    fn nap(&mut self, until: u64, over: impl Fn() -> bool) {
        loop {
            let events = self.local.events();
            self.timers.account();
            let now = tsc::read();
            if now >= until || over() || modes::wanted(self.index) != self.mode {
                self.gaps.resume(until.min(now));
                self.gaps.tick();
                return;
            }
            self.timers.arm_for(until);
            let due = self.timers.due().unwrap_or(until);
            self.local.halt(events);
            self.gaps.resume(due.min(tsc::read()));
            self.gaps.tick();
        }
    }

    /// Mode `idle`: no timer, nothing; but for a new mode, whatever ends the halt is counted, as
    /// a doubled timer or a stray.
    fn idle(&mut self) {
        while self.timers.due().is_some() && !self.timers.has_news() {
            core::hint::spin_loop();
        }
        loop {
            let events = self.local.events();
            self.timers.account();
            self.count_strays();
            self.gaps.resume(tsc::read());
            if modes::wanted(self.index) != Mode::Idle {
                return;
            }
            self.local.halt(events);
        }
    }

    /// vCPU 0 answers commands. What that takes is our own doing and no gap.
    fn poll_console(&mut self) {
        if self.index != 0 {
            return;
        }
        let now = self.gaps.tick();
        if now >= self.console_at {
            self.console_at = now + tsc::cycles(CONSOLE_US);
            if self.console.poll() {
                self.touch.begin_again();
                self.gaps.resume(tsc::read());
            }
        }
    }
}

/// Starts the APs that `online=` allows, then says that pulse is up.
fn start_others() {
    let options = options::get();
    for vcpu in 1..options.online {
        if !start(vcpu) {
            say!("pulse: vCPU {vcpu} did not start");
        }
    }
    pages::announce();
    let globals = pages::globals();
    say!(
        "pulse: {} vCPUs online",
        field32!(globals.online).load(Relaxed)
    );
}

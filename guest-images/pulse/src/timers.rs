//! The local APIC timer, armed again and again, each interrupt accounted for.
//!
//! A vCPU has one such timer, so its modes take turns: a one-shot is armed, and when it has fired
//! a TSC deadline, and so on. Ring 0 counts interrupts (`traps.s`); here they are compared with
//! what was armed.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use stillpoint_guest_abi::pulse::{Count, Report, Timers as Counts};

use crate::local::Local;
use crate::options::{self, Kinds};
use crate::pages::{add, field, place, raise, show};
use crate::{apic, tsc};

/// Periods of the one-shot and deadline timers in the loop.
const ONESHOT_US: u64 = 2000;
const DEADLINE_US: u64 = 3000;
/// A timer may fire this early: its clock and the TSC are scaled to each other with some error.
const TOLERANCE_US: u64 = 2;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Oneshot,
    Deadline,
}

/// The timer of one vCPU.
pub(crate) struct Timers {
    local: &'static Local,
    report: *mut Report,
    kinds: Kinds,
    period_us: u64,
    has_deadline: bool,
    /// The one armed last, and when it is due.
    kind: Kind,
    due: u64,
    armed: bool,
    /// Interrupts accounted for.
    seen: u64,
    /// Until then interrupts were masked: no timer is late for that.
    masked_until: u64,
    periodic_since: u64,
}

impl Timers {
    /// A timer at rest.
    pub(crate) fn new(local: &'static Local, report: *mut Report, kinds: Kinds) -> Self {
        Self {
            local,
            report,
            kinds,
            period_us: options::get().period_us,
            has_deadline: apic::has_deadline(),
            kind: Kind::Deadline,
            due: 0,
            armed: false,
            seen: local.timer_count.load(Relaxed),
            masked_until: 0,
            periodic_since: 0,
        }
    }

    /// Whether an interrupt is to come; then a halt ends.
    pub(crate) fn busy(&self) -> bool {
        self.armed || self.periodic_since != 0
    }

    /// When the armed one is due, if one is armed.
    pub(crate) fn due(&self) -> Option<u64> {
        self.armed.then_some(self.due)
    }

    /// Whether an interrupt has come that is not accounted for yet.
    pub(crate) fn has_news(&self) -> bool {
        self.local.timer_count.load(Relaxed) != self.seen
    }

    /// Interrupts have just been unmasked.
    pub(crate) fn unmasked(&mut self, now: u64) {
        self.masked_until = now;
    }

    /// Accounts for what came, and arms the next as the command line asked.
    pub(crate) fn service(&mut self) {
        self.account();
        match self.kinds {
            Kinds::None => {}
            Kinds::Periodic => self.start_periodic(),
            _ if self.armed => {}
            _ => {
                let kind = self.next();
                let us = if kind == Kind::Oneshot {
                    ONESHOT_US
                } else {
                    DEADLINE_US
                };
                self.arm(kind, tsc::cycles(us));
            }
        }
    }

    /// Arms one for `at`, if none is armed: for a halt that must end then. Periodic ticks end it
    /// sooner.
    pub(crate) fn arm_for(&mut self, at: u64) {
        if self.kinds == Kinds::Periodic {
            self.start_periodic();
        } else if !self.armed {
            self.arm(
                self.next(),
                at.saturating_sub(tsc::read()).max(tsc::cycles(10)),
            );
        }
    }

    /// Compares the interrupts that came with what was armed.
    pub(crate) fn account(&mut self) {
        let report = self.report;
        if self.periodic_since != 0 {
            let count = self.local.timer_count.load(Relaxed);
            let expected = (tsc::read() - self.periodic_since) / tsc::cycles(self.period_us);
            field!(report.periodic.armed).store(expected, Relaxed);
            add(field!(report.periodic.fired), count - self.seen);
            self.seen = count;
            let (before, left_ns, after) = (tsc::read(), apic::left_ns(), tsc::read());
            let count = Count {
                before,
                after,
                left_ns,
            };
            show(place!(report.count), &count);
            return;
        }
        let count = self.local.timer_count.load(Relaxed);
        let came = count - self.seen;
        if came == 0 {
            return;
        }
        self.seen = count;
        let counts = self.counts();
        let expected = u64::from(self.armed);
        add(field!(counts.doubled), came - expected);
        if self.armed {
            self.armed = false;
            let fired = self.local.timer_tsc.load(Relaxed);
            add(field!(counts.fired), 1);
            if fired + tsc::cycles(TOLERANCE_US) < self.due {
                add(field!(counts.early), 1);
            }
            let late = fired.saturating_sub(self.due.max(self.masked_until));
            raise(field!(counts.worst_late), late);
        }
    }

    fn start_periodic(&mut self) {
        if self.periodic_since == 0 {
            self.periodic_since = tsc::read();
            apic::arm_periodic(self.period_us);
        }
    }

    /// Which mode comes after the last one.
    fn next(&self) -> Kind {
        match self.kinds {
            Kinds::Oneshot => Kind::Oneshot,
            _ if !self.has_deadline => Kind::Oneshot,
            Kinds::Both if self.kind == Kind::Deadline => Kind::Oneshot,
            _ => Kind::Deadline,
        }
    }

    fn arm(&mut self, kind: Kind, cycles: u64) {
        self.kind = kind;
        self.armed = true;
        let counts = self.counts();
        add(field!(counts.armed), 1);
        // Read before the timer starts, so that it cannot seem early.
        self.due = tsc::read() + cycles;
        match kind {
            Kind::Oneshot => apic::arm_oneshot(tsc::micros(cycles)),
            Kind::Deadline => apic::arm_deadline(self.due),
        }
    }

    fn counts(&self) -> *mut Counts {
        let report = self.report;
        let at: &AtomicU64 = match self.kind {
            Kind::Oneshot => field!(report.oneshot.armed),
            Kind::Deadline => field!(report.deadline.armed),
        };
        at.as_ptr().cast()
    }
}

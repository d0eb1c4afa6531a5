//! Whether a guest is well after its swap, from looks at it. Pure: what time it is, it is told.
//!
//! Every *sign* (a vCPU, a queue, a device, the heartbeat, the agent) is good in a look or it is not,
//! and a sign that was not good for longer than its patience is a problem. So one late answer of a
//! busy host means nothing, and standing still means something. A sign that was missing before the swap already
//! is not missed after it.

use std::collections::BTreeMap;
use std::time::Duration;

use stillpoint_control::health::{DeviceSign, Signs};
use stillpoint_control::report::SwapReport;

use crate::model::Before;

/// For how long a vCPU, a queue or a heartbeat may stand still.
const STANDSTILL: Duration = Duration::from_secs(5);
/// For how long a guest's agent, or the VMM itself, may give no answer.
const SILENCE: Duration = Duration::from_secs(15);
/// What a receipt may show as the error of kvmclock, ns. A report warns beyond 50; but a way back is another
/// pause with an error of its own, and takes none away, so it is for clocks that are plainly wrong: on a
/// host whose processors are taken away at times a microsecond is nobody's fault.
const CLOCK_BOUND_NS: u64 = 100_000;

/// What the looks so far say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All is well.
    Well,
    /// These have not been seen to be well yet, or just now.
    Wait(Vec<String>),
    /// These were not, for too long.
    Unwell(Vec<String>),
}

/// One sign: since when it was not seen to be good, and what is said of it then.
#[derive(Clone, Debug)]
struct Sign {
    good_at: Duration,
    is_good: bool,
    patience: Duration,
    problem: String,
}

/// A watch over a guest.
#[derive(Clone, Debug)]
pub struct Watch {
    before: Before,
    began: Duration,
    signs: BTreeMap<String, Sign>,
    last: Option<Signs>,
}

/// What could be seen of a guest, from two looks at it while nothing is done to it.
pub fn before(first: &Signs, second: &Signs) -> Before {
    let failed = second.devices.iter().filter(|device| device.failed);
    Before {
        agent: second.agent == Some(true),
        beats: has_beaten(first, second),
        failed: failed.map(|device| device.name.clone()).collect(),
    }
}

/// Of one vCPU or another: one that halts reads no clock.
fn has_beaten(first: &Signs, second: &Signs) -> bool {
    let mut pairs = first.vcpus.iter().zip(&second.vcpus);
    pairs.any(|(a, b)| b.beat.is_some() && a.beat != b.beat)
}

/// What of a swap's receipt says that the guest's clock is not right.
pub fn of_clock(report: &SwapReport) -> Option<String> {
    let clock = report.clock.as_ref()?;
    match clock.kvmclock_error_ns {
        Some(error) if error.unsigned_abs() > CLOCK_BOUND_NS => Some(format!(
            "the guest's clock is off by {error} ns after the swap, and {CLOCK_BOUND_NS} ns are the bound"
        )),
        _ if clock.masterclock_before && !clock.masterclock_after => {
            Some("the guest's clock lost its masterclock in the swap".into())
        }
        _ => None,
    }
}

impl Watch {
    /// Begins now.
    pub fn begin(before: Before, now: Duration) -> Self {
        Self {
            before,
            began: now,
            signs: BTreeMap::new(),
            last: None,
        }
    }

    /// A look at all of it.
    pub fn look(&mut self, signs: Signs, now: Duration) -> Verdict {
        let last = self.last.take();
        self.sign("vmm", true, SILENCE, now, String::new);
        for (number, vcpu) in signs.vcpus.iter().enumerate() {
            let before = last.as_ref().and_then(|last| last.vcpus.get(number));
            let turned = vcpu.turns != before.map_or(0, |before| before.turns);
            self.sign(&format!("vcpu{number}"), turned, STANDSTILL, now, || {
                format!("vCPU {number} makes no progress")
            });
        }
        for device in &signs.devices {
            let before = last.as_ref().and_then(|last| {
                let mut devices = last.devices.iter();
                devices.find(|other| other.name == device.name)
            });
            self.look_at_device(device, before, now);
        }
        if self.before.beats {
            // Two looks make a beat.
            let beats = last.as_ref().is_some_and(|last| has_beaten(last, &signs));
            self.sign("heartbeat", beats, STANDSTILL, now, || {
                "the guest has lost its heartbeat".into()
            });
        }
        if self.before.agent {
            let answers = signs.agent == Some(true);
            self.sign("agent", answers, SILENCE, now, || {
                "the guest's agent does not answer any more".into()
            });
        }
        self.last = Some(signs);
        self.verdict(now)
    }

    /// The VMM did not say anything.
    pub fn mute(&mut self, why: &str, now: Duration) -> Verdict {
        self.sign("vmm", false, SILENCE, now, || {
            format!("the VMM does not say how the guest is: {why}")
        });
        // Nothing else is seen meanwhile: what was not seen yet has its time from here on.
        self.began = now;
        self.verdict(now)
    }

    fn look_at_device(&mut self, device: &DeviceSign, before: Option<&DeviceSign>, now: Duration) {
        let DeviceSign {
            name,
            failed,
            stuck,
            in_flight,
            queues,
        } = device;
        let well = !failed || self.before.failed.contains(name);
        self.sign(name, well, STANDSTILL, now, || {
            format!("{name} has failed, and waits for a reset by its driver")
        });
        self.sign(&format!("{name}'s thread"), !stuck, STANDSTILL, now, || {
            format!("{name} hangs")
        });
        for queue in queues {
            let number = queue.queue;
            let mut theirs = before.iter().flat_map(|before| &before.queues);
            let before = theirs.find(|other| other.queue == number);
            let taken = before.is_some_and(|before| before.taken != queue.taken);
            // What waits for a slow disk is not the release's doing.
            let moves = queue.waiting == 0 || taken || *in_flight > 0;
            self.sign(&format!("{name}/{number}"), moves, STANDSTILL, now, || {
                let waiting = queue.waiting;
                format!("queue {number} of {name} stands still, with {waiting} requests in it")
            });
        }
    }

    fn sign(
        &mut self,
        name: &str,
        is_good: bool,
        patience: Duration,
        now: Duration,
        problem: impl FnOnce() -> String,
    ) {
        let began = self.began;
        let sign = self.signs.entry(name.to_owned()).or_insert_with(|| Sign {
            good_at: began,
            is_good,
            patience,
            problem: String::new(),
        });
        sign.is_good = is_good;
        match is_good {
            true => sign.good_at = now,
            false => sign.problem = problem(),
        }
    }

    fn verdict(&self, now: Duration) -> Verdict {
        let bad = |sign: &&Sign| !sign.is_good;
        let told = |sign: &Sign| {
            let since = now.saturating_sub(sign.good_at);
            format!("{}, for {:.1} s", sign.problem, since.as_secs_f64())
        };
        let over = |sign: &&Sign| now.saturating_sub(sign.good_at) > sign.patience;
        let late: Vec<_> = self
            .signs
            .values()
            .filter(bad)
            .filter(over)
            .map(told)
            .collect();
        if !late.is_empty() {
            return Verdict::Unwell(late);
        }
        let waiting: Vec<_> = self.signs.values().filter(bad).map(told).collect();
        match waiting.is_empty() {
            true => Verdict::Well,
            false => Verdict::Wait(waiting),
        }
    }
}

#[cfg(test)]
mod tests;

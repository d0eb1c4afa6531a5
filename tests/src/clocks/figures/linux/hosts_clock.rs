//! A host whose clock is set forth and back, and slewed, while a guest is swapped.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use stillpoint_control::clock::Policy;

use super::readings::Line;
use super::{SLOW, Stage, WALL_NS};
use crate::clocks::figures::{DISCONTINUITY_NS, Figure, receipt_of};

/// How often the host's clock is set, forth and back.
const TOGGLE: Duration = Duration::from_millis(200);

impl Stage<'_> {
    /// The host's clock set forth and back by 10 s, and slewed by 500 ppm, all through a pause.
    pub(super) fn host_clock(&self, may_set: bool) -> anyhow::Result<Figure> {
        let name = self.name("host's clock set ±10 s and slewed in a pause");
        let bound = format!("moves nothing beyond {} µs", WALL_NS / 1000);
        if !may_set {
            let why = "only on a host that was made for it: the rig";
            return Ok(Figure::skipped(&name, &bound, why));
        }
        let line = Line::of(&self.guest)?;
        let report = {
            let _disturbed = Disturbed::begin()?;
            self.swap(SLOW.name, Policy::Advance)?
        };
        let moved = line.moved(&self.guest)?;
        let receipt = receipt_of(&report)?;
        let kvmclock = receipt.kvmclock_error_ns.unwrap_or(0);
        let good = moved.realtime.abs() <= WALL_NS
            && moved.monotonic.abs() <= WALL_NS
            && kvmclock.unsigned_abs() <= DISCONTINUITY_NS
            && receipt.pause >= SLOW.least;
        let measured = format!(
            "wall clock {} ns, monotonic {} ns, kvmclock {kvmclock} ns",
            moved.realtime, moved.monotonic
        );
        Ok(Figure::new(&name, bound, measured, good))
    }
}

/// A host whose clock is set forth and back, and slewed, as long as this lives.
struct Disturbed {
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Disturbed {
    fn begin() -> anyhow::Result<Self> {
        slew(500)?;
        let over = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            for step in [10, -10].into_iter().cycle() {
                let is_back = step > 0;
                if is_back && seen.load(Ordering::Relaxed) {
                    return;
                }
                set_by(step);
                std::thread::sleep(TOGGLE);
            }
        });
        Ok(Self {
            over,
            thread: Some(thread),
        })
    }
}

impl Drop for Disturbed {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
        let _ = slew(0);
    }
}

/// Has the host's clock run fast by so many millionths.
fn slew(ppm: i64) -> anyhow::Result<()> {
    // adjtimex(2) counts in 2^-16 ppm.
    let frequency = (ppm << 16).to_string();
    let done = Command::new("busybox")
        .args(["adjtimex", "-f", &frequency])
        .output()
        .context("busybox adjtimex")?;
    ensure!(done.status.success(), "busybox adjtimex: {done:?}");
    Ok(())
}

fn set_by(seconds: i64) {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::Realtime);
    let tv_sec = tv_sec + seconds;
    // Refused only to those who are not root, who have no rig either.
    let _ = clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec });
}

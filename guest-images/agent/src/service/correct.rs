//! Correcting wall-clock time after a pause that the guest's clocks left out.
//!
//! The host knows by how much the clock is late, so it is moved *by* that much and not set *to*
//! anything: how long the request was on its way does not matter. A correction that was made is
//! not made again, however often it is asked for: the host can't tell a request that was lost from
//! an answer that was.
//!
//! A clock that is slewed changes its rate where the kernel counts a second on (ntp.c, `second_overflow`),
//! which it does at a tick; and an idle kernel has none until its next timer. Until then the old rate goes
//! on, 500 ns too far for each millisecond, and nothing makes up for it: the kernel's own account
//! (`ntp_error`) takes the rate that was in force for the one that was wanted. So as long as the rate
//! changes somebody is awake ([`Attendance`]).
#![allow(unsafe_code)] // clock_adjtime has no safe wrapper here.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::libc;
use stillpoint_agent::protocol::{Corrected, Correction, Manner};

const NS: i64 = 1_000_000_000;

/// The corrections that were made.
#[derive(Debug, Default)]
pub(super) struct Corrections {
    last: Mutex<String>,
}

impl Corrections {
    /// Makes one, by `apply`, unless it was the last that was made.
    fn once(
        &self,
        correction: &Correction,
        apply: impl FnOnce(&mut libc::timex) -> io::Result<()>,
    ) -> io::Result<Corrected> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if *last == correction.id {
            return Ok(Corrected { again: true });
        }
        apply(&mut request(correction)?)?;
        last.clone_from(&correction.id);
        Ok(Corrected { again: false })
    }

    /// Makes one.
    pub(super) fn make(&self, correction: &Correction) -> io::Result<Corrected> {
        let corrected = self.once(correction, adjust)?;
        if correction.how == Manner::Slew && !corrected.again {
            std::thread::spawn(attend);
        }
        Ok(corrected)
    }
}

fn adjust(request: &mut libc::timex) -> io::Result<()> {
    // SAFETY: the structure is whole, ours alone, and outlives the call.
    let state = unsafe { libc::clock_adjtime(libc::CLOCK_REALTIME, request) };
    match state {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Microseconds that the kernel has still to slew.
fn left_us() -> io::Result<i64> {
    let mut request = nothing();
    request.modes = libc::ADJ_OFFSET_SS_READ;
    adjust(&mut request)?;
    Ok(request.offset)
}

/// Keeps the kernel's tick going while a slew begins and ends.
fn attend() {
    let (began, mut attendance) = (Instant::now(), Attendance::default());
    while let Ok(left) = left_us() {
        match attendance.next(began.elapsed(), left) {
            Some(sleep) => std::thread::sleep(sleep),
            None => break,
        }
    }
}

/// When to look at a slew that is under way: often in its first second and in its last two, and not at all
/// a second after nothing was left, which is when the last rate ends.
#[derive(Debug, Default)]
struct Attendance {
    nothing_left: Option<Duration>,
}

impl Attendance {
    /// Half of a tick of the fastest kernels that are about (250 a second), and a second with a margin.
    const OFTEN: Duration = Duration::from_millis(2);
    const SELDOM: Duration = Duration::from_millis(250);
    const SECOND: Duration = Duration::from_millis(1100);
    /// What the kernel slews in two seconds.
    const SOON_US: i64 = 1000;

    /// How long to sleep, `at` so long after it began with so much left.
    fn next(&mut self, at: Duration, left_us: i64) -> Option<Duration> {
        if left_us == 0 {
            let since = *self.nothing_left.get_or_insert(at);
            return (at - since < Self::SECOND).then_some(Self::OFTEN);
        }
        self.nothing_left = None;
        let changes = at < Self::SECOND || left_us.abs() <= Self::SOON_US;
        Some(if changes { Self::OFTEN } else { Self::SELDOM })
    }
}

fn nothing() -> libc::timex {
    // SAFETY: the structure is made of integers, for which zeroes are values.
    unsafe { std::mem::zeroed() }
}

/// What the kernel is asked (adjtimex(2)).
fn request(correction: &Correction) -> io::Result<libc::timex> {
    let mut request = nothing();
    match correction.how {
        Manner::Step => {
            request.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
            request.time.tv_sec = correction.by_ns.div_euclid(NS);
            // The part of a second is never negative, whichever way the step goes.
            request.time.tv_usec = correction.by_ns.rem_euclid(NS);
        }
        Manner::Slew => {
            // As adjtime(3) does: at 500 ppm, however far it is.
            request.modes = libc::ADJ_OFFSET_SINGLESHOT;
            request.offset = correction.by_ns / 1000;
        }
        Manner::Other => {
            let text = "this agent knows `step` and `slew`";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn correction(id: &str, by_ns: i64, how: Manner) -> Correction {
        Correction {
            id: id.into(),
            by_ns,
            how,
        }
    }

    #[test]
    fn a_step_is_relative_and_its_part_of_a_second_positive() {
        let back = request(&correction("a", -250, Manner::Step)).unwrap();
        assert_eq!(back.modes, libc::ADJ_SETOFFSET | libc::ADJ_NANO);
        assert_eq!((back.time.tv_sec, back.time.tv_usec), (-1, 999_999_750));
        let on = request(&correction("a", 30_000_000_001, Manner::Step)).unwrap();
        assert_eq!((on.time.tv_sec, on.time.tv_usec), (30, 1));
        let slewed = request(&correction("a", 1_500_000, Manner::Slew)).unwrap();
        assert_eq!(
            (slewed.modes, slewed.offset),
            (libc::ADJ_OFFSET_SINGLESHOT, 1_500)
        );
        request(&correction("a", 1, Manner::Other)).expect_err("of a later release");
    }

    #[test]
    fn a_slew_is_attended_where_its_rate_changes() {
        let mut attendance = Attendance::default();
        let mut next = |ms: u64, left| attendance.next(Duration::from_millis(ms), left);
        let (often, seldom) = (Some(Attendance::OFTEN), Some(Attendance::SELDOM));
        assert_eq!(next(0, 5_000), often);
        assert_eq!(next(2_000, 4_000), seldom);
        assert_eq!(next(8_100, -900), often);
        assert_eq!(next(9_000, 0), often);
        // Another was asked for meanwhile.
        assert_eq!(next(9_500, 20_000), seldom);
        assert_eq!(next(50_000, 0), often);
        assert_eq!(next(51_000, 0), often);
        assert_eq!(next(51_200, 0), None);
    }

    #[test]
    fn each_is_made_once() {
        let corrections = Corrections::default();
        let mut made = 0;
        let mut ask = |id: &str, good: bool| {
            corrections.once(&correction(id, 5, Manner::Step), |_| {
                made += 1;
                good.then_some(())
                    .ok_or_else(|| io::ErrorKind::PermissionDenied.into())
            })
        };
        ask("swap-1", false).expect_err("it was tried and failed");
        assert_eq!(ask("swap-1", true).unwrap(), Corrected { again: false });
        assert_eq!(ask("swap-1", true).unwrap(), Corrected { again: true });
        assert_eq!(ask("swap-2", true).unwrap(), Corrected { again: false });
        assert_eq!(made, 3);
    }
}

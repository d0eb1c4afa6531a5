//! Correcting wall-clock time after a pause that the guest's clocks left out.
//!
//! The host knows by how much the clock is late, so it is moved *by* that much and not set *to*
//! anything: how long the request was on its way does not matter. A correction that was made is
//! not made again, however often it is asked for: the host can't tell a request that was lost from
//! an answer that was.
#![allow(unsafe_code)] // clock_adjtime has no safe wrapper here.

use std::io;
use std::sync::{Mutex, PoisonError};

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
        self.once(correction, |request| {
            // SAFETY: the structure is whole, ours alone, and outlives the call.
            let state = unsafe { libc::clock_adjtime(libc::CLOCK_REALTIME, request) };
            match state {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            }
        })
    }
}

/// What the kernel is asked (adjtimex(2)).
fn request(correction: &Correction) -> io::Result<libc::timex> {
    // SAFETY: the structure is made of integers, for which zeroes are values.
    let mut request: libc::timex = unsafe { std::mem::zeroed() };
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

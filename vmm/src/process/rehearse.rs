//! A rehearsal, asked for at the control socket. The guest runs here before, meanwhile and after.

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use stillpoint_control::message::{Reply, Request};
use stillpoint_control::spec::MAX_BUDGET;

use super::Process;
use crate::event::{Event, Job};
use crate::handover::Channel;
use crate::handover::rehearsal::{self, Errand, Jump};

impl Process {
    pub(super) fn rehearse(&mut self, job: Job) {
        let reply = job.reply.clone();
        let said = match self.rehearsal(job) {
            Ok((errand, socket)) => self.carry_out_rehearsal(&errand, socket),
            Err(message) => Reply::Error {
                code: "bad_request".into(),
                message,
            },
        };
        let _ = reply.send(said);
    }

    fn carry_out_rehearsal(&mut self, errand: &Errand, socket: OwnedFd) -> Reply {
        let mut channel = Channel::new(socket);
        let (events, waiting) = (&self.events, &mut self.waiting);
        let ended = || {
            waiting.extend(events.try_iter());
            let over = |e: &Event| !matches!(e, Event::Control(_));
            waiting.iter().any(over)
        };
        // A bug must not cost the guest: unwinding runs the guard, and the guest goes on.
        let attempt =
            AssertUnwindSafe(|| rehearsal::rehearse(&mut self.guest, errand, &mut channel, ended));
        match catch_unwind(attempt) {
            Ok(told) => Reply::Rehearsed(Box::new(told)),
            Err(_) => Reply::Error {
                code: "failed".into(),
                message: "the rehearsal panicked, which is a bug; the guest goes on here".into(),
            },
        }
    }

    fn rehearsal(&self, job: Job) -> Result<(Errand, OwnedFd), String> {
        let Request::Rehearse {
            peek,
            budget_ns,
            patience,
            clock,
            nonce,
        } = job.request
        else {
            return Err("not a rehearsal".into());
        };
        let [socket]: [OwnedFd; 1] = job.fds.try_into().map_err(|fds: Vec<_>| {
            let count = fds.len();
            format!("a rehearsal comes with 1 file descriptor, this one with {count}")
        })?;
        let spec = self.guest.machine.spec();
        let budget = budget_ns.map_or(spec.blackout_budget, Duration::from_nanos);
        if budget.is_zero() || budget > MAX_BUDGET {
            return Err(format!(
                "a budget of {budget:?} is not more than 0 and at most 30 s"
            ));
        }
        let errand = Errand {
            peek,
            budget,
            patience,
            clock: clock.unwrap_or(spec.clock.policy),
            jump: nonce.map(|nonce| Jump {
                nonce,
                release: self.desk.release().clone(),
                swaps: self.desk.swaps(),
            }),
        };
        Ok((errand, socket))
    }
}

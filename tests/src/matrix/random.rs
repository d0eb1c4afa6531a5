//! Swaps with kills at random moments, by a seed. What is killed, and when, is not chosen by anybody who
//! knows the code; what may come of it is told by the ownership word.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use stillpoint_control::ownership::Owner;

use super::acts::{signal, state};
use super::host::AMPLE;
use super::rounds::{self, over};
use super::{Cell, Host, Whom, expected};
use crate::patience::{PATIENCE, wait_for};

/// After so many swaps it is said how it goes.
const REST: usize = 100;

/// What came of all of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Swaps that moved their guest.
    pub moved: usize,
    /// Swaps that kept it.
    pub kept: usize,
    /// Guests that died with the process that owned them.
    pub crashed: usize,
}

impl Tally {
    fn count(&mut self, outcome: &str) {
        match outcome.split(' ').next() {
            Some("moved") => self.moved += 1,
            Some("kept") => self.kept += 1,
            _ => self.crashed += 1,
        }
    }
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.moved += other.moved;
        self.kept += other.kept;
        self.crashed += other.crashed;
    }
}

/// So many swaps with random faults, as long as `go_on` says so. The same seed makes the same choices;
/// what they meet is up to the machine.
pub fn random(
    host: &mut Host,
    seed: u64,
    swaps: usize,
    go_on: impl Fn() -> bool,
) -> anyhow::Result<Tally> {
    let mut random = fastrand::Rng::with_seed(seed);
    let cells: Vec<Cell> = Cell::all()
        .filter(|cell| {
            matches!(
                cell.act,
                super::Act::Kill | super::Act::Slow | super::Act::Error
            )
        })
        .collect();
    let mut tally = Tally::default();
    for number in (0..swaps).take_while(|_| go_on()) {
        let what = format!("swap {number} of seed {seed}");
        let outcome = match random.u8(..4) {
            0 => {
                let cell = cells[random.usize(..cells.len())];
                let verdict = rounds::run(host, &cell).with_context(|| what.clone())?;
                ensure!(
                    verdict.is_good(),
                    "{what}: {cell}: {}, not {:?}",
                    verdict.outcome,
                    expected(&cell)?
                );
                verdict.outcome
            }
            n => {
                let whom = [Whom::Predecessor, Whom::Successor, Whom::Daemon][usize::from(n) - 1];
                let after = Duration::from_micros(random.u64(..60_000));
                kill_after(host, whom, after)
                    .with_context(|| format!("{what}: {whom:?} after {after:?}\n{}", host.log()))?
            }
        };
        tally.count(&outcome);
        if (number + 1) % REST == 0 {
            println!("seed {seed}: {} of {swaps} swaps, {tally:?}", number + 1);
        }
    }
    Ok(tally)
}

/// A swap between two good releases; `whom` is killed so long after the successor is there.
fn kill_after(host: &mut Host, whom: Whom, after: Duration) -> anyhow::Result<String> {
    let predecessor = host.ready("good")?;
    let before = host.record()?["id"].clone();
    let epoch = host.word()?.read()?.epoch();
    let mut asked = host.swap("good", AMPLE)?;
    let mut successor = None;
    let begun = wait_for("the successor", PATIENCE, || {
        let record = host.record()?;
        successor = record["successor"]["pid"].as_u64();
        Ok((record["id"] != before && successor.is_some()).then_some(()))
    });
    begun?;
    let successor = u32::try_from(successor.context("a successor")?)?;
    std::thread::sleep(after);
    match whom {
        Whom::Daemon => {
            host.daemon.kill()?;
            host.daemon.restart()?;
        }
        Whom::Predecessor => signal(predecessor, Signal::KILL)?,
        Whom::Successor => signal(successor, Signal::KILL)?,
    }
    let victim = match whom {
        Whom::Predecessor => Some(predecessor),
        Whom::Successor => Some(successor),
        Whom::Daemon => None,
    };
    // What the word says once it is dead: whose guest it was is decided by then, or will be by who
    // lives.
    if let Some(pid) = victim {
        wait_for("its death", PATIENCE, || {
            Ok(state(pid).is_none().then_some(()))
        })?;
    }
    let word = host.word()?.read()?;
    let outcome = over(host, Instant::now() + PATIENCE)?.context("it does not end")?;
    let _ = asked.kill();
    let _ = asked.wait();
    let may_crash = match (whom, word) {
        (Whom::Predecessor, Owner::Held(_)) => true,
        (Whom::Predecessor, Owner::Taken(at)) => at == epoch,
        (Whom::Successor, Owner::Taken(at)) => at > epoch,
        _ => false,
    };
    if outcome == "crashed" {
        ensure!(
            may_crash,
            "{word:?} after the death of {whom:?}, and the guest is gone"
        );
        host.is_gone()?;
        return Ok(outcome);
    }
    // A guest that has moved before the kill may have died of it after the swap's end.
    let owner_died = matches!((whom, word), (Whom::Successor, Owner::Taken(at)) if at > epoch)
        || matches!((whom, outcome.as_str()), (Whom::Predecessor, "kept"));
    if owner_died {
        host.is_gone()?;
        return Ok("crashed".into());
    }
    host.runs = "good".into();
    wait_for("the guest to be said to run", PATIENCE, || {
        Ok((host.shown()?["state"] == "running").then_some(()))
    })?;
    host.is_whole()?;
    Ok(outcome)
}

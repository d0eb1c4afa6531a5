//! Several hosts at once, each with a daemon, a guest and a filesystem of its own: most of a cell is
//! waiting for something that hangs.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};

use super::{Cell, Host, Tally, Verdict, random, run};

/// A cell and how it went; an error is a promise broken, or a test that could not be made.
pub type Told = (Cell, anyhow::Result<Verdict>);

/// Goes through rows of cells on one host in each of these directories, a row at a time. `heard` is told
/// of the rows in their order. Gives how many guests were booted.
pub fn rows(
    dirs: &[PathBuf],
    rows: &[Vec<Cell>],
    mut heard: impl FnMut(Vec<Told>),
) -> anyhow::Result<usize> {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (sender, told) = channel();
        let workers: Vec<_> = dirs
            .iter()
            .map(|dir| {
                let (sender, next) = (sender.clone(), &next);
                scope.spawn(move || work(&mut Host::start(dir)?, rows, next, &sender))
            })
            .collect();
        drop(sender);
        let (mut early, mut due) = (std::collections::BTreeMap::new(), 0);
        for (row, cells) in told {
            early.insert(row, cells);
            while let Some(cells) = early.remove(&due) {
                heard(cells);
                due += 1;
            }
        }
        let boots = workers.into_iter().map(|worker| {
            let gone = |_| Err(anyhow::anyhow!("a host's thread panicked"));
            worker.join().unwrap_or_else(gone)
        });
        boots.sum()
    })
}

fn work(
    host: &mut Host,
    rows: &[Vec<Cell>],
    next: &AtomicUsize,
    told: &Sender<(usize, Vec<Told>)>,
) -> anyhow::Result<usize> {
    loop {
        let row = next.fetch_add(1, Ordering::Relaxed);
        let Some(cells) = rows.get(row) else {
            return Ok(host.boots);
        };
        let cells = cells.iter().map(|cell| {
            let verdict = run(host, cell);
            if verdict.is_err() {
                host.forget();
            }
            (*cell, verdict)
        });
        // Whoever listened has left because of an error of its own.
        let _ = told.send((row, cells.collect()));
    }
}

/// So many swaps with random faults on each host, by seeds that follow from this one. The first promise
/// that is broken ends all of them.
pub fn random_swaps(dirs: &[PathBuf], seed: u64, swaps: usize) -> anyhow::Result<Tally> {
    let broken = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let worker = |(number, dir): (usize, &PathBuf)| {
            let (dir, broken) = (dir.clone(), &broken);
            let share = swaps / dirs.len() + usize::from(number < swaps % dirs.len());
            let own = seed.wrapping_add(number as u64);
            scope.spawn(move || {
                let tally = Host::start(&dir).and_then(|mut host| {
                    let go_on = || !broken.load(Ordering::Relaxed);
                    random(&mut host, own, share, go_on)
                });
                broken.fetch_or(tally.is_err(), Ordering::Relaxed);
                tally
            })
        };
        let workers: Vec<_> = dirs.iter().enumerate().map(worker).collect();
        let mut all = Tally::default();
        for worker in workers {
            let gone = |_| Err(anyhow::anyhow!("a host's thread panicked"));
            all += worker.join().unwrap_or_else(gone)?;
        }
        Ok(all)
    })
}

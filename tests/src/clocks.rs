//! A guest's clock, read from its RAM as the guest reads it, and judged apart from what the VMM
//! says of itself.
//!
//! [`figures`] are the promises about clocks, each measured and set beside its bound: the tests take
//! them in short, `make clock` in full length.

pub mod figures;
pub mod page;
pub mod rigged;

use anyhow::{Context, bail, ensure};
use stillpoint_control::report::{Outcome, SwapReport};

use crate::guest::Pulse;
use crate::releases::Release;
use crate::swap::Terms;
use crate::vm::{Recipe, Vm};
use page::Page;

/// Bytes of a wall clock structure (`struct pvclock_wall_clock`).
const WALL_CLOCK: usize = 12;
/// How often a swap may be called off before the freeze.
const TRIES: usize = 3;

/// A pulse guest whose clock is watched.
#[derive(Debug)]
pub struct Watched {
    /// The guest.
    pub vm: Vm,
}

/// What one swap did, by the report and by the guest's RAM.
#[derive(Debug)]
pub struct Seen {
    /// The report.
    pub report: SwapReport,
    /// The wall clock structure was the same, byte for byte.
    pub wall_clock_kept: bool,
    /// For each vCPU: KVM told it that it stood still.
    pub told: Vec<bool>,
    /// For each vCPU: its page says that every vCPU reads the same.
    pub stable: Vec<bool>,
}

impl Watched {
    /// Boots one.
    pub fn up(cpus: u8, cmdline: &str) -> anyhow::Result<Self> {
        let vm = Vm::up(&Recipe::pulse(cpus, cmdline))?;
        Ok(Self { vm })
    }

    /// What VMM and guest said last.
    pub fn last_words(&self) -> String {
        let console = self.vm.console().unwrap_or_default();
        let tail = |text: &str| text.lines().rev().take(5).collect::<Vec<_>>().join(" < ");
        format!("VMM: {}; console: {}", tail(&self.vm.log()), tail(&console))
    }

    fn pulse(&self) -> &Pulse {
        &self.vm.pulse
    }

    /// Guest-physical address of a vCPU's pvclock page.
    fn page_at(&self, vcpu: usize) -> anyhow::Result<u64> {
        let report = self.pulse().look()?;
        let at = report.vcpus.get(vcpu).context("no such vCPU")?.pvclock_gpa;
        ensure!(at != 0, "vCPU {vcpu} has no kvmclock");
        Ok(at)
    }

    /// A vCPU's clock as it computes it.
    pub fn page(&self, vcpu: usize) -> anyhow::Result<Page> {
        Page::read(self.pulse(), self.page_at(vcpu)?)
    }

    fn wall_clock(&self) -> anyhow::Result<[u8; WALL_CLOCK]> {
        let at = self.pulse().look()?.globals.wall_clock_gpa;
        ensure!(at != 0, "the guest has no wall clock structure");
        self.pulse().physical(at)
    }

    /// vCPUs that run and have a kvmclock.
    fn clocked(&self) -> anyhow::Result<Vec<usize>> {
        let vcpus = self.pulse().look()?.vcpus.into_iter().enumerate();
        Ok(vcpus
            .filter(|(_, report)| report.pvclock_gpa != 0)
            .map(|(vcpu, _)| vcpu)
            .collect())
    }

    /// The guest goes on, and nothing about it is wrong. Deadlines that came early are judged against
    /// a run without swaps, elsewhere: on an emulated host KVM itself lets some through.
    pub fn is_well(&self) -> anyhow::Result<()> {
        let seen = self.pulse().wait_progress(&self.vm.vcpus(), 20)?;
        let mut faults = seen.faults();
        faults.retain(|fault| !fault.contains("deadline timers early"));
        ensure!(faults.is_empty(), "{faults:#?}");
        self.pulse().ran_once()
    }

    /// Swaps; the guest must move. A swap that was called off before the freeze is tried again: on a
    /// busy machine it may take too long to make a successor.
    pub fn must_move(&mut self, to: Release, terms: &Terms) -> anyhow::Result<Seen> {
        for _ in 0..TRIES {
            let seen = self.swap(to, terms)?;
            let report = &seen.report;
            if report.outcome == Outcome::Moved {
                return Ok(seen);
            }
            ensure!(report.blackout.host.is_zero(), "{:?}", report.reason);
            eprintln!("called off, unfrozen: {:?}", report.reason);
        }
        bail!("the guest was not moved to {to:?} in {TRIES} tries")
    }

    /// Swaps; whether it moved, and what the report says, is the caller's to judge.
    pub fn swap(&mut self, to: Release, terms: &Terms) -> anyhow::Result<Seen> {
        let vcpus = self.clocked()?;
        for &vcpu in &vcpus {
            page::forget_stop(self.pulse(), self.page_at(vcpu)?)?;
        }
        let before = self.wall_clock()?;
        let report = self.vm.swap(to, terms)?;
        let pages: Vec<_> = vcpus
            .iter()
            .map(|&vcpu| self.page(vcpu))
            .collect::<anyhow::Result<_>>()?;
        Ok(Seen {
            report,
            wall_clock_kept: self.wall_clock()? == before,
            told: pages.iter().map(Page::was_stopped).collect(),
            stable: pages.iter().map(Page::is_stable).collect(),
        })
    }
}

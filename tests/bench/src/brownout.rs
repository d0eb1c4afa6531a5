//! What a guest loses after a swap: a pass of writes over all its RAM right after it, less the same pass once
//! more. Ours fills the new process's page tables before the freeze; a build that leaves that out is the control.

use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;
use stillpoint_tests::console::Console;
use stillpoint_tests::releases::Release;
use stillpoint_tests::vm::{Recipe, Vm};

use crate::ours::pause;
use crate::scene::WORK_MIB;

/// What is written, MiB.
pub(crate) const TOUCHED_MIB: u64 = 1024;
/// RAM of the guest beside that.
const BESIDE_MIB: u64 = 128;
const PATIENCE: Duration = Duration::from_secs(120);
/// A guest that was just swapped has its report made beside it.
const SETTLE_MS: u64 = 50;

/// Passes right after swaps, each less the pass after it, ns.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Brownout {
    /// Page tables filled before the freeze.
    pub(crate) populated: Vec<u64>,
    /// Left to be filled by faults.
    pub(crate) faulted: Vec<u64>,
    /// A pass when nothing is to be filled.
    pub(crate) steady: Vec<u64>,
    /// Guest-visible blackouts of the first kind, and of the second.
    pub(crate) blackouts: [Vec<u64>; 2],
}

impl Brownout {
    /// So many swaps of each kind, in turns.
    pub(crate) fn measure(count: u32) -> anyhow::Result<Self> {
        let touch = format!("ram={WORK_MIB}M touch={TOUCHED_MIB}M");
        let mut recipe = Recipe::pulse(1, &touch);
        recipe.memory_mib = TOUCHED_MIB + BESIDE_MIB;
        let mut vm = Vm::boot(&recipe)?;
        vm.pulse.wait_touched(PATIENCE)?;
        let mut all = Self::default();
        for _ in 0..count {
            let [populated, faulted] = &mut all.blackouts;
            let (cost, steady) = Self::one(&mut vm, Release::Current, populated)?;
            all.populated.push(cost);
            all.steady.push(steady);
            let spoilt = Release::Faulty("spoil=populate");
            let (cost, _) = Self::one(&mut vm, spoilt, faulted)?;
            all.faulted.push(cost);
        }
        vm.power_off()?;
        Ok(all)
    }

    /// One swap: what the pass after it cost, and what the next took, ns.
    fn one(vm: &mut Vm, to: Release, blackouts: &mut Vec<u64>) -> anyhow::Result<(u64, u64)> {
        let report = vm.must_move(to)?;
        blackouts.extend(report.blackout.guest_ns.first().copied().flatten());
        pause(SETTLE_MS);
        let mut console = Console::open(vm)?;
        let first = pass(vm, &mut console).context("the pass after a swap")?;
        let second = pass(vm, &mut console).context("the pass after that")?;
        Ok((first.saturating_sub(second), second))
    }
}

/// How long the guest takes to write every page of it, ns.
fn pass(vm: &Vm, console: &mut Console) -> anyhow::Result<u64> {
    let whole = vm.pulse.look()?.globals.touch_wanted;
    console.type_line("touch")?;
    let touched = |wanted: &dyn Fn(u64) -> bool| {
        let deadline = Instant::now() + PATIENCE;
        while !wanted(vm.pulse.look()?.globals.touched) {
            anyhow::ensure!(
                Instant::now() < deadline,
                "the guest does not touch its RAM"
            );
            std::thread::sleep(Duration::from_micros(200));
        }
        anyhow::Ok(Instant::now())
    };
    let began = touched(&|touched| touched < whole)?;
    let ended = touched(&|touched| touched >= whole)?;
    Ok(u64::try_from(ended.duration_since(began).as_nanos())?)
}

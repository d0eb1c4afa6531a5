//! What a guest loses after a swap: a pass of writes over all its RAM right after it, less the same pass once
//! more. Ours fills the new process's page tables before the freeze, and KVM's own where the kernel can
//! (KVM_PRE_FAULT_MEMORY, Linux 6.11); builds that leave out the one or both are the controls.

mod recovery;

use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;
use stillpoint_tests::console::Console;
use stillpoint_tests::releases::Release;
use stillpoint_tests::vm::{Recipe, Vm};

pub(crate) use self::recovery::Recoveries;
use crate::ours::pause;
use crate::run::progress;
use crate::scene::WORK_MIB;

/// RAM of the guest beside that.
const BESIDE_MIB: u64 = 128;
const PATIENCE: Duration = Duration::from_secs(120);
/// A guest that was just swapped has its report made beside it.
const SETTLE_MS: u64 = 50;

/// Passes right after swaps, each less the pass after it, ns.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Brownout {
    /// What was written, MiB.
    pub(crate) touched_mib: u64,
    /// Page tables filled before the freeze.
    pub(crate) populated: Vec<u64>,
    /// The same, with KVM's own left to be filled by faults; empty where the kernel can't fill them.
    pub(crate) shallow: Vec<u64>,
    /// All left to be filled by faults.
    pub(crate) faulted: Vec<u64>,
    /// A pass when nothing is to be filled.
    pub(crate) steady: Vec<u64>,
    /// Guest-visible blackouts of the first kind, and of the last.
    pub(crate) blackouts: [Vec<u64>; 2],
    /// What reports say of it, of the first kind and of the last.
    pub(crate) recoveries: [Recoveries; 2],
}

impl Brownout {
    /// So many swaps of each kind, in turns.
    pub(crate) fn measure(count: u32, touched_mib: u64) -> anyhow::Result<Self> {
        let touch = format!("ram={WORK_MIB}M touch={touched_mib}M");
        let mut recipe = Recipe::pulse(1, &touch);
        recipe.memory_mib = touched_mib + BESIDE_MIB;
        let mut vm = Vm::boot(&recipe)?;
        vm.pulse.wait_touched(PATIENCE)?;
        let mut all = Self {
            touched_mib,
            ..Self::default()
        };
        for number in 0..count {
            progress("writing all RAM after swaps", number, count);
            let own = Self::one(&mut vm, Release::Current)?;
            all.populated.push(own.cost);
            all.steady.push(own.steady);
            all.blackouts[0].extend(own.blackout);
            if own.has_pre_faulted {
                let shallow = Self::one(&mut vm, Release::Faulty("spoil=pre-fault"))?;
                all.shallow.push(shallow.cost);
            }
            let bare = Self::one(&mut vm, Release::Faulty("spoil=populate"))?;
            all.faulted.push(bare.cost);
            all.blackouts[1].extend(bare.blackout);
        }
        progress("writing all RAM after swaps", count, count);
        vm.power_off()?;
        all.recoveries = recovery::measure(count, touched_mib)?;
        Ok(all)
    }

    /// One swap, and two passes.
    fn one(vm: &mut Vm, to: Release) -> anyhow::Result<After> {
        let report = vm.must_move(to)?;
        pause(SETTLE_MS);
        let mut console = Console::open(vm)?;
        let first = pass(vm, &mut console).context("the pass after a swap")?;
        let steady = pass(vm, &mut console).context("the pass after that")?;
        Ok(After {
            cost: first.saturating_sub(steady),
            steady,
            blackout: report.blackout.guest_ns.first().copied().flatten(),
            has_pre_faulted: report.phases.iter().any(|phase| phase.name == "pre-fault"),
        })
    }
}

/// What one swap showed, ns.
struct After {
    /// What the pass after it took more than the next.
    cost: u64,
    /// What that took.
    steady: u64,
    /// The guest's blackout.
    blackout: Option<u64>,
    /// Whether KVM's page tables were filled.
    has_pre_faulted: bool,
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

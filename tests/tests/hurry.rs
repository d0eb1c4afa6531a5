//! Threads go before all others of the host while their guest stands still, and not a moment longer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use stillpoint_control::report::Outcome;
use stillpoint_state::sections::FORMATS;
use stillpoint_tests::ground::cores;
use stillpoint_tests::needs_kvm;
use stillpoint_tests::patience::{PATIENCE, wait_for};
use stillpoint_tests::releases::Release;
use stillpoint_tests::saved::state_for;
use stillpoint_tests::swap::Terms;
use stillpoint_tests::vm::{Recipe, Vm};
use stillpoint_vmm::handover::Adopted;

/// The vCPUs of the guest.
const VCPUS: u8 = 2;
/// A budget that a hanging successor breaks soon.
const SHORT: Duration = Duration::from_millis(200);
/// A scheduling policy (sched(7)); bit 23 of a capability mask (capabilities(7)).
const SCHED_FIFO: u32 = 1;
const CAP_SYS_NICE: u32 = 23;

/// A thread of a VMM.
#[derive(Clone, Debug)]
struct Seen {
    name: String,
    /// It goes before others.
    hurries: bool,
    /// Where it may run, as a list.
    cores: String,
}

/// A process's threads. One that ends meanwhile is none.
fn threads(pid: u32) -> anyhow::Result<Vec<Seen>> {
    let mut seen = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        let of = |file| std::fs::read_to_string(thread.join(file));
        let (Ok(stat), Ok(status)) = (of("stat"), of("status")) else {
            continue;
        };
        // proc_pid_stat(5): the name in parentheses is the second field, the policy the 41st.
        let (before, after) = stat.rsplit_once(')').context("a name")?;
        let policy = after.split_ascii_whitespace().nth(41 - 3);
        let mut lines = status.lines();
        let cores = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let (_, name) = before.split_once('(').context("a name")?;
        seen.push(Seen {
            name: name.to_owned(),
            hurries: policy.context("a policy")?.parse::<u32>()? == SCHED_FIFO,
            cores: cores.context("cores")?.trim().to_owned(),
        });
    }
    Ok(seen)
}

fn hurried(pid: u32) -> anyhow::Result<Vec<Seen>> {
    let all = threads(pid)?.into_iter();
    Ok(all.filter(|thread| thread.hurries).collect())
}

/// Whether threads of this process, and of those it starts, may be raised.
fn may_hurry() -> anyhow::Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = u64::from_str_radix(line.context("CapEff")?.trim(), 16)?;
    Ok(mask & 1 << CAP_SYS_NICE != 0)
}

fn nobody_hurries(vm: &Vm) -> anyhow::Result<()> {
    wait_for("threads to take their time, anywhere", PATIENCE, || {
        let all = threads(vm.pid())?;
        let first = all.first().context("a thread")?;
        let is_free = |thread: &Seen| !thread.hurries && thread.cores == first.cores;
        Ok(all.iter().all(is_free).then_some(()))
    })
}

/// The most threads of the guest's VMM that were seen to hurry at a time, while it is swapped to a release that hangs
/// when it has to load.
fn hurried_in_a_freeze(vm: &mut Vm) -> anyhow::Result<Vec<Seen>> {
    let pid = vm.pid();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let mut most = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let now = hurried(pid)?;
                if now.len() > most.len() {
                    most = now;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            anyhow::Ok(most)
        });
        let terms = Terms::budget(SHORT);
        let report = vm.swap(Release::Faulty("load=hang"), &terms);
        over.store(true, Ordering::Relaxed);
        let most = watching.join().ok().context("the watch panicked")??;
        let report = report?;
        ensure!(report.outcome == Outcome::Kept, "{report:?}");
        Ok(most)
    })
}

#[test]
fn who_stands_still_goes_first_and_who_runs_does_not() -> anyhow::Result<()> {
    needs_kvm!();
    // Guests that never rest: one left in a hurry would keep this test from its core.
    let mut vm = Vm::up(&Recipe::pulse(VCPUS, "ram=4M"))?;
    nobody_hurries(&vm)?;
    let seen = hurried_in_a_freeze(&mut vm)?;
    match may_hurry()? {
        true => {
            let vcpus = seen.iter().filter(|thread| thread.name.starts_with("vcpu"));
            let vcpus: Vec<_> = vcpus.map(|thread| &thread.cores).collect();
            ensure!(vcpus.len() == usize::from(VCPUS), "{seen:?}");
            ensure!(seen.len() == usize::from(VCPUS) + 1, "who leads: {seen:?}");
            let is_one = |cores: &&String| cores.parse::<u32>().is_ok();
            ensure!(
                cores() == 1 || (vcpus.iter().all(is_one) && vcpus[0] != vcpus[1]),
                "each has a core of its own: {seen:?}"
            );
        }
        false => ensure!(seen.is_empty(), "{seen:?}"),
    }
    nobody_hurries(&vm)?;
    vm.is_well()?;
    vm.must_move(Release::Current)?;
    nobody_hurries(&vm)?;
    vm.is_well()?;
    vm.power_off()
}

/// Where it takes no core from a vCPU, who waits for the other side does so awake; it must know when.
#[test]
fn a_successor_that_waits_awake_hears_when_the_state_comes() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = Vm::up(&Recipe::pulse(1, "ram=4M"))?;
    for awake in [true, false] {
        let wanted = Adopted {
            format: FORMATS[0],
            awake,
            ..Adopted::default()
        };
        let saved = state_for(&vm, wanted)?;
        ensure!(saved.announced == awake, "announced: {}", saved.announced);
        vm.is_well()?;
    }
    nobody_hurries(&vm)?;
    vm.must_move(Release::Current)?;
    nobody_hurries(&vm)?;
    vm.is_well()?;
    vm.power_off()
}

//! Whether a swap would work, said before it is asked for; and what of a VM would keep it from ever
//! being swapped, said when it starts.
//!
//! Nothing here changes anything. The guest stands still for the rehearsal's peek and for nothing else,
//! and that pause has its event like any other (RFD 0024).

use std::time::Duration;

use stillpoint_control::clock::Policy;
use stillpoint_control::rehearsal::{Rehearsal, Stage, Verdict};
use stillpoint_control::spec::MachineSpec;

use super::announce::{self, Look, Peek};
use super::rehearsal::{self, Of, Terms};
use super::{Host, Hurry, health};
use crate::agent::reserves;
use crate::doctor::{Check, Status};
use crate::model::{Preflight, Rehearsed, Release, SwapRecord, VmRecord};
use crate::store::StoreError;

/// Below this the blackout's bare KVM calls take their share of any budget.
const TIGHT_BUDGET: Duration = Duration::from_millis(20);

/// Looks at the swap that `asked` would be. `peek`: the guest may be made to stand still for it.
pub async fn preflight(
    host: &Host,
    vm: &VmRecord,
    to: &Release,
    asked: SwapRecord,
    peek: bool,
) -> Result<Preflight, StoreError> {
    let mut checks = vec![Check::ok(
        "release",
        format!(
            "{}: its digest is what was added, and the formats of state meet",
            to.manifest.version
        ),
    )];
    checks.extend(
        vm.process
            .iter()
            .flat_map(|process| reserves::look(process.pid)),
    );
    checks.push(agent(host, vm).await);
    // Its successor would take the cores of a swap that goes on.
    let _lane = host.lanes.enter(vm.spec.cpus, Hurry::None).await;
    let look = Look {
        id: &asked.id,
        budget_ns: asked.budget_ns,
        no_notice: asked.no_notice.as_ref(),
    };
    let peeked = match peek {
        true => announce::peek(host, vm, look).await?,
        false => Peek::LeftOut("--no-peek: no state was saved, so loading it was not tried".into()),
    };
    let terms = Terms {
        peek: matches!(peeked, Peek::Announced),
        budget_ns: asked.budget_ns,
        clock: asked.clock,
        of: Of::Handover,
    };
    let rehearsed = rehearsal::rehearse(host, vm, to, terms).await;
    let told = match &rehearsed {
        Ok(Rehearsed::Told(told)) => Some(told),
        _ => None,
    };
    if let Peek::Announced = peeked {
        announce::end_peek(
            host,
            &asked.id,
            told.map_or(Duration::ZERO, |told| told.peek),
        )
        .await?;
    }
    let peek = told.map_or(Duration::ZERO, |told| told.peek);
    match &rehearsed {
        Ok(Rehearsed::Told(told)) => checks.extend(of_rehearsal(told, &vm.spec, &asked, &peeked)),
        Ok(Rehearsed::Unknown { why }) => checks.push(Check::new(
            "rehearsal",
            Status::Warn,
            why.clone(),
            "nothing is known of whether the guest's state can be loaded; a swap finds out, and keeps the guest \
             where it is if not",
        )),
        Err(why) => checks.push(Check::new(
            "rehearsal",
            Status::Fail,
            why.clone(),
            "a swap would end the same way; see `stillpoint logs`, and whether the release is a VMM for this host",
        )),
    }
    Ok(Preflight {
        id: asked.id,
        vm: vm.name.clone(),
        from: asked.from,
        to: asked.to,
        would_work: Preflight::judge(&checks),
        peek_ns: u64::try_from(peek.as_nanos()).unwrap_or(u64::MAX),
        checks,
        rehearsal: rehearsed.ok(),
    })
}

/// What of a VM limits or prevents swaps, as it stands.
pub async fn updatable(host: &Host, vm: &VmRecord) -> Vec<Check> {
    let mut checks = vec![releases(host, vm).await, budget_of(&vm.spec)];
    if let Some(process) = vm.process.as_ref().filter(|_| vm.state.is_active()) {
        checks.extend(reserves::look(process.pid));
    }
    checks.push(watched(vm));
    checks
}

/// Whether there is, or can be, a release to swap to.
async fn releases(host: &Host, vm: &VmRecord) -> Check {
    const NAME: &str = "releases";
    let all = host.store.releases().await.unwrap_or_default();
    let Some(own) = all.iter().find(|r| r.manifest.version == vm.release) else {
        let found = format!("release {} is not in the store", vm.release);
        let remedy =
            "add it again (`stillpoint release add`): without it there is no way back to it";
        return Check::new(NAME, Status::Warn, found, remedy);
    };
    let others = || all.iter().filter(|r| r.manifest.version != vm.release);
    if others().next().is_none() {
        let found = format!("{} is the only one yet", vm.release);
        return Check::ok(NAME, found);
    }
    let there: Vec<_> = others()
        .filter(|other| other.can_follow(own).is_ok())
        .collect();
    let back = there
        .iter()
        .filter(|other| own.can_follow(other).is_ok())
        .count();
    if there.is_empty() {
        let found = format!(
            "none of the store reads the state that {} writes",
            vm.release
        );
        let remedy = "add a release that reads one of its formats (`release ls`), or start the guest anew \
                      with another";
        return Check::new(NAME, Status::Fail, found, remedy);
    }
    let found = format!(
        "{} of {} others read its state, and back from {back} of them",
        there.len(),
        others().count()
    );
    match back == there.len() {
        true => Check::ok(NAME, found),
        false => Check::new(
            NAME,
            Status::Warn,
            found,
            "from some of them there is no way back: swap by way of one that reads both formats",
        ),
    }
}

fn budget_of(spec: &MachineSpec) -> Check {
    let budget = spec.blackout_budget;
    let found = format!("{budget:?} for each blackout");
    match budget < TIGHT_BUDGET {
        true => Check::new(
            "budget",
            Status::Warn,
            found,
            "a busy host needs longer, and swaps are called off then; give it more (`--budget`), or \
             measure with `swap vmm --check`",
        ),
        false => Check::ok("budget", found),
    }
}

/// By what its health is judged after a swap.
fn watched(vm: &VmRecord) -> Check {
    const NAME: &str = "watch";
    if vm.profile.watch_ns == Some(0) {
        return Check::new(
            NAME,
            Status::Warn,
            "it is not watched after a swap",
            "a release that harms it is not noticed; `run --watch TIME` watches it",
        );
    }
    match vm.spec.vsock {
        Some(_) => Check::ok(NAME, "vCPUs, queues, clock, and its agent if it has one"),
        None => Check::ok(
            NAME,
            "vCPUs, queues and clock; without a vsock no agent can be asked",
        ),
    }
}

async fn agent(host: &Host, vm: &VmRecord) -> Check {
    const NAME: &str = "signs of life";
    let Some(signs) = health::signs(host, vm).await else {
        return Check::new(
            NAME,
            Status::Warn,
            format!("release {} tells none", vm.release),
            "what is missed after the swap can't be compared with before",
        );
    };
    let failed: Vec<_> = signs
        .devices
        .iter()
        .filter(|d| d.failed)
        .map(|d| d.name.as_str())
        .collect();
    let agent = match signs.agent {
        Some(true) => "its agent answers",
        Some(false) => "no agent answers",
        None => "there is no way to ask an agent",
    };
    let found = format!(
        "{} vCPUs, {} devices; {agent}",
        signs.vcpus.len(),
        signs.devices.len()
    );
    match failed.is_empty() {
        true => Check::ok(NAME, found),
        false => Check::new(
            NAME,
            Status::Warn,
            format!("{found}; failed already: {}", failed.join(", ")),
            "the guest's driver must reset them; a swap changes nothing about it",
        ),
    }
}

/// A rehearsal, taken apart: each stage is a check of its own.
fn of_rehearsal(
    told: &Rehearsal,
    spec: &MachineSpec,
    asked: &SwapRecord,
    peek: &Peek,
) -> Vec<Check> {
    let failed = |stage| told.verdict == Verdict::Failed && told.stage == stage;
    let why = || told.reason.clone().unwrap_or_default();
    let mut checks = Vec::new();
    if told.verdict == Verdict::CalledOff {
        let remedy = "ask again when the guest is up";
        return vec![Check::new("rehearsal", Status::Warn, why(), remedy)];
    }
    if failed(Stage::Build) {
        let remedy = "the release can't build this machine on this host (CPUID, TSC, memory, devices): keep \
                      the guest where it is, and report it with this text";
        return vec![Check::new("machine", Status::Fail, why(), remedy)];
    }
    let built = format!(
        "built in {:?}: CPUID of {} vCPUs, TSC, {} devices",
        told.build,
        spec.cpus,
        spec.device_count()
    );
    checks.push(Check::ok("machine", built));
    if let Peek::LeftOut(why) = peek {
        let remedy = "MSRs, devices' states and clocks were not tried; the swap rehearses them, under its own event";
        checks.push(Check::new("state", Status::Warn, why.clone(), remedy));
        return checks;
    }
    if failed(Stage::Peek) {
        let remedy = "the guest did not come to rest, as it would not in a swap: try again when its disks and the host are \
                      less busy, or with a larger `--budget`";
        checks.push(Check::new("state", Status::Fail, why(), remedy));
        return checks;
    }
    if failed(Stage::Load) {
        let remedy = "the release can't load this guest's state: keep the guest where it is, and report it with this text";
        checks.push(Check::new("state", Status::Fail, why(), remedy));
        return checks;
    }
    let loaded = format!(
        "{} bytes in format {} loaded in {:?}, MSRs and devices among them",
        told.state_bytes, told.state_format, told.load
    );
    checks.push(Check::ok("state", loaded));
    checks.push(match failed(Stage::Compare) {
        true => Check::new(
            "likeness",
            Status::Fail,
            format!("{}: {}", why(), told.differences.join("; ")),
            "the release would change the guest's state without a word: don't swap to it, and report it with this text",
        ),
        false => Check::ok("likeness", "saved again, it is the same"),
    });
    checks.push(blackout(told, spec, asked));
    checks
}

/// What the blackout would be, about: the peek did its first half, the rehearsal its second.
fn blackout(told: &Rehearsal, spec: &MachineSpec, asked: &SwapRecord) -> Check {
    let budget = asked
        .budget_ns
        .map_or(spec.blackout_budget, Duration::from_nanos);
    let about = told.peek + told.load;
    let found = format!(
        "about {about:?} of its {budget:?}: the peek was {:?}",
        told.peek
    );
    // Give-up wants what loading took once more in reserve.
    let needed = about + told.load;
    let clock = asked.clock.unwrap_or(spec.clock.policy);
    let found = match clock {
        Policy::Advance => found,
        Policy::Hold => format!("{found}; the guest's clocks leave it out"),
    };
    match needed > budget {
        true => Check::new(
            "blackout",
            Status::Warn,
            found,
            "the swap may be called off at its budget; give it more (`--budget`)",
        ),
        false => Check::ok("blackout", found),
    }
}

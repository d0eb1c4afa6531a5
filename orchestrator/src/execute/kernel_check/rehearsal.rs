//! A jump rehearsed, guest by guest, on the kernel that runs: the release that would revive a guest under the next one
//! is verified and started, reads the guest's record as it would be stored, builds its machine, loads it and marks the
//! record. Nothing comes of it but a line for each guest.
//!
//! What can't be known so is what the next kernel's KVM makes of the same calls.

use std::time::Duration;

use stillpoint_control::rehearsal::{Rehearsal, Stage, Verdict};

use crate::doctor::{Check, Status};
use crate::execute::adopt::release_for;
use crate::execute::announce::{self, Look, Peek};
use crate::execute::host::Part;
use crate::execute::rehearsal::{self, Of, Terms};
use crate::execute::{Host, Hurry};
use crate::model::{HostSwap, Rehearsed, Release, SwapId, VmName, VmRecord, VmState};
use crate::store::StoreError;

/// A look at a jump beforehand.
#[derive(Clone, Debug)]
pub struct LookAtJump {
    /// Its id; each guest's pause has its event by this and the guest's name.
    pub id: SwapId,
    /// Whether guests may be made to stand still for it.
    pub peek: bool,
    /// The longest that one may, ns.
    pub budget_ns: u64,
    /// Why guests that listen hear of that only when it starts.
    pub no_notice: Option<String>,
}

/// What a rehearsal came to: by which release, and what it showed.
struct Tried {
    version: String,
    rehearsed: Result<Rehearsed, String>,
    /// Why its state was left out, if it was.
    left_out: Option<String>,
}

/// Rehearses the revival of every guest that has a place beside which it would be stored, as many at once as the host
/// has cores for. What else is wrong is told too, and is no reason to leave this out.
pub async fn rehearsals(host: &Host, look: &LookAtJump) -> Result<Vec<Check>, StoreError> {
    let vms = host.store.vms().await?;
    let placed = |vm: &VmRecord| vm.state == VmState::Running && vm.spec.memory.carve_out.is_some();
    let tasks = vms.into_iter().filter(placed).map(|vm| {
        let (host, look) = (host.clone(), look.clone());
        tokio::spawn(async move {
            let tried = look_at(&host, &vm, &look).await?;
            Ok::<_, StoreError>(check(&vm.name, &tried))
        })
    });
    let tasks: Vec<_> = tasks.collect();
    let mut checks = Vec::with_capacity(tasks.len());
    for task in tasks {
        checks.push(match task.await {
            Ok(checked) => checked?,
            Err(error) => Check::new("rehearsal", Status::Warn, error.to_string(), "ask again"),
        });
    }
    Ok(checks)
}

async fn look_at(host: &Host, vm: &VmRecord, look: &LookAtJump) -> Result<Tried, StoreError> {
    let _lane = host.lanes.enter(vm.spec.cpus, Hurry::None).await;
    let id = SwapId(format!("{}.{}", look.id, vm.name));
    let of_guest = Look {
        id: &id,
        budget_ns: Some(look.budget_ns),
        no_notice: look.no_notice.as_ref(),
    };
    let left_out = match look.peek {
        true => match announce::peek(host, vm, of_guest).await? {
            Peek::Announced => None,
            Peek::LeftOut(why) => Some(why),
        },
        false => Some("--no-peek: its record was not made, so loading it was not tried".into()),
    };
    let tried = try_out(host, vm, look.budget_ns, left_out).await;
    if tried.left_out.is_none() {
        announce::end_peek(host, &id, stood(&tried.rehearsed)).await?;
    }
    Ok(tried)
}

/// Before guests stand still for a jump, inside their event: rehearses the revival of each and notes it with its part.
/// On `Err` the jump must not be begun; what the longest peek was is told with it.
pub(in crate::execute) async fn rehearse_parts(
    host: &Host,
    swap: &HostSwap,
    parts: &mut [Part],
) -> Result<(), (String, Duration)> {
    let tasks = parts.iter().map(|part| {
        let (host, vm, budget) = (host.clone(), part.vm().clone(), swap.budget_ns);
        tokio::spawn(async move {
            let _lane = host.lanes.enter(vm.spec.cpus, Hurry::None).await;
            try_out(&host, &vm, budget, None).await
        })
    });
    let tasks: Vec<_> = tasks.collect();
    let (mut refusals, mut longest) = (Vec::new(), Duration::ZERO);
    for (part, task) in parts.iter_mut().zip(tasks) {
        let tried = match task.await {
            Ok(tried) => tried,
            Err(error) => Tried {
                version: part.vm().release.clone(),
                rehearsed: Ok(Rehearsed::Unknown {
                    why: error.to_string(),
                }),
                left_out: None,
            },
        };
        longest = longest.max(stood(&tried.rehearsed));
        let found = check(&part.vm().name, &tried);
        if found.status == Status::Fail {
            refusals.push(format!(
                "{}: {}; {}",
                found.check, found.found, found.remedy
            ));
        }
        part.rehearsed(tried.rehearsed.ok());
    }
    match refusals.is_empty() {
        true => Ok(()),
        false => Err((
            format!(
                "{}. The guests go on under this kernel; `--no-rehearsal` swaps it without",
                refusals.join("; ")
            ),
            longest,
        )),
    }
}

/// Rehearses it with the release that adoption would choose.
async fn try_out(host: &Host, vm: &VmRecord, budget_ns: u64, left_out: Option<String>) -> Tried {
    let release = match revived_by(host, vm).await {
        Ok(release) => release,
        Err(why) => {
            return Tried {
                version: vm.release.clone(),
                rehearsed: Err(why),
                left_out,
            };
        }
    };
    let terms = Terms {
        peek: left_out.is_none(),
        budget_ns: Some(budget_ns),
        clock: None,
        of: Of::Revival,
    };
    Tried {
        rehearsed: rehearsal::rehearse(host, vm, &release, terms).await,
        version: release.manifest.version,
        left_out,
    }
}

/// The release that would revive it: records are in the format that the one which runs it likes best.
async fn revived_by(host: &Host, vm: &VmRecord) -> Result<Release, String> {
    let all = host.store.releases().await.map_err(|e| e.to_string())?;
    let own = all.iter().find(|one| one.manifest.version == vm.release);
    let own = own.ok_or_else(|| format!("release {} is not in the store", vm.release))?;
    let format = own.manifest.writes.first().copied().unwrap_or(0);
    release_for(&all, vm, format)
}

fn stood(rehearsed: &Result<Rehearsed, String>) -> Duration {
    match rehearsed {
        Ok(Rehearsed::Told(told)) => told.peek,
        _ => Duration::ZERO,
    }
}

/// What it says of the jump, in a line.
fn check(vm: &VmName, tried: &Tried) -> Check {
    let (name, version) = (format!("rehearsal {vm}"), &tried.version);
    let told = match &tried.rehearsed {
        Ok(Rehearsed::Told(told)) => told,
        Ok(Rehearsed::Unknown { why }) => {
            let remedy = "whether its record can be loaded is not known before the jump; a guest whose record can't be \
                          keeps it, and its RAM";
            return Check::new(&name, Status::Warn, why.clone(), remedy);
        }
        Err(why) => {
            let found = format!("release {version} would not revive it: {why}");
            return Check::new(&name, Status::Fail, found, OTHER_RELEASE);
        }
    };
    match (told.verdict, &tried.left_out) {
        (Verdict::Failed, _) => Check::new(
            &name,
            Status::Fail,
            format!("release {version} would not revive it: {}", why(told)),
            remedy(told.stage),
        ),
        (Verdict::CalledOff, _) => {
            Check::new(&name, Status::Warn, why(told), "ask again when it is up")
        }
        (Verdict::Passed, Some(left_out)) => Check::new(
            &name,
            Status::Warn,
            format!("release {version} built its machine; {left_out}"),
            "the jump rehearses it with its state, inside its event",
        ),
        (Verdict::Passed, None) => Check::ok(
            &name,
            format!(
                "release {version} read its record, loaded {} bytes in format {} in {:?} and saved the same again; it \
                 stood still for {:?}",
                told.state_bytes, told.state_format, told.load, told.peek
            ),
        ),
    }
}

const OTHER_RELEASE: &str = "swap it to a release that can (`stillpoint swap vmm`), or stop it";

fn why(told: &Rehearsal) -> String {
    let why = told
        .reason
        .as_deref()
        .unwrap_or("it did not say why")
        .trim_end_matches('.');
    match told.differences.is_empty() {
        true => why.to_owned(),
        false => format!("{why}: {}", told.differences.join("; ")),
    }
}

fn remedy(stage: Stage) -> &'static str {
    match stage {
        Stage::Build => {
            "what it names is needed after the jump: correct that, or swap it to another release before \
             (`stillpoint swap vmm`)"
        }
        Stage::Peek => {
            "it did not come to rest, as it would not for the jump: ask again when its disks and the host are less \
             busy, or with a larger `--budget`"
        }
        Stage::Load | Stage::Compare | Stage::Done => OTHER_RELEASE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(verdict: Verdict, stage: Stage) -> Rehearsal {
        Rehearsal {
            verdict,
            stage,
            reason: (verdict != Verdict::Passed).then(|| "section vcpu is bad".into()),
            ..Rehearsal::begin()
        }
    }

    fn line(rehearsed: Result<Rehearsed, String>, left_out: Option<&str>) -> Check {
        let tried = Tried {
            version: "1.4".into(),
            rehearsed,
            left_out: left_out.map(str::to_owned),
        };
        check(&"web-1".to_owned().try_into().expect("a name"), &tried)
    }

    #[test]
    fn a_line_says_which_guest_which_release_why_and_what_to_do() {
        for stage in [Stage::Build, Stage::Peek, Stage::Load, Stage::Compare] {
            let told = told(Verdict::Failed, stage);
            let failed = line(Ok(Rehearsed::Told(told)), None);
            assert_eq!(failed.check, "rehearsal web-1");
            assert_eq!(failed.status, Status::Fail, "{failed:?}");
            assert!(failed.found.contains("release 1.4"), "{failed:?}");
            assert!(failed.found.contains("section vcpu is bad"), "{failed:?}");
            assert!(!failed.remedy.is_empty(), "{failed:?}");
        }
        let dead = line(Err("it did not come up".into()), None);
        assert!(dead.status == Status::Fail && dead.found.contains("did not come up"));
    }

    #[test]
    fn what_was_not_tried_is_no_verdict() {
        let passed = || Ok(Rehearsed::Told(told(Verdict::Passed, Stage::Done)));
        assert_eq!(line(passed(), None).status, Status::Ok);
        let listens = line(passed(), Some("the guest listens"));
        assert!(listens.status == Status::Warn && listens.found.contains("the guest listens"));
        let off = Ok(Rehearsed::Told(told(Verdict::CalledOff, Stage::Peek)));
        assert_eq!(line(off, None).status, Status::Warn);
        let unknown = Rehearsed::Unknown {
            why: "it does not know how".into(),
        };
        assert_eq!(line(Ok(unknown), None).status, Status::Warn);
    }
}

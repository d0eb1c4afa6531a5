//! A pause without a machine, of one that has none: only when it was and for which swap.

use std::time::{Duration, Instant, SystemTime};

use stillpoint_control::message::Reply;
use stillpoint_control::report::{Blackout, Outcome, Phase, Side, SwapReport};

use super::{Now, Toy, lock};

/// Stands still from now on, and has let go of KVM, which it never had.
pub(super) fn detach(toy: &Toy, swap: String) -> Reply {
    let mut now = lock(&toy.now);
    if let Some(refused) = is_for_another(&now, &swap) {
        return refused;
    }
    now.standing.get_or_insert((swap, Instant::now()));
    Reply::Detached
}

/// Has a machine again.
pub(super) fn rebuild(toy: &Toy, swap: &str) -> Reply {
    let now = lock(&toy.now);
    is_for_another(&now, swap).unwrap_or(Reply::Rebuilt)
}

/// Goes on, and says how long it stood still.
pub(super) fn resume(toy: &Toy, swap: &str) -> Reply {
    let mut now = lock(&toy.now);
    if let Some(refused) = is_for_another(&now, swap) {
        return refused;
    }
    let stood = now
        .standing
        .take()
        .map_or(Duration::ZERO, |(_, since)| since.elapsed());
    let report = report(toy, swap, stood);
    now.report = Some(report.clone());
    Reply::Resumed {
        report: Box::new(report),
    }
}

fn is_for_another(now: &Now, swap: &str) -> Option<Reply> {
    let (other, _) = now.standing.as_ref()?;
    (other != swap).then(|| Reply::Error {
        code: "busy".into(),
        message: format!("it stands still for {other}"),
    })
}

fn report(toy: &Toy, swap: &str, stood: Duration) -> SwapReport {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let phase = |name: &str, duration| Phase {
        name: name.into(),
        side: Side::Predecessor,
        in_blackout: true,
        duration,
    };
    SwapReport {
        swap: swap.into(),
        vm: toy.spec.name.clone(),
        component: "kvm".into(),
        from: toy.release.clone(),
        to: toy.release.clone(),
        outcome: Outcome::Resumed,
        reason: None,
        started_at_unix_ns: u64::try_from((now - stood).as_nanos()).unwrap_or(0),
        vcpus: toy.spec.cpus.into(),
        memory_bytes: toy.spec.memory.size,
        state_format: 1,
        state_bytes: 0,
        budget: Duration::from_secs(30),
        margin: None,
        phases: vec![phase("stand", stood)],
        blackout: Blackout {
            host: stood,
            guest_ns: vec![None],
            vcpus: Vec::new(),
        },
        clock: None,
        recovery: vec![],
        warnings: vec![],
    }
}

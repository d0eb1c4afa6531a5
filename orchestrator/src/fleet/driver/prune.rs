//! Rollouts that are over are kept for a while, and then pruned with their histories: a look reads all there are.

use crate::fleet::look::{Look, Versioned};
use crate::fleet::record::{RolloutId, RolloutRecord};
use crate::fleet::{Fleet, HISTORY, keys};
use crate::store::shared::{Change, Committed, Expect, Guard, SharedError};

/// So many that are over are kept, the last ones.
pub(super) const KEPT: usize = 100;
/// Records that go in one commit: etcd takes 128 changes.
const BATCH: usize = 100;

/// The rollout that is to go next: the one that ended first, if there are too many.
fn oldest(look: &Look) -> Option<&Versioned<RolloutRecord>> {
    let over = || {
        look.rollouts
            .iter()
            .filter(|rollout| rollout.record.state.is_over())
    };
    if over().count() <= KEPT {
        return None;
    }
    over().min_by_key(|rollout| (rollout.record.ended_at, rollout.record.asked_at))
}

/// Prunes one rollout, if there is one too many; which. Its record goes last, so that a driver that dies in the middle
/// leaves it to be found again.
pub(super) async fn prune(
    fleet: &Fleet,
    look: &Look,
    guard: &Guard,
) -> Result<Option<RolloutId>, SharedError> {
    let Some(Versioned { record, version }) = oldest(look) else {
        return Ok(None);
    };
    let steps = fleet
        .shared
        .list(&format!("{HISTORY}{}/", record.id))
        .await?;
    let gone = steps
        .entries
        .into_iter()
        .map(|entry| Change::remove(entry.key, Expect::Anything));
    let gone: Vec<_> = gone.collect();
    for batch in gone.chunks(BATCH) {
        if fleet.shared.commit(batch.to_vec(), Some(guard)).await? == Committed::Refused {
            return Ok(None);
        }
    }
    let last = Change::remove(keys::rollout(&record.id), Expect::Version(*version));
    let done = fleet.shared.commit(vec![last], Some(guard)).await?;
    Ok((done != Committed::Refused).then(|| record.id.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::record::HistoryStep;
    use crate::fleet::tests::fleet;
    use crate::fleet::{DRIVER, LIVE, written};
    use crate::model::{Moment, Policy};
    use crate::plan::rollout::State;
    use crate::store::shared::{Memory, Shared};

    fn rollout(number: u64, state: State) -> RolloutRecord {
        RolloutRecord {
            budget_ns: None,
            id: RolloutId(format!("r{number:04}")),
            component: "vmm".into(),
            to: "1".into(),
            allow_downgrade: false,
            policy: Policy::default(),
            stages: 1,
            state,
            reason: None,
            gates: Vec::new(),
            forgiven: 0,
            units: Vec::new(),
            steps: 1,
            asked_at: Moment(number),
            ended_at: state.is_over().then_some(Moment(number)),
        }
    }

    #[tokio::test]
    async fn the_last_hundred_that_are_over_are_kept_and_all_that_are_not() {
        let shared = Shared::Memory(Memory::default());
        let fleet = fleet(&shared, "h", "one");
        let many = u64::try_from(KEPT).expect("a number") + 3;
        for number in 0..many {
            // The first one goes on since for ever.
            let state = if number == 0 {
                State::Running
            } else {
                State::Finished
            };
            let record = rollout(number, state);
            let step = HistoryStep {
                at: Moment(number),
                by: "a test".into(),
                lines: vec!["started".into()],
            };
            let changes = vec![
                Change::put(keys::rollout(&record.id), Expect::Absent, written(&record)),
                Change::put(keys::step(&record.id, 1), Expect::Absent, written(&step)),
            ];
            shared.commit(changes, None).await.expect("commit");
        }
        let driver = vec![Change::put(DRIVER, Expect::Absent, b"{}".to_vec())];
        let Committed::Done(created) = shared.commit(driver, None).await.expect("commit") else {
            panic!("refused");
        };
        let guard = |created| Guard {
            key: DRIVER.into(),
            created,
        };
        let look = async || Look::of(&shared.list(LIVE).await.expect("list"));
        // A driver that was replaced prunes nothing.
        let none = prune(&fleet, &look().await, &guard(created + 1))
            .await
            .expect("asked");
        assert_eq!(none, None);
        let mut pruned = Vec::new();
        while let Some(id) = prune(&fleet, &look().await, &guard(created))
            .await
            .expect("pruned")
        {
            pruned.push(id.0);
        }
        assert_eq!(pruned, ["r0001", "r0002"]);
        assert_eq!(look().await.rollouts.len(), KEPT + 1);
        let steps = shared.list(HISTORY).await.expect("list").entries;
        assert_eq!(steps.len(), KEPT + 1);
        assert!(steps.iter().any(|step| step.key.contains("r0000")));
    }
}

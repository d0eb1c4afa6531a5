//! A host's name is one daemon's: it claims it in the shared store before it says anything of itself, and what it
//! says is guarded by that claim.
//!
//! ```text
//!   nobody has it ─────▶ ours ◀──── ours, by a daemon before this one on the same store
//!   somebody else's ───▶ taken: this daemon looks after its guests, and is no part of the fleet
//!        └── their lease ends ──▶ ours
//! ```
//!
//! Who has the name keeps it, whoever comes later. Must never: write or remove a card, an answer or a seat under
//! a name that is another's.

use std::sync::{Arc, Mutex, PoisonError};

use super::member::LEASE;
use super::record::Claim;
use super::{CLAIMS, Fleet, keys, read, written};
use crate::execute::unix_ns;
use crate::model::{Code, Moment, Problem};
use crate::store::shared::{Change, Committed, Expect, Guard, Keep, Lease, SharedError};

/// How this daemon stands to its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It has not been able to ask.
    Unknown,
    /// It has it, by the claim that was made at that revision.
    Ours(u64),
    /// Another has it.
    Taken(Box<Claim>),
}

/// The same for all that asks.
#[derive(Clone, Debug)]
pub struct Named(Arc<Mutex<Standing>>);

impl Default for Named {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Standing::Unknown)))
    }
}

impl Named {
    /// How it stands.
    pub fn now(&self) -> Standing {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, to: Standing) -> Standing {
        std::mem::replace(
            &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner),
            to,
        )
    }
}

impl Fleet {
    /// What guards all that is said under this host's name; `None` while the name isn't ours.
    pub fn name_guard(&self) -> Option<Guard> {
        match self.named.now() {
            Standing::Ours(created) => Some(Guard {
                key: keys::of_host(CLAIMS, &self.me),
                created,
            }),
            Standing::Unknown | Standing::Taken(_) => None,
        }
    }

    /// An error if the name is another's.
    pub(super) fn is_us(&self) -> Result<(), Problem> {
        match self.named.now() {
            Standing::Taken(claim) => Err(Problem::new(Code::NameTaken, self.said_taken(&claim))),
            Standing::Unknown | Standing::Ours(_) => Ok(()),
        }
    }

    fn said_taken(&self, claim: &Claim) -> String {
        format!(
            "another daemon has the name `{}` in the fleet at {}: the one on machine {} with state directory {}. This one \
             looks after its guests, and does nothing in the fleet until it has a name of its own: start it with \
             another --host-name, or end the other",
            self.me,
            self.shared.said(),
            claim.machine,
            claim.state_dir,
        )
    }
}

/// The claim, and the lease that it hangs on.
#[derive(Debug)]
pub(super) struct Holder {
    lease: Option<Lease>,
    kept: tokio::time::Instant,
}

impl Holder {
    pub(super) fn new() -> Self {
        Self {
            lease: None,
            kept: tokio::time::Instant::now(),
        }
    }

    /// Keeps the claim, or makes it; its lease, if the name is ours.
    pub(super) async fn hold(&mut self, fleet: &Fleet) -> Result<Option<Lease>, SharedError> {
        if let Some(lease) = self.lease {
            if self.kept.elapsed() < LEASE / 4 {
                return Ok(Some(lease));
            }
            if fleet.shared.keep(lease).await? {
                self.kept = tokio::time::Instant::now();
                return Ok(Some(lease));
            }
            // It was over for a while, and the name anybody's.
            self.lease = None;
            fleet.named.set(Standing::Unknown);
        }
        let key = keys::of_host(CLAIMS, &fleet.me);
        let found = fleet.shared.get(&key).await?;
        let expect = match &found {
            None => Expect::Absent,
            Some(entry) => {
                let claim: Claim = read(entry)?;
                if claim.daemon != fleet.claim.daemon {
                    let said = fleet.said_taken(&claim);
                    let before = fleet.named.set(Standing::Taken(Box::new(claim)));
                    if !matches!(before, Standing::Taken(_)) {
                        tracing::error!("{said}");
                    }
                    return Ok(None);
                }
                Expect::Version(entry.version)
            }
        };
        let lease = fleet.shared.lease(LEASE).await?;
        let claim = Claim {
            since: Moment(unix_ns()),
            ..fleet.claim.clone()
        };
        let change = Change::keep(key, expect, written(&claim), Keep::With(lease));
        match fleet.shared.commit(vec![change], None).await {
            Ok(Committed::Done(revision)) => {
                let created = found.map_or(revision, |entry| entry.created);
                fleet.named.set(Standing::Ours(created));
                self.lease = Some(lease);
                self.kept = tokio::time::Instant::now();
                Ok(Some(lease))
            }
            // Another was quicker; or nobody knows, and the lease must not keep the name for nobody.
            other => {
                let _ = fleet.shared.revoke(lease).await;
                other.map(|_| None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::fleet;
    use crate::store::shared::{Memory, Shared};

    #[tokio::test(start_paused = true)]
    async fn a_name_is_the_first_ones_until_its_lease_ends() {
        let shared = Shared::Memory(Memory::default());
        let (first, second) = (fleet(&shared, "h", "first"), fleet(&shared, "h", "second"));
        let (mut one, mut two) = (Holder::new(), Holder::new());
        assert!(one.hold(&first).await.expect("claimed").is_some());
        assert!(two.hold(&second).await.expect("asked").is_none());
        let problem = second.look().await.expect_err("it is no part of the fleet");
        assert_eq!(problem.code, Code::NameTaken);
        assert!(
            problem.message.contains("machine first-machine"),
            "{problem}"
        );
        assert!(problem.message.contains("--host-name"), "{problem}");
        first.look().await.expect("the first one is");
        assert_eq!(second.name_guard(), None);

        // A daemon that starts anew on the same store is the same.
        let again = fleet(&shared, "h", "first");
        assert!(Holder::new().hold(&again).await.expect("claimed").is_some());
        assert_eq!(again.name_guard(), first.name_guard());

        // And one that is silent for too long has lost it.
        tokio::time::advance(LEASE * 2).await;
        assert!(two.hold(&second).await.expect("claimed").is_some());
        second.look().await.expect("it is theirs now");
        assert!(one.hold(&first).await.expect("asked").is_none());
        assert!(matches!(first.named.now(), Standing::Taken(_)));
    }
}

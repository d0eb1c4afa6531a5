//! Whether hosts agree on what time it is, as the driver finds out.
//!
//! Every host writes the time by its own clock beside the word that it is heard, again and again. Whoever looks sees that
//! a record changed between two looks, so it was written between them; if the time in it lies beyond both by
//! more than [`BOUND`], that host's clock and ours disagree by at least so much, whatever the network did.
//!
//! ```text
//!   our clock   ───── look: old record ─────────────── look: new record ─────▶
//!   it was written        within here ├────────────────┤
//!   time in it                                               ├ ahead by at least ┤ x
//! ```
//!
//! What is decided by time, such as whether a window is open, is decided by the driver's clock. So a host whose clock
//! disagrees is left alone; and a driver that most others disagree with drives no more for a while.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;

use super::look::Look;
use crate::model::{HostName, Moment};

/// Clocks that disagree by no more are as good as one.
pub const BOUND: Duration = Duration::from_secs(5);
/// How often a host writes its time.
pub const TELL: Duration = Duration::from_secs(5);

/// By how much a host's clock disagrees with the driver's, at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Skew {
    /// It is ahead, by so many seconds at least.
    AheadS(u64),
    /// It is behind, by so many seconds at least.
    BehindS(u64),
}

impl std::fmt::Display for Skew {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AheadS(s) => write!(f, "at least {s} s ahead"),
            Self::BehindS(s) => write!(f, "at least {s} s behind"),
        }
    }
}

impl Skew {
    /// Whether the two say nearly the same: no reason to write it anew.
    fn is_near(self, other: Self) -> bool {
        match (self, other) {
            (Self::AheadS(a), Self::AheadS(b)) | (Self::BehindS(a), Self::BehindS(b)) => {
                a.abs_diff(b) <= 2
            }
            _ => false,
        }
    }
}

/// What a host's record was when it was seen last.
#[derive(Clone, Copy, Debug)]
struct Last {
    version: u64,
    /// When it was certainly not written anew yet.
    old_at: Instant,
    /// What was found of it; `None` until it changed under our eyes.
    found: Option<Option<Skew>>,
}

/// What is known of all hosts' clocks. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Clocks(Arc<Mutex<BTreeMap<HostName, Last>>>);

impl Clocks {
    /// Takes note of a look that was begun at `begun` and whose answer was there at `now`, by our clock `wall`.
    pub fn note(&self, look: &Look, begun: Instant, now: Instant, wall: Moment) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|name, _| {
            look.hosts
                .get(name)
                .is_some_and(|host| host.alive.is_some())
        });
        for (name, host) in &look.hosts {
            let Some(alive) = &host.alive else {
                continue;
            };
            let Some(clock) = alive.clock else {
                continue;
            };
            let before = all.get(name).copied();
            let changed = before.is_none_or(|last| last.version != host.alive_version);
            let found = if changed {
                let since = before.map(|last| now.saturating_duration_since(last.old_at));
                let skew = skew(clock, wall, since);
                // Of the first look at a host only one side is certain.
                (since.is_some() || skew.is_some()).then_some(skew)
            } else {
                before.and_then(|last| last.found)
            };
            let last = Last {
                version: host.alive_version,
                old_at: begun,
                found,
            };
            all.insert(name.clone(), last);
        }
    }

    /// Hosts whose clocks disagree with ours.
    pub fn off(&self) -> BTreeMap<HostName, Skew> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let off = all
            .iter()
            .filter_map(|(name, last)| Some((name.clone(), last.found??)));
        off.collect()
    }

    /// Whether a host's clock was compared with ours.
    pub fn is_compared(&self, host: &HostName) -> bool {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(host).is_some_and(|last| last.found.is_some())
    }
}

/// What a time says that was written within the last `since` (whenever, if absent) and read at `wall`.
fn skew(clock: Moment, wall: Moment, since: Option<Duration>) -> Option<Skew> {
    let bound = u64::try_from(BOUND.as_nanos()).unwrap_or(u64::MAX);
    let ahead = clock.0.saturating_sub(wall.0);
    if ahead > bound {
        return Some(Skew::AheadS(ahead / 1_000_000_000));
    }
    let since = u64::try_from(since?.as_nanos()).unwrap_or(u64::MAX);
    let behind = wall.0.saturating_sub(since).saturating_sub(clock.0);
    (behind > bound).then_some(Skew::BehindS(behind / 1_000_000_000))
}

/// Whether what was found is worth writing again.
pub fn is_news(before: &BTreeMap<HostName, Skew>, now: &BTreeMap<HostName, Skew>) -> bool {
    let near = |(name, skew): (&HostName, &Skew)| {
        before.get(name).is_some_and(|other| skew.is_near(*other))
    };
    before.len() != now.len() || !now.iter().all(near)
}

/// Whether it is our own clock that is wrong: most of the others, and more than one, disagree with it alike.
pub fn is_ours_wrong(off: &BTreeMap<HostName, Skew>, others: usize) -> bool {
    let ahead = off
        .values()
        .filter(|skew| matches!(skew, Skew::AheadS(_)))
        .count();
    let alike = ahead.max(off.len() - ahead);
    alike >= 2 && alike * 2 > others
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::record::Alive;

    const S: u64 = 1_000_000_000;
    const NOON: u64 = 1_000_000 * S;

    fn host(name: &str) -> HostName {
        HostName::try_from(name.to_owned()).expect("a name")
    }

    fn look(version: u64, clock: u64) -> Look {
        let mut look = Look::default();
        let of = look.hosts.entry(host("h")).or_default();
        of.alive = Some(Alive {
            since: Moment(1),
            clock: Some(Moment(clock)),
        });
        of.alive_version = version;
        look
    }

    /// Two looks five seconds apart, of which the second finds a new record with that time in it.
    fn found(clock: u64) -> Option<Skew> {
        let (clocks, start) = (Clocks::default(), Instant::now());
        let at = |s| start + Duration::from_secs(s);
        clocks.note(&look(1, NOON), at(0), at(0), Moment(NOON));
        assert!(
            !clocks.is_compared(&host("h")),
            "one look says nothing of a clock that isn't ahead"
        );
        clocks.note(&look(2, clock), at(5), at(5), Moment(NOON + 5 * S));
        assert!(clocks.is_compared(&host("h")));
        clocks.off().get(&host("h")).copied()
    }

    #[test]
    fn a_clock_is_off_only_by_what_no_delay_explains() {
        // Written anywhere within the five seconds: no more is known of it.
        for good in [
            NOON,
            NOON + 3 * S,
            NOON + 5 * S,
            NOON - 5 * S,
            NOON + 10 * S,
        ] {
            assert_eq!(found(good), None, "{good}");
        }
        assert_eq!(found(NOON + 66 * S), Some(Skew::AheadS(61)));
        assert_eq!(found(NOON - 61 * S), Some(Skew::BehindS(61)));
    }

    #[test]
    fn a_look_that_takes_long_makes_no_clock_wrong() {
        let (clocks, start) = (Clocks::default(), Instant::now());
        let at = |s| start + Duration::from_secs(s);
        clocks.note(&look(1, NOON), at(0), at(0), Moment(NOON));
        // Nothing was heard for a minute; what was written at its beginning is seen at its end.
        clocks.note(&look(2, NOON + S), at(60), at(61), Moment(NOON + 61 * S));
        assert_eq!(clocks.off(), BTreeMap::new());
        // One that is ahead is found at the first look, and set right again it is right.
        let clocks = Clocks::default();
        clocks.note(&look(1, NOON + 60 * S), at(0), at(0), Moment(NOON));
        assert_eq!(clocks.off().get(&host("h")), Some(&Skew::AheadS(60)));
        clocks.note(&look(2, NOON + 5 * S), at(5), at(5), Moment(NOON + 5 * S));
        assert_eq!(clocks.off(), BTreeMap::new());
    }

    #[test]
    fn who_disagrees_with_most_others_is_wrong() {
        let off = |skews: &[Skew]| {
            let all = skews.iter().enumerate();
            all.map(|(at, skew)| (host(&format!("h{at}")), *skew))
                .collect()
        };
        let (ahead, behind) = (Skew::AheadS(60), Skew::BehindS(60));
        assert!(is_ours_wrong(&off(&[ahead, ahead]), 2));
        assert!(is_ours_wrong(&off(&[behind, behind, ahead]), 3));
        // Of one other nobody can say which of the two it is.
        assert!(!is_ours_wrong(&off(&[ahead]), 1));
        assert!(!is_ours_wrong(&off(&[ahead, ahead]), 5));
        assert!(!is_ours_wrong(&off(&[ahead, behind]), 2));
        let (few, more) = (off(&[ahead]), off(&[Skew::AheadS(61)]));
        assert!(!is_news(&few, &more));
        assert!(is_news(&few, &off(&[Skew::AheadS(70)])) && is_news(&few, &off(&[])));
    }
}

//! Many hosts, one plan: what their daemons tell each other by the shared store, and who drives.
//!
//! ```text
//!     every daemon                 the shared store                     one of them, elected
//!   publish ── hosts/ vms/ ──────────▶                ──── look ──▶ plan::rollout ──┐
//!                                                                                    │ records first,
//!   orders ◀── orders/ ──────────────◀                ◀── rollouts/ orders/ ─────────┘ in one commit
//!      └────── answers/ ─────────────▶                ──── look ──▶ ...
//! ```
//!
//! | key | what | written by |
//! |---|---|---|
//! | `hosts/HOST`, `vms/HOST/VM` | what a host says of itself and its guests | that host's daemon |
//! | `claims/HOST` | which daemon has that name; hangs on a lease, and guards all that the host's daemon writes | that host's daemon |
//! | `alive/HOST` | that its daemon is heard, and its clock; hangs on the same lease | that host's daemon |
//! | `clocks` | hosts whose clocks disagree with the driver's | the driver |
//! | `cordons/HOST` | that an operator wants it left alone | whoever is asked |
//! | `sets/SET` | who sits in which update domain | whoever starts a guest |
//! | `driver` | who drives; hangs on a lease. When it was made is the driver's *epoch* | whoever is elected |
//! | `open` | changed by whoever starts a rollout: no two start over the same VMs at once | the same |
//! | `rollouts/ID` | a rollout: policy, layout, how far each unit is | the driver; state by hand too |
//! | `history/ID/STEP` | what was done in that step, and why | the driver; whoever is asked |
//! | `orders/HOST/VM` | a swap to be done there, with the driver's epoch | the driver |
//! | `answers/HOST/VM` | how far that swap is | that host's daemon |
//! | `orders/HOST/@host`, `answers/HOST/@host` | the same of a host with all its guests | the same |
//!
//! Those of hosts, VMs, rollouts, orders and answers lie under `live/`, which is looked at for each step.
//!
//! A host that is alone is a fleet of one, by the same code, in its own store.
//!
//! What must be true: a driver's commits are guarded by its epoch, so one that was replaced writes nothing.
//! A rollout says that a unit is begun in the same commit that orders its swap. A host acts on an order once:
//! the order's id is the swap's, which is in the host's own store before anything happens; and it refuses
//! an epoch below the highest that it acted on. Must never: be needed by a running guest.

pub mod ask;
pub mod clocks;
pub mod driver;
pub mod explain;
pub(crate) mod keys;
pub mod look;
pub mod member;
pub mod name;
pub mod publish;
pub mod record;
pub mod seats;

pub use keys::{
    ALIVE, ANSWERS, CLAIMS, CLOCKS, CORDONS, DRIVER, HISTORY, HOSTS, LIVE, OPEN, ORDERS, ROLLOUTS,
    SETS, VMS,
};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::model::{HostName, Labels};
use crate::store::shared::{Entry, Shared, SharedError};

/// This daemon's place in its fleet. Clones are the same.
#[derive(Clone, Debug)]
pub struct Fleet {
    /// What all share.
    pub shared: Shared,
    /// This host.
    pub me: HostName,
    /// Where it stands.
    pub stands: Stands,
    /// Which daemon it is, for others that call their hosts by the same name.
    pub claim: record::Claim,
    /// Whether the name is ours.
    pub named: name::Named,
    /// Whether hosts agree on the time, as far as this daemon has looked.
    pub clocks: clocks::Clocks,
}

/// Where a host stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stands {
    /// Its zone.
    pub zone: String,
    /// Its fault domain: a rack, or whatever fails together.
    pub fault_domain: String,
    /// What else it is called by.
    pub labels: Labels,
}

impl Default for Stands {
    fn default() -> Self {
        Self {
            zone: "zone-0".into(),
            fault_domain: "rack-0".into(),
            labels: Labels::new(),
        }
    }
}

/// A record as it is written.
pub(crate) fn written<T: Serialize>(record: &T) -> Vec<u8> {
    // Our own records are plain trees with text for keys.
    serde_json::to_vec(record).unwrap_or_default()
}

/// A record as it was read.
pub(crate) fn read<T: DeserializeOwned>(entry: &Entry) -> Result<T, SharedError> {
    serde_json::from_slice(&entry.value).map_err(|e| SharedError::Malformed {
        key: entry.key.clone(),
        problem: e.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Moment;

    /// A place in a fleet, of a daemon that is called so.
    pub(in crate::fleet) fn fleet(shared: &Shared, host: &str, daemon: &str) -> Fleet {
        Fleet {
            shared: shared.clone(),
            me: HostName::try_from(host.to_owned()).expect("name"),
            stands: Stands::default(),
            claim: record::Claim {
                daemon: daemon.into(),
                machine: format!("{daemon}-machine"),
                state_dir: "/var/lib/stillpoint".into(),
                since: Moment(0),
            },
            named: name::Named::default(),
            clocks: clocks::Clocks::default(),
        }
    }
}

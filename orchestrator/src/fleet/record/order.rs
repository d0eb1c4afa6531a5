//! What a driver orders, and what a host answers.

use serde::{Deserialize, Serialize};

use super::RolloutId;
use crate::model::{Rung, SwapId, SwapRecord};
use crate::plan::rollout::Way;
use crate::plan::rollout::evidence::Worst;

/// A swap to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Its id, and that of the swap.
    pub id: SwapId,
    /// The rollout.
    pub rollout: RolloutId,
    /// What is swapped.
    #[serde(default = "vmm")]
    pub rung: Rung,
    /// The driver's epoch.
    pub epoch: u64,
    /// The version that is to run the VM, or to be the host's.
    pub to: String,
    /// The longest that guests of the host stand still, ns, where it is swapped with all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget_ns: Option<u64>,
    /// In which direction that is.
    pub way: Way,
    /// How long before its pause the guest hears of it, ns; its own notice when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice_ns: Option<u64>,
    /// Why it gets no notice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_notice: Option<String>,
    /// Whether a guest that isn't well is put back at once, by its own host.
    pub way_back: bool,
    /// Whether the release may be below the pinned minimum.
    pub allow_downgrade: bool,
}

/// What orders are of that don't say it.
fn vmm() -> Rung {
    Rung::Vmm
}

/// How far an order is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Far {
    /// Something else has to end first, or it goes on.
    UnderWay,
    /// It could not be begun. The guest runs on as before.
    Refused,
    /// The VM runs on what was ordered; more may come to be known.
    There,
    /// The same, and all is known.
    Settled,
    /// It was not done, and the guest runs on as before.
    Kept,
    /// The guest was lost.
    Lost,
    /// It was tried and did not succeed; the guests run, on what they ran on before as far as that is known.
    Failed,
}

impl Far {
    /// Whether no more will come to be known.
    pub fn is_all_known(self) -> bool {
        matches!(self, Self::Settled | Self::Failed)
    }
}

/// What became of an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The order.
    pub order: SwapId,
    /// How far it is.
    pub far: Far,
    /// Why, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The swap as it is recorded, once it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap: Option<SwapRecord>,
    /// What it was to the guests of a host that was swapped with all of them, once it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst: Option<Worst>,
}

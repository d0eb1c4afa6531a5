//! What measuring gives.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::scene::Scene;

/// Who swapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Who {
    /// Stillpoint, as its daemon swaps: rehearsed, and what stands of the state loaded ahead.
    Ours,
    /// Stillpoint without a rehearsal: all of the state is loaded after the freeze.
    Whole,
    /// Bare KVM calls.
    Floor,
    /// QEMU, to a new process that takes its RAM over.
    Qemu,
    /// QEMU, stopped and continued in place.
    QemuStop,
    /// Nobody.
    NoSwap,
}

impl Who {
    /// In the order in which they are shown.
    pub(crate) const ALL: [Self; 6] = [
        Self::Ours,
        Self::Whole,
        Self::Floor,
        Self::Qemu,
        Self::QemuStop,
        Self::NoSwap,
    ];

    /// For people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ours => "Stillpoint",
            Self::Whole => "not rehearsed",
            Self::Floor => "floor",
            Self::Qemu => "QEMU cpr",
            Self::QemuStop => "QEMU stop",
            Self::NoSwap => "no swap",
        }
    }
}

/// One swap, or one window without.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// From the kick of the first vCPU to the first entry of the last, ns. For a window without
    /// a swap: its length.
    pub(crate) host_ns: u64,
    /// How long each vCPU was out of its guest, less what its threads waited for a core, ns; where both processes tell.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) unqueued_ns: Vec<u64>,
    /// The longest gap that each vCPU saw, ns; 0 if none was long enough to be logged.
    pub(crate) guest_ns: Vec<u64>,
    /// Phases within the blackout, in their order: name, ns.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) phases: Vec<(String, u64)>,
    /// Phases before it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) brownout: BTreeMap<String, u64>,
}

impl Sample {
    /// The worst vCPU's time out of its guest, less its waits for a core, ns; if that is known.
    pub(crate) fn unqueued_worst(&self) -> Option<u64> {
        self.unqueued_ns.iter().max().copied()
    }

    /// The worst vCPU's gap, ns.
    pub(crate) fn guest(&self) -> u64 {
        self.guest_ns.iter().copied().max().unwrap_or(0)
    }
}

/// All samples of one kind.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Series {
    /// The machine.
    pub(crate) scene: Scene,
    /// Who swapped.
    pub(crate) who: Who,
    /// In the order in which they were taken.
    pub(crate) samples: Vec<Sample>,
    /// Swaps whose gap could not be found in the guest's log; not among the samples, but the host knows of them.
    pub(crate) unseen: Vec<Sample>,
    /// What the guest found wrong with how it was treated, if anything.
    pub(crate) faults: Vec<String>,
}

impl Series {
    /// Nothing yet.
    pub(crate) fn new(scene: Scene, who: Who) -> Self {
        Self {
            scene,
            who,
            samples: Vec::new(),
            unseen: Vec::new(),
            faults: Vec::new(),
        }
    }

    /// Takes samples in; one in which the guest logged no gap proves nothing of a swap.
    pub(crate) fn extend(&mut self, samples: Vec<Sample>) {
        let (seen, unseen): (Vec<_>, Vec<_>) = samples
            .into_iter()
            .partition(|sample| self.who == Who::NoSwap || sample.guest() != 0);
        self.unseen.extend(unseen);
        self.samples.extend(seen);
    }

    /// The worst vCPU's gap of each sample, ns.
    pub(crate) fn guest(&self) -> Vec<u64> {
        self.samples.iter().map(Sample::guest).collect()
    }

    /// The host's blackout of each sample, ns.
    pub(crate) fn host(&self) -> Vec<u64> {
        let all = self.samples.iter().chain(&self.unseen);
        all.map(|sample| sample.host_ns).collect()
    }

    /// What each vCPU was out of its guest, less its waits for a core, of each sample that knows it.
    pub(crate) fn unqueued(&self) -> Vec<u64> {
        let all = self.samples.iter().chain(&self.unseen);
        all.flat_map(|sample| &sample.unqueued_ns)
            .copied()
            .collect()
    }

    /// The same of the worst vCPU of each.
    pub(crate) fn unqueued_worst(&self) -> Vec<u64> {
        let all = self.samples.iter().chain(&self.unseen);
        all.filter_map(Sample::unqueued_worst).collect()
    }
}

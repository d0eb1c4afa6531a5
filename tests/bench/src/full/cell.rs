//! One machine of the crossing.

use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use stillpoint_control::spec::Pages;
use stillpoint_tests::vm::Recipe;

use crate::sample::Sample;
use crate::{environment, scene, stats};

/// vCPUs.
pub(crate) const VCPUS: [u8; 4] = [1, 2, 4, 8];
/// RAM, MiB.
pub(crate) const MEMORY: [u64; 3] = [256, 2048, 8192];
/// What RAM lies in.
pub(crate) const PAGES: [Pages; 3] = [Pages::Base, Pages::Thp, Pages::Hugetlb2m];
/// Of each 10 ms a vCPU runs so many percent.
pub(crate) const DUTIES: [u8; 2] = [BUSY, 3];
/// A vCPU that never rests.
pub(crate) const BUSY: u8 = 100;

/// A machine, and what its guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cell {
    /// vCPUs.
    pub(crate) vcpus: u8,
    /// RAM, MiB.
    pub(crate) memory_mib: u64,
    /// Whether the guest has written every page of it.
    pub(crate) touched: bool,
    /// What it lies in.
    pub(crate) pages: Pages,
    /// Percent of the time that a vCPU runs.
    pub(crate) duty: u8,
}

/// What was measured of one, as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Taken {
    /// The build of the VMM.
    pub(crate) build: String,
    /// The host's load at that time.
    pub(crate) load: f64,
    /// The machine.
    pub(crate) cell: Cell,
    /// Its figures.
    pub(crate) outcome: Outcome,
}

/// Figures, or why there are none.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// Swaps, and windows without one.
    Measured {
        /// Swaps.
        swaps: Vec<Sample>,
        /// Windows.
        none: Vec<Sample>,
        /// What the guest complains of.
        faults: Vec<String>,
    },
    /// Why it could not be measured here.
    LeftOut(String),
}

/// All of them.
pub(crate) fn all() -> Vec<Cell> {
    let mut cells = Vec::new();
    for pages in PAGES {
        for memory_mib in MEMORY {
            for touched in [false, true] {
                for vcpus in VCPUS {
                    let with = |duty| Cell {
                        vcpus,
                        memory_mib,
                        touched,
                        pages,
                        duty,
                    };
                    cells.extend(DUTIES.map(with));
                }
            }
        }
    }
    cells
}

impl Cell {
    /// In file names.
    pub(crate) fn id(&self) -> String {
        let Self {
            vcpus,
            memory_mib,
            duty,
            ..
        } = self;
        let touched = if self.touched { "touched" } else { "untouched" };
        format!(
            "{vcpus}vcpu-{memory_mib}m-{touched}-{}-duty{duty}",
            self.pages_word()
        )
    }

    /// For people.
    pub(crate) fn title(&self) -> String {
        let touched = if self.touched { "touched" } else { "untouched" };
        let busy = if self.duty == BUSY { "busy" } else { "resting" };
        format!(
            "{} vCPUs, {} MiB {touched}, {}, {busy}",
            self.vcpus,
            self.memory_mib,
            self.pages_word()
        )
    }

    /// What its RAM lies in, in a word.
    pub(crate) fn pages_word(&self) -> &'static str {
        match self.pages {
            Pages::Base => "4k",
            Pages::Thp => "thp",
            Pages::Hugetlb2m => "hugetlb-2m",
            Pages::Hugetlb1g => "hugetlb-1g",
        }
    }

    /// Why it can't be run here.
    pub(crate) fn impossible(&self) -> Option<String> {
        environment::lacks(self.memory_mib, self.pages)
    }

    /// How it is booted.
    pub(crate) fn recipe(&self) -> Recipe {
        let words = scene::words(self.memory_mib, self.touched, self.duty);
        scene::recipe(self.vcpus, (self.memory_mib, self.pages), &words)
    }
}

/// Median of the worst vCPU's time out of the guest, less its waits for a core, ms; if all swaps know it.
pub(crate) fn worst_unqueued(swaps: &[Sample]) -> Option<f64> {
    let worst: Option<Vec<u64>> = swaps.iter().map(Sample::unqueued_worst).collect();
    Some(stats::summary(&worst?)?.p50)
}

impl Taken {
    /// What an earlier run kept.
    pub(crate) fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    /// Kept whole or not at all.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let new = path.with_extension("new");
        let context = || format!("write {}", path.display());
        std::fs::write(&new, serde_json::to_vec(self)?).with_context(context)?;
        std::fs::rename(&new, path).with_context(context)
    }
}

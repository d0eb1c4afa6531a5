//! The machines that are measured.

use serde::Serialize;
use stillpoint_control::spec::Pages;
use stillpoint_tests::vm::Recipe;

/// A machine. Its guest works on a few MiB of its RAM.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Scene {
    /// In file names.
    pub(crate) id: &'static str,
    /// For people.
    pub(crate) title: &'static str,
    /// vCPUs.
    pub(crate) vcpus: u8,
    /// RAM, MiB.
    pub(crate) memory_mib: u64,
    /// Of each millisecond its vCPUs run so many percent, and halt for the rest.
    pub(crate) duty: u8,
    /// Whether its guest has written every page of its RAM once before the first swap.
    pub(crate) touched: bool,
    /// What its RAM lies in.
    pub(crate) pages: Pages,
}

/// One vCPU, little RAM.
pub(crate) const BASE: Scene = Scene {
    id: "1vcpu-256m",
    title: "1 vCPU, 256 MiB",
    vcpus: 1,
    memory_mib: 256,
    duty: 100,
    touched: true,
    pages: Pages::Base,
};

/// As many vCPUs as the smallest host has cores.
pub(crate) const PAIR: Scene = Scene {
    id: "2vcpu-256m",
    title: "2 vCPUs, 256 MiB",
    vcpus: 2,
    ..BASE
};

/// [`BASE`] again, in turns with [`LARGE`].
pub(crate) const SMALL: Scene = Scene {
    id: "1vcpu-256m-beside-8g",
    ..BASE
};

/// One vCPU, much RAM.
pub(crate) const LARGE: Scene = Scene {
    id: "1vcpu-8g",
    title: "1 vCPU, 8 GiB",
    memory_mib: 8192,
    ..BASE
};

/// [`BASE`] once more, and machines that differ from it by one thing each, in turns.
pub(crate) const VARIED: [Scene; 5] = [
    Scene {
        id: "1vcpu-256m-beside-varied",
        ..BASE
    },
    Scene {
        id: "1vcpu-256m-untouched",
        title: "1 vCPU, untouched",
        touched: false,
        ..BASE
    },
    Scene {
        id: "1vcpu-2g",
        title: "1 vCPU, 2 GiB",
        memory_mib: 2048,
        ..BASE
    },
    Scene {
        id: "1vcpu-256m-thp",
        title: "1 vCPU, THP",
        pages: Pages::Thp,
        ..BASE
    },
    Scene {
        id: "1vcpu-256m-hugetlb",
        title: "1 vCPU, hugetlb",
        pages: Pages::Hugetlb2m,
        ..BASE
    },
];

/// Machines with more vCPUs than the smallest host has cores, and one with a single one to compare. Their
/// guests halt most of the time, or the gaps would be the scheduler's: eight that never rest on two cores wait
/// 20 to 30 ms for their turn without any swap.
pub(crate) const MANY: [Scene; 4] = [
    resting("1vcpu-resting", "1 vCPU, resting", 1),
    resting("2vcpu-resting", "2 vCPUs, resting", 2),
    resting("4vcpu-resting", "4 vCPUs, resting", 4),
    resting("8vcpu-resting", "8 vCPUs, resting", 8),
];

const fn resting(id: &'static str, title: &'static str, vcpus: u8) -> Scene {
    Scene {
        id,
        title,
        vcpus,
        duty: RESTING,
        ..BASE
    }
}

/// Percent of the time that a vCPU of [`MANY`] runs.
const RESTING: u8 = 3;

/// MiB that the guest works on all the time.
pub(crate) const WORK_MIB: u64 = 4;

impl Scene {
    /// What sets it off from others of its group.
    pub(crate) fn short(&self) -> String {
        match (self.duty, self.pages, self.touched, self.memory_mib) {
            (..100, ..) => format!("{} vCPU", self.vcpus),
            (_, Pages::Thp, ..) => "THP".into(),
            (_, Pages::Hugetlb2m, ..) => "hugetlb, 2 MiB".into(),
            (_, _, false, _) => "untouched".into(),
            (.., mib) if mib >= 1024 => format!("{} GiB", mib / 1024),
            (.., mib) => format!("{mib} MiB"),
        }
    }

    /// The guest's command line beside `ram=`, which is [`WORK_MIB`].
    pub(crate) fn words(&self) -> String {
        words(self.memory_mib, self.touched, self.duty)
    }

    /// How it is booted.
    pub(crate) fn recipe(&self) -> Recipe {
        recipe(self.vcpus, (self.memory_mib, self.pages), &self.words())
    }
}

/// A guest's command line beside `ram=`: whether it writes all of its RAM once, and what percentage of the time a vCPU runs.
pub(crate) fn words(memory_mib: u64, touched: bool, duty: u8) -> String {
    let touch = touched.then(|| format!("touch={memory_mib}M"));
    let duty = (duty != 100).then(|| format!("duty={duty}"));
    let words: Vec<_> = touch.into_iter().chain(duty).collect();
    words.join(" ")
}

/// How a machine is booted: vCPUs, RAM in MiB and what it lies in, the guest's command line beside `ram=`.
pub(crate) fn recipe(vcpus: u8, (memory_mib, pages): (u64, Pages), words: &str) -> Recipe {
    let mut recipe = Recipe::pulse(vcpus, &format!("ram={WORK_MIB}M {words}"));
    recipe.memory_mib = memory_mib;
    recipe.pages = pages;
    recipe
}

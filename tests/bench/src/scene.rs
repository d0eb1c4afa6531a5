//! The machines that are measured.

use serde::Serialize;

/// A machine. Its guest has written every page of its RAM once before the first swap, and works
/// on a few MiB of it.
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
}

/// One vCPU, little RAM.
pub(crate) const BASE: Scene = Scene {
    id: "1vcpu-256m",
    title: "1 vCPU, 256 MiB",
    vcpus: 1,
    memory_mib: 256,
    duty: 100,
};

/// As many vCPUs as the smallest host has cores.
pub(crate) const PAIR: Scene = Scene {
    id: "2vcpu-256m",
    title: "2 vCPUs, 256 MiB",
    vcpus: 2,
    memory_mib: 256,
    duty: 100,
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
    vcpus: 1,
    memory_mib: 8192,
    duty: 100,
};

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
        memory_mib: 256,
        duty: RESTING,
    }
}

/// Percent of the time that a vCPU of [`MANY`] runs.
const RESTING: u8 = 3;

/// MiB that the guest works on all the time.
pub(crate) const WORK_MIB: u64 = 4;

impl Scene {
    /// What sets it off from others of its group.
    pub(crate) fn short(&self) -> String {
        match (self.duty, self.memory_mib) {
            (100, mib) if mib >= 1024 => format!("{} GiB", mib / 1024),
            (100, mib) => format!("{mib} MiB"),
            _ => format!("{} vCPU", self.vcpus),
        }
    }

    /// The guest's command line beside `ram=`, which is [`WORK_MIB`].
    pub(crate) fn words(&self) -> String {
        let touch = format!("touch={}M", self.memory_mib);
        match self.duty {
            100 => touch,
            duty => format!("{touch} duty={duty}"),
        }
    }
}

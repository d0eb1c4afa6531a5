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
}

/// One vCPU, little RAM.
pub(crate) const BASE: Scene = Scene {
    id: "1vcpu-256m",
    title: "1 vCPU, 256 MiB",
    vcpus: 1,
    memory_mib: 256,
};

/// As many vCPUs as the smallest host has cores.
pub(crate) const PAIR: Scene = Scene {
    id: "2vcpu-256m",
    title: "2 vCPUs, 256 MiB",
    vcpus: 2,
    memory_mib: 256,
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
};

/// MiB that the guest works on all the time.
pub(crate) const WORK_MIB: u64 = 4;

impl Scene {
    /// `touch=` of the guest's command line; `ram=` is [`WORK_MIB`].
    pub(crate) fn touch(&self) -> String {
        format!("touch={}M", self.memory_mib)
    }
}

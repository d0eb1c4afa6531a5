//! Signs of life of a machine, for whoever watches a swap. The guest runs on meanwhile: each vCPU is
//! made to come back from it once.

use std::time::Duration;

use stillpoint_control::health::{Signs, VcpuSign};

use super::Machine;
use crate::devices::probe;

/// How long vCPUs may take to come back: one that doesn't is looked at again by the next look.
const PATIENCE: Duration = Duration::from_millis(100);

impl Machine {
    /// How vCPUs and devices are. The guest must be ours.
    pub fn signs(&self) -> Signs {
        let turns = self.vcpus.turns(PATIENCE);
        let table = self.probe.table();
        let vcpus = (0u8..).zip(turns).map(|(vcpu, turns)| VcpuSign {
            turns,
            beat: table.and_then(|table| probe::beat(self.ram.map(), table, vcpu)),
        });
        Signs {
            vcpus: vcpus.collect(),
            devices: self.virtio.iter().map(|device| device.sign()).collect(),
            agent: None,
            recovery: Vec::new(),
        }
    }
}

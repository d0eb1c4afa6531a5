//! How many swaps a host does at once.
//!
//! Within a blackout every vCPU thread of the old process saves, and every one of the new process loads,
//! beside a thread of each that leads. They do it in parallel as long as each vCPU has a core; what else runs
//! on those cores then is time that a guest stands still. So a swap takes as many of the host's cores as its
//! guest has vCPUs, and one more for those who lead; swaps that don't fit beside each other wait for one another.
//! A guest wider than the host has the whole of it.

/// Of so many cores a swap of a guest with so many vCPUs takes this many for itself.
pub fn width(cores: u32, vcpus: u8) -> u32 {
    (u32::from(vcpus) + 1).min(cores.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swaps_go_on_beside_each_other_where_there_are_cores_for_all() {
        let at_once = |cores, vcpus| cores / width(cores, vcpus);
        assert_eq!(at_once(2, 1), 1, "one vCPU and a leader take both cores");
        assert_eq!(at_once(4, 1), 2);
        assert_eq!(at_once(64, 1), 32);
        assert_eq!(at_once(64, 8), 7);
        for (cores, vcpus) in [(1, 1), (2, 8), (0, 1), (8, 254)] {
            assert_eq!(width(cores, vcpus), cores.max(1), "{vcpus} on {cores}");
        }
    }
}

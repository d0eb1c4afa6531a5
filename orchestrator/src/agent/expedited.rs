//! Grace periods of the kernel's RCU, made short while guests wait for them.
//!
//! A virtual machine can't be built without waiting for several of them, and each takes some ticks of every
//! processor that is busy: with many machines at once, and a host that has just booted, they add up to most of what
//! a guest is built in. The kernel does the same for itself until it starts init.

use std::path::{Path, PathBuf};

const SWITCH: &str = "/sys/kernel/rcu_expedited";

/// They are short as long as this lives.
#[derive(Debug)]
pub struct Expedited {
    path: PathBuf,
    before: String,
}

impl Expedited {
    /// From now on. `None` where the kernel has no such switch, or we may not: it takes longer then.
    pub fn begin() -> Option<Self> {
        Self::at(Path::new(SWITCH))
    }

    fn at(path: &Path) -> Option<Self> {
        let before = std::fs::read_to_string(path).ok()?;
        std::fs::write(path, "1").ok()?;
        Some(Self {
            path: path.to_owned(),
            before,
        })
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(&self.path, self.before.trim()) {
            tracing::warn!("{} stays at 1: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_afterwards_what_it_was() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("switch");
        assert!(Expedited::at(&path).is_none(), "there is none");
        for before in ["0\n", "1\n"] {
            std::fs::write(&path, before).expect("written");
            let held = Expedited::at(&path).expect("there");
            assert_eq!(std::fs::read_to_string(&path).expect("there"), "1");
            drop(held);
            let after = std::fs::read_to_string(&path).expect("there");
            assert_eq!(after, before.trim());
        }
    }
}

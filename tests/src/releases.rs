//! The binaries under test. `make releases` builds them; a test that finds one missing says so.

use std::path::PathBuf;

use anyhow::ensure;

/// A build of the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// The tree as it is.
    Current,
    /// The compatibility build: reads and writes state format 1 alone.
    Compat,
    /// The tree with fault points, armed with one.
    Faulty(&'static str),
}

/// Root of the work tree; `STILLPOINT_ROOT` names another place with the same `target` in it.
pub fn root() -> PathBuf {
    std::env::var_os("STILLPOINT_ROOT").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR").trim_end_matches("/tests")),
        PathBuf::from,
    )
}

fn built(name: &str) -> anyhow::Result<PathBuf> {
    let path = root().join("target/releases").join(name);
    ensure!(
        path.is_file(),
        "{} is not built; run `make releases`",
        path.display()
    );
    Ok(path)
}

impl Release {
    /// Its binary.
    pub fn binary(self) -> anyhow::Result<PathBuf> {
        built(match self {
            Self::Current => "current/stillpoint-vmm",
            Self::Compat => "compat/stillpoint-vmm",
            Self::Faulty(_) => "faulty/stillpoint-vmm",
        })
    }

    /// Its version, as it calls itself.
    pub fn version(self) -> &'static str {
        match self {
            Self::Compat => "0.1.0",
            Self::Current | Self::Faulty(_) => env!("CARGO_PKG_VERSION"),
        }
    }

    /// Arguments it wants beside the usual ones.
    pub fn arguments(self) -> Vec<&'static str> {
        match self {
            Self::Faulty(fault) => vec!["--fault", fault],
            Self::Current | Self::Compat => Vec::new(),
        }
    }
}

/// The test guest.
pub fn pulse() -> anyhow::Result<PathBuf> {
    built("pulse")
}

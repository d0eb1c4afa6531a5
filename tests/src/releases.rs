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
    /// What a later release may be: a format more, and remarks in all its sections.
    Later,
    /// The same, made to write what older ones can't read.
    Odd(&'static str),
    /// The release before this one, as it was built from its own sources (`make compat`).
    Previous,
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
            Self::Later | Self::Odd(_) => "later/stillpoint-vmm",
            Self::Previous => "previous/stillpoint-vmm",
        })
    }

    /// Its version, as it calls itself.
    pub fn version(self) -> &'static str {
        match self {
            Self::Compat => "0.1.0",
            Self::Later | Self::Odd(_) => "0.9.0",
            // No two releases of one name meet in a swap.
            Self::Previous => "previous",
            Self::Current | Self::Faulty(_) => env!("CARGO_PKG_VERSION"),
        }
    }

    /// It in a word, as a table shows it.
    pub fn name(self) -> String {
        match self {
            Self::Odd(how) => format!("odd {how}"),
            Self::Faulty(_) => "faulty".into(),
            Self::Previous => "previous".into(),
            Self::Current | Self::Compat | Self::Later => self.version().into(),
        }
    }

    /// Arguments it wants beside the usual ones.
    pub fn arguments(self) -> Vec<&'static str> {
        match self {
            Self::Faulty(fault) => vec!["--fault", fault],
            Self::Odd(how) => vec!["--odd", how],
            Self::Current | Self::Compat | Self::Later | Self::Previous => Vec::new(),
        }
    }
}

/// The test guest.
pub fn pulse() -> anyhow::Result<PathBuf> {
    built("pulse")
}

//! What this build is, and which saved state it reads and writes.

use stillpoint_control::report::ReleaseName;

/// Formats of saved state that this build reads; also those it writes, preferred first.
#[cfg(not(feature = "compat-0-1"))]
pub const FORMATS: &[u32] = &stillpoint_state::sections::FORMATS;
/// Release 0.1 knew format 1 alone.
#[cfg(feature = "compat-0-1")]
pub const FORMATS: &[u32] = &[1];

/// Version of this build.
#[cfg(not(feature = "compat-0-1"))]
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Version of this build.
#[cfg(feature = "compat-0-1")]
pub const VERSION: &str = "0.1.0";

/// The release's name; who started us may know it better than the build does.
pub fn name(version: Option<String>, sha256: Option<String>) -> ReleaseName {
    ReleaseName {
        version: version.unwrap_or_else(|| VERSION.to_owned()),
        sha256: sha256.unwrap_or_default(),
    }
}

/// The first format in `offered` that this build reads.
pub fn choose_format(offered: &[u32]) -> Option<u32> {
    offered
        .iter()
        .copied()
        .find(|format| FORMATS.contains(format))
}

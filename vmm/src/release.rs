//! What this build is, and which saved state it reads and writes.

use stillpoint_control::report::ReleaseName;

/// Formats of saved state that this build reads; also those it writes, preferred first.
#[cfg(not(any(feature = "compat-0-1", feature = "later")))]
pub const FORMATS: &[u32] = &stillpoint_state::sections::FORMATS;
/// Release 0.1 knew format 1 alone.
#[cfg(feature = "compat-0-1")]
pub const FORMATS: &[u32] = &[1];
/// A later release knows one more.
#[cfg(feature = "later")]
pub const FORMATS: &[u32] = &[stillpoint_state::later::FORMAT, 3, 2, 1];

/// Version of this build.
#[cfg(not(any(feature = "compat-0-1", feature = "later")))]
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Version of this build.
#[cfg(feature = "compat-0-1")]
pub const VERSION: &str = "0.1.0";
/// Version of this build.
#[cfg(feature = "later")]
pub const VERSION: &str = "0.9.0";

/// The release's name; who started us may know it better than the build does.
pub fn name(version: Option<String>, sha256: Option<String>) -> ReleaseName {
    ReleaseName {
        version: version.unwrap_or_else(|| VERSION.to_owned()),
        sha256: sha256.unwrap_or_default(),
    }
}

/// Those of `offered` that this build reads, in their order.
pub fn readable(offered: &[u32]) -> impl Iterator<Item = u32> {
    let known = |format: &u32| FORMATS.contains(format);
    offered.iter().copied().filter(known)
}

//! Releases: immutable builds of a component.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::problem::{Code, Problem};

/// The component `vmm`.
pub const VMM: &str = "vmm";

/// What a release says about itself; lies beside its binary as `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Manifest {
    /// Component, `vmm`.
    pub component: String,
    /// Version, also the name of its directory in the store.
    pub version: String,
    /// SHA-256 of the binary, lower-case hexadecimal.
    #[serde(default)]
    pub sha256: String,
    /// Formats of saved state it reads.
    pub reads: Vec<u32>,
    /// Formats it writes, preferred first.
    pub writes: Vec<u32>,
    /// Arguments appended to its command line.
    #[serde(default)]
    pub args: Vec<String>,
}

/// A release in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Release {
    /// What it says about itself.
    #[serde(flatten)]
    pub manifest: Manifest,
    /// When it was added, nanoseconds since the Unix epoch.
    pub added_at_unix_ns: u64,
}

impl Release {
    /// Its name in reports.
    pub fn name(&self) -> stillpoint_control::report::ReleaseName {
        stillpoint_control::report::ReleaseName {
            version: self.manifest.version.clone(),
            sha256: self.manifest.sha256.clone(),
        }
    }

    /// Whether a guest of `running` can be handed to this one; the error says both lists.
    pub fn can_follow(&self, running: &Self) -> Result<(), Problem> {
        let (reads, writes) = (&self.manifest.reads, &running.manifest.writes);
        if writes.iter().any(|format| reads.contains(format)) {
            return Ok(());
        }
        Err(Problem::new(
            Code::NoCommonFormat,
            format!(
                "release {} reads state formats {reads:?}, and release {}, which runs the guest, \
                 writes {writes:?}: none in common; swap by way of a release between the two",
                self.manifest.version, running.manifest.version
            ),
        ))
    }
}

/// Checks a version: it becomes the name of a directory.
pub fn validate_version(version: &str) -> Result<(), Problem> {
    let first_ok = version
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric());
    let rest_ok = version
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"._+-".contains(&b));
    if first_ok && rest_ok && version.len() <= 64 {
        return Ok(());
    }
    Err(Problem::new(
        Code::NotARelease,
        format!(
            "version {version:?} is not 1 to 64 of a-z A-Z 0-9 . _ + - beginning with a letter or digit"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(version: &str, reads: &[u32], writes: &[u32]) -> Release {
        Release {
            manifest: Manifest {
                component: VMM.into(),
                version: version.into(),
                sha256: String::new(),
                reads: reads.to_vec(),
                writes: writes.to_vec(),
                args: vec![],
            },
            added_at_unix_ns: 0,
        }
    }

    #[test]
    fn formats_must_meet_and_the_error_says_both_lists() {
        let old = release("0.1.0", &[1], &[1]);
        let new = release("0.2.0", &[1, 2], &[2, 1]);
        let far = release("0.9.0", &[3, 4], &[4, 3]);
        new.can_follow(&old).expect("upgrade");
        old.can_follow(&new).expect("downgrade");
        let error = far.can_follow(&old).expect_err("nothing in common");
        assert_eq!(error.code, Code::NoCommonFormat);
        assert!(error.message.contains("[3, 4]") && error.message.contains("[1]"));
    }

    #[test]
    fn versions_become_directories() {
        for good in ["0.2.0", "1.4.0-rc.1+build", "2026.11"] {
            validate_version(good).expect(good);
        }
        for bad in ["", "..", ".x", "a/b", "a b", "-x"] {
            validate_version(bad).expect_err(bad);
        }
    }
}

//! Releases: immutable builds of a component.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::problem::{Code, Problem};

/// The component `vmm`.
pub const VMM: &str = "vmm";

/// What a release says about itself; lies beside its binary as `manifest.json`. Whoever publishes a
/// release signs these bytes, and by the digest in them the binary.
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

/// Who signed a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Signer {
    /// Id of the key, as `minisign` prints it.
    pub key_id: String,
    /// The signature's trusted comment.
    pub comment: String,
}

/// A release in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Release {
    /// What it says about itself.
    #[serde(flatten)]
    pub manifest: Manifest,
    /// Who signed that; absent if it was added without a signature, by an operator who said so.
    #[serde(default)]
    pub signed_by: Option<Signer>,
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

/// The least version of a component that may be run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pin {
    /// Component, `vmm`.
    pub component: String,
    /// The least version.
    pub minimum: String,
    /// When it was set, nanoseconds since the Unix epoch.
    pub pinned_at_unix_ns: u64,
}

impl Pin {
    /// Whether a version may be run.
    pub fn allows(&self, version: &str) -> Result<(), Problem> {
        let minimum = &self.minimum;
        let below = match (parse_version(version), parse_version(minimum)) {
            (Some(version), Some(minimum)) if version >= minimum => return Ok(()),
            (Some(_), _) => "is below",
            (None, _) => "can't be compared with",
        };
        Err(Problem::new(
            Code::BelowPin,
            format!(
                "release {version} {below} the pinned minimum {minimum} of the {}; take a later \
                 one, change the pin (`stillpoint release pin`), or say `--allow-downgrade`",
                self.component
            ),
        ))
    }
}

/// A version that can be compared: `2`, `2.1` and `2.1.0-rc.1`.
fn parse_version(version: &str) -> Option<semver::Version> {
    let end = version.find(['-', '+']).unwrap_or(version.len());
    let (numbers, rest) = version.split_at(end);
    let zeros = match numbers.split('.').count() {
        1 => ".0.0",
        2 => ".0",
        _ => "",
    };
    semver::Version::parse(&format!("{numbers}{zeros}{rest}")).ok()
}

/// Checks the version of a pin.
pub fn validate_minimum(minimum: &str) -> Result<(), Problem> {
    if parse_version(minimum).is_some() {
        return Ok(());
    }
    let message = format!(
        "field `minimum`: {minimum:?} is no version that others can be compared with, such as 0.2.0"
    );
    Err(Problem::new(Code::BadRequest, message))
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
            signed_by: None,
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
    fn a_pin_holds_back_what_is_below_it_or_can_not_be_compared() {
        let pin = |minimum: &str| Pin {
            component: VMM.into(),
            minimum: minimum.into(),
            pinned_at_unix_ns: 0,
        };
        for good in ["0.2.0", "0.2.1-rc.1", "0.10", "1", "2026.11"] {
            pin("0.2.0").allows(good).expect(good);
        }
        for bad in ["0.1.9", "0.2.0-rc.1", "0.1", "0", "good", "1.2.3.4"] {
            let problem = pin("0.2.0").allows(bad).expect_err(bad);
            assert_eq!(problem.code, Code::BelowPin);
            let named = problem.message.contains(bad) && problem.message.contains("0.2.0");
            assert!(named, "{problem}");
        }
        for good in ["1", "0.2", "0.2.0"] {
            validate_minimum(good).expect(good);
        }
        for bad in ["", "good", "1.2.3.4", "-1"] {
            assert_eq!(validate_minimum(bad).expect_err(bad).code, Code::BadRequest);
        }
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

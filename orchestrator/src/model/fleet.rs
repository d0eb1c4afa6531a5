//! Where hosts stand, and which VMs belong together.

use serde::{Deserialize, Serialize};
use stillpoint_control::spec::{self, SpecError};
use utoipa::ToSchema;

/// How many update domains an availability set has unless it says otherwise.
pub const DOMAINS: u8 = 5;
/// The most update domains that a set can have.
pub const MOST_DOMAINS: u8 = 20;

/// A host's name: safe as a part of keys and paths.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String)]
pub struct HostName(String);

impl HostName {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for HostName {
    type Error = SpecError;
    fn try_from(name: String) -> Result<Self, SpecError> {
        spec::validate_name(&name)?;
        Ok(Self(name))
    }
}

impl From<HostName> for String {
    fn from(name: HostName) -> Self {
        name.0
    }
}

impl std::fmt::Display for HostName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// An update domain of an availability set: its members may be away at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Domain(u8);

impl Domain {
    /// Domain `number` of a set, counted from 0.
    ///
    /// # Errors
    /// There is no such domain in any set.
    pub fn new(number: u8) -> Result<Self, DomainError> {
        if number < MOST_DOMAINS {
            Ok(Self(number))
        } else {
            Err(DomainError::Number(number))
        }
    }

    /// The domain of the member that joined as number `joined` (from 0) of a set that has `of`:
    /// round robin, so that domains differ by at most one member.
    pub fn of_joined(joined: usize, of: DomainCount) -> Self {
        // What is left by a divisor of at most 20 fits.
        Self(u8::try_from(joined % usize::from(of.0)).unwrap_or(0))
    }

    /// Its number, from 0.
    pub fn number(self) -> u8 {
        self.0
    }
}

impl std::fmt::Display for Domain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How many update domains a set has: 1 to 20.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainCount(u8);

impl DomainCount {
    /// So many.
    ///
    /// # Errors
    /// None, or more than 20.
    pub fn new(count: u8) -> Result<Self, DomainError> {
        if (1..=MOST_DOMAINS).contains(&count) {
            Ok(Self(count))
        } else {
            Err(DomainError::Count(count))
        }
    }

    /// So many.
    pub fn number(self) -> u8 {
        self.0
    }
}

impl Default for DomainCount {
    fn default() -> Self {
        Self(DOMAINS)
    }
}

/// A rollout's id.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String)]
pub struct RolloutId(pub String);

impl std::fmt::Display for RolloutId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// Update domains that can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DomainError {
    /// A set can't have so many.
    #[error("an availability set has 1 to {MOST_DOMAINS} update domains, not {0}")]
    Count(u8),
    /// There is no such domain.
    #[error("update domains are numbered 0 to {last}, not {0}", last = MOST_DOMAINS - 1)]
    Number(u8),
}

/// What can be exchanged, from the least that a guest notices to the most.
///
/// The planner takes the lowest rung that contains a fix.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Rung {
    /// A process that serves one guest's device.
    Backend,
    /// The VMM process of a guest.
    Vmm,
    /// The host's KVM modules.
    Kvm,
    /// The host's kernel.
    Kernel,
}

impl Rung {
    /// From the lowest up.
    pub const ALL: [Self; 4] = [Self::Backend, Self::Vmm, Self::Kvm, Self::Kernel];

    /// Whether a swap of it takes all guests of a host together.
    pub fn takes_whole_host(self) -> bool {
        matches!(self, Self::Kvm | Self::Kernel)
    }

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Backend => "backend",
            Self::Vmm => "vmm",
            Self::Kvm => "kvm",
            Self::Kernel => "kernel",
        }
    }

    /// Whether a swap of it can be undone by another swap.
    pub fn has_way_back(self) -> bool {
        // A kernel that guests were stored by is gone with all that only it knew of the host.
        self != Self::Kernel
    }

    /// Why swaps of it can't be done, as long as they are not built.
    pub fn not_built(self) -> Option<&'static str> {
        match self {
            Self::Vmm | Self::Kvm | Self::Kernel => None,
            Self::Backend => Some("devices run inside the VMM, so there is no process to exchange"),
        }
    }
}

impl std::fmt::Display for Rung {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.word())
    }
}

impl std::str::FromStr for Rung {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|rung| rung.word() == text);
        found.ok_or_else(|| format!("`{text}` is none of backend, vmm, kvm, kernel"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sixth_member_joins_the_first_of_five_domains() {
        let of = DomainCount::default();
        let joined: Vec<u8> = (0..7).map(|n| Domain::of_joined(n, of).number()).collect();
        assert_eq!(joined, [0, 1, 2, 3, 4, 0, 1]);
    }

    #[test]
    fn twenty_domains_are_the_most() {
        DomainCount::new(20).expect("the most");
        DomainCount::new(21).expect_err("too many");
        DomainCount::new(0).expect_err("none");
        Domain::new(19).expect("the last");
        let error = Domain::new(20).expect_err("past the last");
        assert!(error.to_string().contains("0 to 19"), "{error}");
    }

    #[test]
    fn rungs_go_up_and_are_read_as_they_are_shown() {
        assert!(Rung::ALL.is_sorted());
        for rung in Rung::ALL {
            assert_eq!(rung.to_string().parse(), Ok(rung));
        }
        "vm".parse::<Rung>().expect_err("no rung");
    }
}

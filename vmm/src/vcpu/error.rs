//! Why something could not be done to a vCPU.

use rustix::io::Errno;
use stillpoint_state::StateError;

/// Why a vCPU could not be saved, loaded or made ready.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused.
    #[error("KVM refused to {what}: {source}")]
    Kvm {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// Saved state that does not fit.
    #[error(transparent)]
    State(#[from] StateError),
    /// KVM does not take an MSR that the guest uses.
    #[error("KVM here refuses MSR {index:#x} = {value:#x}, which this guest uses")]
    MsrRefused {
        /// Which.
        index: u32,
        /// What the guest had in it.
        value: u64,
    },
    /// More MSRs than one call takes.
    #[error("too many MSRs for one call")]
    MsrList,
    /// The kick signal could not be blocked.
    #[error("cannot block the kick signal")]
    Signal,
    /// A vCPU ran where it must not.
    #[error("the vCPU did not come to rest")]
    Unsettled,
    /// The TSC did not go where policy *hold* wants it.
    #[error(
        "clock policy hold: this KVM did not move the guest's TSC by the pause; use the policy \
         advance on this host"
    )]
    Hold,
    /// The wall clock structure could not be put back.
    #[error("cannot restore the guest's wall clock structure")]
    WallClock,
}

impl VcpuError {
    /// For `map_err` on a KVM call.
    pub(crate) fn kvm<E: Into<KvmErrno>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::Kvm {
            what,
            source: error.into().0,
        }
    }
}

/// Either crate's errno.
#[derive(Debug)]
pub struct KvmErrno(std::io::Error);

impl From<kvm_ioctls::Error> for KvmErrno {
    fn from(error: kvm_ioctls::Error) -> Self {
        Self(error.into())
    }
}

impl From<Errno> for KvmErrno {
    fn from(error: Errno) -> Self {
        Self(error.into())
    }
}

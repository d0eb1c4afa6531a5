//! Why a machine could not be made, for whoever wanted it.

use stillpoint_state::StateError;

use crate::boot::BootError;
use crate::devices::virtio::backend::BackendError;
use crate::irq::IrqError;
use crate::memory::MemoryError;
use crate::vcpu::VcpusError;

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// /dev/kvm.
    #[error(
        "cannot open /dev/kvm: {source}; {} (`stillpoint doctor` shows what this host lacks)",
        kvm_remedy(source)
    )]
    NoKvm {
        /// Why not.
        source: kvm_ioctls::Error,
    },
    /// KVM refused.
    #[error("KVM refused to {what}: {source}")]
    Kvm {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        source: kvm_ioctls::Error,
    },
    /// Another processor than the guest was promised.
    #[error(
        "the guest's TSC counts at {promised} kHz, this host's at {host} kHz, and its KVM can't scale: the guest's \
         clocks would be wrong; run it on a host whose TSC is as fast as the one it was started on"
    )]
    TscFrequency {
        /// What the guest was promised, kHz.
        promised: u32,
        /// What the host has, kHz.
        host: u32,
    },
    /// RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel to boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Interrupts.
    #[error(transparent)]
    Irq(#[from] IrqError),
    /// vCPU threads.
    #[error(transparent)]
    Vcpus(#[from] VcpusError),
    /// Saved state that doesn't fit.
    #[error(transparent)]
    State(#[from] StateError),
    /// What a device is made of.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The clock's policy can't be kept here.
    #[error(
        "clock policy hold: this host's KVM ignores TSC offsets (its guests read the host's TSC), \
         so a guest's clocks can't leave out a pause; use the policy advance, or a host whose \
         KVM is hardware"
    )]
    Hold,
    /// Nor can a clock that was saved without the TSC it goes with.
    #[error(
        "clock policy hold: KVM's masterclock went off before the freeze, so how long the pause was \
         is not known exactly; use the policy advance"
    )]
    HoldWithoutMasterclock,
    /// Something of the host's.
    #[error("cannot make the console: {0}")]
    Console(#[from] std::io::Error),
}

fn kvm_remedy(error: &kvm_ioctls::Error) -> &'static str {
    match error.errno() {
        libc::ENOENT => "load the kvm_intel or kvm_amd module, or enable nested virtualization",
        libc::EACCES | libc::EPERM => "give this user the right to it, as a rule by its group",
        libc::ENODEV | libc::ENXIO => "enable virtualization in the firmware",
        _ => "look at the kernel's log",
    }
}

pub(in crate::machine) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> BuildError {
    move |source| BuildError::Kvm { what, source }
}

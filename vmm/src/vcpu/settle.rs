//! The kick, and settling.
//!
//! The kick is a signal that a vCPU's thread keeps blocked and KVM unblocks inside `KVM_RUN`
//! (KVM_SET_SIGNAL_MASK): it can't be lost between a check and an entry, and it stays pending
//! while the vCPU is parked. That makes a second thing possible: *settling*, a `KVM_RUN` with the
//! kick pending, in which KVM handles its own requests and injects expired timers, and returns
//! without having run one guest instruction.
#![allow(unsafe_code)] // Signals by number.

use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, block_signal, clear_signal};

use super::error::VcpuError;
use crate::raw;

fn signal() -> i32 {
    SIGRTMIN() + 1
}

/// Makes a vCPU thread leave the guest, or not enter it.
pub(super) fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the handle is not joined yet, so the thread id is valid; the signal is blocked in
    // the thread, so it only ends a KVM_RUN.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), signal()) };
}

/// Readies the calling thread to be kicked out of `fd`, and leaves a kick pending.
pub(super) fn arm(fd: &VcpuFd) -> Result<(), VcpuError> {
    block_signal(signal()).map_err(|_| VcpuError::Signal)?;
    raw::set_signal_mask(fd, 0).map_err(VcpuError::kvm("set the signal mask"))?;
    // SAFETY: sends the blocked signal to this very thread.
    unsafe { libc::pthread_kill(libc::pthread_self(), signal()) };
    Ok(())
}

/// Takes back a pending kick of the calling thread, so that it may enter the guest.
pub(super) fn disarm() {
    // Fails only if there is none.
    let _ = clear_signal(signal());
}

/// See the module. The kick must be pending.
pub(super) fn settle(fd: &mut VcpuFd) -> Result<(), VcpuError> {
    for _ in 0..8 {
        match fd.run() {
            Err(e) if e.errno() == libc::EINTR => return Ok(()),
            // A vCPU that waits for its SIPI says so instead.
            Err(e) if e.errno() == libc::EAGAIN => {}
            Err(source) => return Err(VcpuError::kvm("settle")(source)),
            Ok(_) => return Err(VcpuError::Unsettled),
        }
    }
    Ok(())
}

/// Has KVM carry out what it asks of this vCPU. Its creation and every TSC write ask for a
/// masterclock update, which would else wait for the vCPU's first entry, maybe hours later, and step
/// every vCPU's kvmclock then (x86.c, `kvm_track_tsc_matching`; kernels before 6.7 ask for it at
/// each creation). A vCPU that waits for its start or halts takes up nothing, so it is made runnable
/// for as long. It must have run nothing yet; it runs no guest instruction here either.
pub(super) fn take_up_requests(fd: &mut VcpuFd) -> Result<(), VcpuError> {
    let before = fd
        .get_mp_state()
        .map_err(VcpuError::kvm("ask its MP state"))?;
    let mp_state = kvm_bindings::KVM_MP_STATE_RUNNABLE;
    fd.set_mp_state(kvm_bindings::kvm_mp_state { mp_state })
        .map_err(VcpuError::kvm("make it runnable"))?;
    settle(fd)?;
    fd.set_mp_state(before)
        .map_err(VcpuError::kvm("set MP state"))
}

//! Kernel structures as bytes, and the few ioctls that kvm-ioctls lacks on x86. Calls that move
//! guest memory to and from files are in [`file`](mod@file) and [`tap`].
#![allow(unsafe_code)] // Byte views of plain structures, and system calls that take addresses.

pub mod file;
pub mod tap;

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_pre_fault_memory,
    kvm_signal_mask,
};
use kvm_ioctls::VcpuFd;
use rustix::io::Errno;
use stillpoint_state::StateError;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

/// Numbers of the ioctls (include/uapi/linux/kvm.h).
mod nr {
    #![allow(missing_docs, unreachable_pub)] // The macro makes undocumented public functions.
    use super::{KVMIO, kvm_device_attr, kvm_pre_fault_memory, kvm_signal_mask};
    use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};
    ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kvm_signal_mask);
    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
    ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);
    ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);
}

/// A kernel structure that is plain bytes: any bit pattern is a value, and `Default` is zeroes.
///
/// # Safety
/// Only for `repr(C)` structures of integers and unions of integers, as the bindings are.
pub unsafe trait Plain: Default {}

// SAFETY: bindings of kernel structures made of integers alone.
unsafe impl Plain for kvm_bindings::kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_sregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_xcrs {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_debugregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_vcpu_events {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_lapic_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_irqchip {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_pit_state2 {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_cpuid_entry2 {}

/// The bytes of a structure.
pub fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: T is plain, and made from zeroes or by the kernel, so padding is initialised too.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// A structure from its bytes; an error that names `section` if they are not of its size.
pub fn from_bytes<T: Plain>(section: &'static str, bytes: &[u8]) -> Result<T, StateError> {
    if bytes.len() != size_of::<T>() {
        let name = std::any::type_name::<T>();
        return Err(StateError::Value {
            section,
            problem: format!("{name} has {} bytes, not {}", size_of::<T>(), bytes.len()),
        });
    }
    let mut value = T::default();
    // SAFETY: T is plain, so any bytes are a value of it; the sizes are equal.
    unsafe {
        std::ptr::copy_nonoverlapping(
            bytes.as_ptr(),
            std::ptr::from_mut(&mut value).cast(),
            bytes.len(),
        );
    }
    Ok(value)
}

/// Sets the signals that are blocked while the vCPU is in `KVM_RUN`, as a kernel sigset.
pub fn set_signal_mask(vcpu: &VcpuFd, blocked: u64) -> Result<(), Errno> {
    #[repr(C)]
    struct Mask {
        head: kvm_signal_mask,
        set: [u8; 8],
    }
    let mask = Mask {
        head: kvm_signal_mask {
            len: 8,
            ..Default::default()
        },
        set: blocked.to_ne_bytes(),
    };
    // SAFETY: the structure is what KVM_SET_SIGNAL_MASK reads: its head and `len` bytes.
    errno(unsafe { ioctl_with_ref(vcpu, nr::KVM_SET_SIGNAL_MASK(), &mask.head) })
}

/// Fills the second-level page tables of a vCPU's machine for this range of guest-physical addresses, as if the guest
/// had read all of it (api.rst, KVM_PRE_FAULT_MEMORY; Linux 6.11). What this process may write the guest may write
/// afterwards without another fault.
pub fn pre_fault(vcpu: &VcpuFd, range: std::ops::Range<u64>) -> Result<(), Errno> {
    let mut left = kvm_pre_fault_memory {
        gpa: range.start,
        size: range.end.saturating_sub(range.start),
        ..Default::default()
    };
    while left.size > 0 {
        let before = left.size;
        // SAFETY: the structure is what the call reads, and in which it writes what is left.
        match errno(unsafe { ioctl_with_mut_ref(vcpu, nr::KVM_PRE_FAULT_MEMORY(), &mut left) }) {
            Err(Errno::INTR | Errno::AGAIN) => {}
            Ok(()) if left.size < before => {}
            Ok(()) => return Err(Errno::IO),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn tsc_offset_attr(addr: u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr,
    }
}

/// Whether this kernel has the TSC offset attribute (5.16 and later).
pub fn has_tsc_offset(vcpu: &VcpuFd) -> bool {
    // SAFETY: reads the attribute's description only.
    unsafe { ioctl_with_ref(vcpu, nr::KVM_HAS_DEVICE_ATTR(), &tsc_offset_attr(0)) == 0 }
}

/// Guest TSC less host TSC, cycles (Documentation/virt/kvm/devices/vcpu.rst section 4.1).
pub fn tsc_offset(vcpu: &VcpuFd) -> Result<i64, Errno> {
    let mut offset = 0i64;
    let attr = tsc_offset_attr(std::ptr::from_mut(&mut offset).expose_provenance() as u64);
    // SAFETY: the kernel writes 8 bytes at `addr`, which is `offset`, alive and exclusive.
    errno(unsafe { ioctl_with_ref(vcpu, nr::KVM_GET_DEVICE_ATTR(), &attr) })?;
    // SAFETY: a plain volatile read of our own local, which the kernel wrote behind the
    // compiler's back.
    Ok(unsafe { std::ptr::read_volatile(&raw const offset) })
}

/// Sets it. Read it back: a KVM without hardware offsets says yes and ignores it.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: i64) -> Result<(), Errno> {
    let attr = tsc_offset_attr(std::ptr::from_ref(&offset).expose_provenance() as u64);
    // SAFETY: the kernel reads 8 bytes at `addr`, which is `offset`, alive.
    errno(unsafe { ioctl_with_ref(vcpu, nr::KVM_SET_DEVICE_ATTR(), &attr) })
}

/// Whether this KVM really moves the guest's TSC: tried on a vCPU that has not run, and undone.
pub fn moves_tsc(vcpu: &VcpuFd) -> bool {
    let moved = |offset: i64| {
        let other = offset.wrapping_sub(1 << 20);
        set_tsc_offset(vcpu, other)?;
        let now = tsc_offset(vcpu)?;
        set_tsc_offset(vcpu, offset)?;
        Ok::<_, Errno>(now == other)
    };
    has_tsc_offset(vcpu) && tsc_offset(vcpu).and_then(moved).unwrap_or(false)
}

fn errno(ret: i32) -> Result<(), Errno> {
    if ret < 0 { Err(last_errno()) } else { Ok(()) }
}

/// An eventfd as the type that the KVM bindings want.
pub fn event_fd(fd: OwnedFd) -> EventFd {
    // SAFETY: the number comes from an owner that gave it up in the same expression.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_there_and_back() {
        let regs = kvm_bindings::kvm_regs {
            rax: 1,
            rip: u64::MAX,
            ..Default::default()
        };
        let bytes = bytes_of(&regs).to_vec();
        let again: kvm_bindings::kvm_regs = from_bytes("vcpu", &bytes).expect("same size");
        assert_eq!(again, regs);
        let error = from_bytes::<kvm_bindings::kvm_regs>("vcpu", &bytes[1..]).expect_err("short");
        assert!(error.to_string().contains("kvm_regs"), "{error}");
    }
}

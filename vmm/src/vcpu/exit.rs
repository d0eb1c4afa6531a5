//! One exit of a vCPU: one or more bus accesses, or the end.

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::{Bus, Space};

/// What came of one `KVM_RUN`.
pub(super) enum Exit {
    /// Done; enter again.
    Handled,
    /// A kick ended it; nothing is left half-done.
    Kicked,
    /// This vCPU can't go on. `None`: it shut down by itself (triple fault).
    Over(Option<String>),
}

pub(super) fn run_once(fd: &mut VcpuFd, bus: &Bus) -> Exit {
    // `rep outs` and `rep ins` bring several items in one exit, `size` bytes each.
    let exit = match fd.run() {
        Ok(exit) => exit,
        Err(error) => {
            return match error.errno() {
                libc::EINTR => Exit::Kicked,
                libc::EAGAIN => Exit::Handled,
                _ => Exit::Over(Some(format!("KVM_RUN failed: {error}"))),
            };
        }
    };
    match exit {
        VcpuExit::IoOut(..) | VcpuExit::IoIn(..) => port_access(fd, bus),
        VcpuExit::MmioRead(address, data) => bus.read(Space::Mmio, address, data),
        VcpuExit::MmioWrite(address, data) => bus.write(Space::Mmio, address, data),
        VcpuExit::Intr => return Exit::Kicked,
        VcpuExit::Shutdown => return Exit::Over(None),
        VcpuExit::FailEntry(reason, cpu) => {
            let text = format!("the processor refused to enter the guest: {reason:#x} on {cpu}");
            return Exit::Over(Some(text));
        }
        VcpuExit::InternalError => {
            return Exit::Over(Some(format!("KVM gave up: {}", internal_error(fd))));
        }
        other => return Exit::Over(Some(format!("an exit nobody handles: {other:?}"))),
    }
    Exit::Handled
}

#[allow(unsafe_code)]
fn port_access(fd: &mut VcpuFd, bus: &Bus) {
    let run = fd.get_kvm_run();
    // SAFETY: called for KVM_EXIT_IO only, for which the kernel filled this member.
    let io = unsafe { run.__bindgen_anon_1.io };
    let size = usize::from(io.size.max(1));
    let len = size * io.count as usize;
    let base = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: the kernel placed `count` items of `size` bytes at `data_offset` into the mapping
    // that begins with this structure (api.rst, KVM_EXIT_IO).
    let items = unsafe { std::slice::from_raw_parts_mut(base.add(io.data_offset as usize), len) };
    for item in items.chunks_exact_mut(size) {
        if u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_OUT {
            bus.write(Space::Pio, io.port.into(), item);
        } else {
            bus.read(Space::Pio, io.port.into(), item);
        }
    }
}

#[allow(unsafe_code)]
fn internal_error(fd: &mut VcpuFd) -> String {
    let regs = fd
        .get_regs()
        .map(|r| format!(" at rip {:#x}", r.rip))
        .unwrap_or_default();
    // SAFETY: called for KVM_EXIT_INTERNAL_ERROR only, for which the kernel filled this member.
    let internal = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    let words = internal
        .data
        .get(..internal.ndata as usize)
        .unwrap_or_default();
    format!("suberror {}{regs}, {words:x?}", internal.suberror)
}

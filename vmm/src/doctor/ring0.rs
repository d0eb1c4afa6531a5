//! How fast guest code runs in ring 0.
//!
//! Hardware runs it as fast as any code. A KVM in software may emulate it one instruction at a
//! time: then a bare-metal guest that works in ring 3 is well off, and an operating system takes
//! minutes to boot.

use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use stillpoint_control::spec::MemorySpec;
use vm_memory::{Bytes, GuestAddress};

use crate::boot::flat_protected_mode;
use crate::memory::GuestRam;

/// Slower than this is emulation: a kernel of some 2 billion instructions boots in 40 s at best.
pub(super) const HARDWARE: f64 = 50e6;

/// Turns of the loop, two instructions each.
const TURNS: u32 = 50_000;
const START: u64 = 0x1000;
/// Written when the loop is over; nobody is there.
const PORT: u8 = 0x80;

/// Instructions per second. `vcpu` is fresh, and the first of `vm`, which has no memory yet.
pub(super) fn instructions_per_second(vm: &VmFd, vcpu: &mut VcpuFd) -> Result<f64, String> {
    let spec = MemorySpec {
        size: 16 << 20,
        ..MemorySpec::default()
    };
    let ram = GuestRam::create(&spec).map_err(|e| e.to_string())?;
    let turns = TURNS.to_le_bytes();
    // mov ecx, TURNS; 1: dec ecx; jnz 1b; out PORT, al; hlt
    let mut code = vec![0xb9];
    code.extend(turns);
    code.extend([0x49, 0x75, 0xfd, 0xe6, PORT, 0xf4]);
    let written = ram.map().write_slice(&code, GuestAddress(START));
    written.map_err(|e| e.to_string())?;
    ram.register(vm).map_err(|e| e.to_string())?;
    let entered = enter(vcpu).map_err(|e| e.to_string());
    let took = entered.and_then(|()| run(vcpu));
    // The machine must not outlive its RAM's mapping; nobody runs it any more, but no slot is
    // left to point at nothing either.
    ram.unregister(vm).map_err(|e| e.to_string())?;
    Ok(f64::from(TURNS) * 2.0 / took?.as_secs_f64().max(1e-9))
}

fn enter(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    flat_protected_mode(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_bindings::kvm_regs {
        rip: START,
        rflags: 2,
        ..Default::default()
    })
}

fn run(vcpu: &mut VcpuFd) -> Result<Duration, String> {
    let began = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, _)) if port == u16::from(PORT) => return Ok(began.elapsed()),
            Ok(VcpuExit::Intr) => {}
            Ok(other) => return Err(format!("the guest ended with {other:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}

//! A page for each vCPU that its interrupt entries write: counters below, ring-0 stack above.

use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use stillpoint_guest_abi::pulse::MAX_VCPUS;
use stillpoint_guest_abi::virtio::SLOTS;

/// Counters that `traps.s` raises, and the pvclock structure that KVM writes.
#[repr(C, align(4096))]
pub(crate) struct Local {
    /// Interrupts of any kind; what a halt waits on.
    pub(crate) events: AtomicU64,
    /// Timer interrupts.
    pub(crate) timer_count: AtomicU64,
    /// TSC at the latest timer interrupt.
    pub(crate) timer_tsc: AtomicU64,
    /// Wake-up IPIs.
    pub(crate) wakes: AtomicU64,
    /// Interrupts that nobody asked for.
    pub(crate) strays: AtomicU64,
    pad: [u64; 3],
    /// For KVM, which wants it not to cross a page.
    pub(crate) pvclock: UnsafeCell<[u32; 8]>,
    /// Interrupts of each virtio device.
    pub(crate) lines: [AtomicU64; SLOTS],
    stack: UnsafeCell<[u8; 4096 - 96 - 8 * SLOTS]>,
}

const _: () = assert!(size_of::<Local>() == 4096);
const _: () = assert!(offset_of!(Local, events) == 0 && offset_of!(Local, timer_count) == 8);
const _: () = assert!(offset_of!(Local, timer_tsc) == 16 && offset_of!(Local, wakes) == 24);
const _: () = assert!(offset_of!(Local, strays) == 32 && offset_of!(Local, lines) == 96);
// As many entries as `traps.s` has.
const _: () = assert!(SLOTS == 18);

// SAFETY: the cells are KVM's and ring 0's; Rust reads them with volatile reads only.
unsafe impl Sync for Local {}

#[unsafe(no_mangle)]
static LOCALS: [Local; MAX_VCPUS] = [const { Local::new() }; MAX_VCPUS];

/// Memory that only ring 0 and the processor use.
#[repr(C, align(4096))]
struct Raw<const N: usize>(UnsafeCell<[u8; N]>);

// SAFETY: no Rust code touches it but to look at the end of a stack.
unsafe impl<const N: usize> Sync for Raw<N> {}

/// 2 KiB each: 104 bytes of TSS, then an I/O bitmap of zeros that lets ring 3 use every port.
#[unsafe(no_mangle)]
static TSS: Raw<{ 2048 * MAX_VCPUS }> = Raw(UnsafeCell::new([0; 2048 * MAX_VCPUS]));

const USER_STACK: usize = 128 << 10;
/// The last of it, which is to stay as it was: nothing but zeros.
const UNUSED: usize = 1024;

/// 128 KiB each, as `boot.s` has it. A device's driver has some 10 KiB and is moved a few times.
#[unsafe(no_mangle)]
static USER_STACKS: Raw<{ USER_STACK * MAX_VCPUS }> =
    Raw(UnsafeCell::new([0; USER_STACK * MAX_VCPUS]));

/// Whether a vCPU's stack has room left. Below it lies another vCPU's, and no page to fault on.
pub(crate) fn has_stack_left(vcpu: usize) -> bool {
    let end = USER_STACKS.0.get().cast::<u64>();
    (0..UNUSED / 8).all(|word| {
        // SAFETY: within the static; volatile, since it is a stack.
        unsafe { end.add(vcpu * USER_STACK / 8 + word).read_volatile() == 0 }
    })
}

/// The page of one vCPU.
pub(crate) fn of(vcpu: usize) -> &'static Local {
    &LOCALS[vcpu]
}

impl Local {
    const fn new() -> Self {
        Self {
            events: AtomicU64::new(0),
            timer_count: AtomicU64::new(0),
            timer_tsc: AtomicU64::new(0),
            wakes: AtomicU64::new(0),
            strays: AtomicU64::new(0),
            pad: [0; 3],
            pvclock: UnsafeCell::new([0; 8]),
            lines: [const { AtomicU64::new(0) }; SLOTS],
            stack: UnsafeCell::new([0; 4096 - 96 - 8 * SLOTS]),
        }
    }

    /// Interrupts so far: read it, look at the world, then [`Local::halt`] with it.
    pub(crate) fn events(&self) -> u64 {
        self.events.load(Relaxed)
    }

    /// Halts until an interrupt comes that is not among the `seen` ones.
    pub(crate) fn halt(&self, seen: u64) {
        crate::gate::halt_if(self.events.as_ptr(), seen);
    }
}

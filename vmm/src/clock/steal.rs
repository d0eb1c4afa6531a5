//! Steal time across a swap: the guest's account of what its vCPUs waited for.
//!
//! The account is a counter in guest memory. KVM adds to it what *the thread* that runs the vCPU
//! waited for a core, since it last looked (x86.c, `record_steal_time`); of a thread it sees for
//! the first time that is all the thread has ever waited. So what a successor's thread waited while
//! it was being made ready would appear in the guest's account: it is taken off beforehand.
//!
//! A pause of the whole guest is in no thread's account. Whether it is to count is the owner's
//! choice: a guest that is told so doesn't charge the pause to the task that was running.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use crate::memory::Memory;

/// `struct kvm_steal_time` (arch/x86/include/uapi/asm/kvm_para.h): the counter, ns, is first.
const VERSION: u64 = 8;
/// Low bits of the MSR: enabled, and reserved ones.
const ADDRESS: u64 = !0x3f;

/// What the calling thread has waited for a core.
#[derive(Debug, Default)]
pub struct RunDelay(Option<File>);

impl RunDelay {
    /// Of the calling thread; for it alone to ask. Opened ahead of the blackout.
    pub fn of_this_thread() -> Self {
        Self(File::open("/proc/thread-self/schedstat").ok())
    }

    /// Until now; zero where the kernel keeps no account.
    pub fn read(&self) -> Duration {
        let mut text = [0; 64];
        let read = self.0.as_ref().map(|file| file.read_at(&mut text, 0));
        let Some(Ok(len)) = read else {
            return Duration::ZERO;
        };
        Duration::from_nanos(second_field(&text[..len]).unwrap_or(0))
    }
}

/// `/proc/PID/schedstat`: time on a core, time waited for one, slices run.
fn second_field(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    text.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Adds `pause` to the account that `msr` (`MSR_KVM_STEAL_TIME`) points to, and takes `waited` off
/// it, which KVM is about to add. The guest is ours. An account outside RAM is the guest's mistake.
pub fn carry(memory: &Memory, msr: u64, pause: Duration, waited: Duration) {
    let at = GuestAddress(msr & ADDRESS);
    let version = GuestAddress(at.0.saturating_add(VERSION));
    let (Ok(steal), Ok(seen)) = (memory.read_obj::<u64>(at), memory.read_obj::<u32>(version))
    else {
        return;
    };
    let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let steal = steal.wrapping_add(ns(pause)).wrapping_sub(ns(waited));
    // Another vCPU of the guest may run already, and read: odd means that it changes.
    let _ = memory.write_obj(seen.wrapping_add(1) | 1, version);
    let _ = memory.write_obj(steal, at);
    let _ = memory.write_obj((seen.wrapping_add(1) | 1).wrapping_add(1), version);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_is_added_and_the_threads_past_is_not() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 4096)]).expect("memory");
        memory
            .write_obj(1_000u64, GuestAddress(0x40))
            .expect("write");
        memory.write_obj(6u32, GuestAddress(0x48)).expect("write");
        let ns = Duration::from_nanos;
        carry(&memory, 0x41, ns(500), ns(30));
        let steal: u64 = memory.read_obj(GuestAddress(0x40)).expect("read");
        let version: u32 = memory.read_obj(GuestAddress(0x48)).expect("read");
        assert_eq!((steal, version), (1_470, 8));
        carry(&memory, 0xffff_ffc1, ns(1), ns(1));
        carry(&memory, (4096 - 0x40) | 1, ns(1), ns(1));
    }

    #[test]
    fn a_thread_knows_what_it_waited() {
        assert_eq!(second_field(b"120 34 5\n"), Some(34));
        assert_eq!(second_field(b""), None);
        let delay = RunDelay::of_this_thread();
        let before = delay.read();
        std::thread::yield_now();
        assert!(delay.read() >= before);
    }
}

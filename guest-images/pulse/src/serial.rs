//! COM1, polled. A line is written whole: vCPUs take turns.

use core::arch::asm;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Release};

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = DATA + 5;
const DATA_READY: u8 = 1;

static BUSY: AtomicBool = AtomicBool::new(false);

/// The right to write.
pub(crate) struct Serial(());

impl Serial {
    /// Waits for it.
    pub(crate) fn lock() -> Self {
        loop {
            if let Some(serial) = Self::try_lock() {
                return serial;
            }
            core::hint::spin_loop();
        }
    }

    /// Takes it if it is free.
    pub(crate) fn try_lock() -> Option<Self> {
        BUSY.compare_exchange(false, true, Acquire, Acquire)
            .ok()
            .map(|_| Self(()))
    }

    /// Writes with one `rep outsb`. No look at the line status: an emulated UART takes it all.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        // SAFETY: reads `bytes` only; ring 3 may use the port by IOPL and by the TSS.
        unsafe {
            asm!("rep outsb", in("dx") DATA, inout("rsi") bytes.as_ptr() => _,
                inout("rcx") bytes.len() => _, options(nostack, preserves_flags, readonly));
        }
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        BUSY.store(false, Release);
    }
}

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.write(text.as_bytes());
        Ok(())
    }
}

/// The next byte that came in, if any. Costs an exit or two.
pub(crate) fn read() -> Option<u8> {
    (inb(LINE_STATUS) & DATA_READY != 0).then(|| inb(DATA))
}

fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: as for `outsb`; reading the UART has no effect on memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

/// Writes 32 bits to a port.
pub(crate) fn outl(port: u16, value: u32) {
    // SAFETY: as for `outsb`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) };
}

/// Prints a line; for what happens seldom.
macro_rules! say {
    ($($argument:tt)*) => {{
        use ::core::fmt::Write as _;
        // Writing to the port does not fail.
        let _ = ::core::writeln!($crate::serial::Serial::lock(), $($argument)*);
    }};
}
pub(crate) use say;

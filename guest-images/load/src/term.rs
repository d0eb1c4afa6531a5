//! SIGTERM: who sends it wants the load to come to its end now, in order, with its report.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use signal_hook::consts::SIGTERM;

static ASKED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// From now on SIGTERM ends the load's time, and no longer the program.
pub(crate) fn heed() -> io::Result<()> {
    signal_hook::flag::register(SIGTERM, Arc::clone(&ASKED)).map(drop)
}

/// Whether the load is to end, though its time may not be over.
pub(crate) fn is_asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Whether the load is to go on.
pub(crate) fn goes_on(end: Instant) -> bool {
    Instant::now() < end && !is_asked()
}

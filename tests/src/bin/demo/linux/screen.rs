//! What the guest's console says, as it comes.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Between two looks at the log.
const GLANCE: Duration = Duration::from_millis(50);

/// Follows the console's log until it is dropped.
pub(crate) struct Screen {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Screen {
    /// Shows each line of `log`, which need not be there yet.
    pub(crate) fn follow(log: PathBuf) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let mut shown = 0;
            while !seen.load(Ordering::Relaxed) {
                shown = show_from(&log, shown);
                std::thread::sleep(GLANCE);
            }
            show_from(&log, shown);
        });
        Self {
            over,
            thread: Some(thread),
        }
    }
}

/// Shows the whole lines after the first `shown` bytes; gives how many bytes are shown then.
fn show_from(log: &Path, shown: u64) -> u64 {
    let read = || {
        let mut file = std::fs::File::open(log)?;
        file.seek(SeekFrom::Start(shown))?;
        let mut new = Vec::new();
        file.read_to_end(&mut new)?;
        Ok::<_, std::io::Error>(new)
    };
    let new = read().unwrap_or_default();
    let Some(end) = new.iter().rposition(|&byte| byte == b'\n') else {
        return shown;
    };
    for line in String::from_utf8_lossy(&new[..end]).lines() {
        println!("  │ {}", line.trim_end_matches('\r'));
    }
    shown + end as u64 + 1
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

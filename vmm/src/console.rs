//! The console behind the serial port: a log file, and any number of viewers on a socket.
//!
//! ```text
//! vCPU thread ── Output::push ──▶ Buffer ──▶ console thread ──▶ console.log, viewers
//!                                (memory)       ▲
//!                                               └── viewers' input ──▶ SerialPort::receive
//! ```
//!
//! The buffer is the only thing shared. [`Buffer::freeze`] takes its lock once: if the console
//! thread is between two writes, nothing is in flight and no thread has to be woken; if it is in
//! the middle of one, the freeze waits for it up to a deadline, and the swap is called off when a
//! slow disk would make the pause longer. Output that is not written yet travels in the saved
//! state; viewers' sockets and the log travel beside it.
//!
//! Each viewer is sent output as fast as it reads. What it has not had yet is still among the
//! bytes kept for viewers who come later; one that falls behind by more than those loses some.

pub mod buffer;
mod pump;
mod viewer;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use crate::devices::serial::SerialPort;
use buffer::Buffer;
use pump::Pump;
pub use viewer::{MAX_VIEWERS, Viewer};
use viewer::{Viewers, list};

/// What the console writes to and hears from; all of it can travel to a successor.
#[derive(Debug)]
pub struct Doors {
    /// Socket that viewers connect to.
    pub listener: OwnedFd,
    /// The log, opened for appending.
    pub log: File,
}

impl Doors {
    /// Duplicates of both.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            listener: self.listener.try_clone()?,
            log: self.log.try_clone()?,
        })
    }
}

/// The console: buffer, thread, viewers.
#[derive(Debug)]
pub struct Console {
    buffer: Buffer,
    viewers: Viewers,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Console {
    /// Starts the console's thread. `viewers` are those that came with a handover.
    pub fn start(
        buffer: Buffer,
        doors: Doors,
        viewers: Vec<OwnedFd>,
        serial: Arc<SerialPort>,
    ) -> std::io::Result<Self> {
        let behind = std::mem::take(&mut buffer.0.lock().behind);
        let behind = behind.into_iter().chain(std::iter::repeat(0));
        let viewers = viewers.into_iter().zip(behind);
        let viewers = viewers.map(|(socket, behind)| Viewer::new(socket, behind));
        let viewers = Arc::new(Mutex::new(viewers.collect()));
        let pump = Pump {
            shared: Arc::clone(&buffer.0),
            doors,
            viewers: Arc::clone(&viewers),
            serial,
        };
        let thread = std::thread::Builder::new()
            .name("console".into())
            .spawn(|| pump.run())?;
        Ok(Self {
            buffer,
            viewers,
            thread: Some(thread),
        })
    }

    /// The buffer, to freeze and save.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// The viewers.
    pub fn viewers(&self) -> Vec<Arc<Viewer>> {
        list(&self.viewers).clone()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Frozen for good means that a successor has the output now: nothing to write here.
        let frozen = self.buffer.0.lock().frozen;
        self.buffer.close();
        if let Some(thread) = self.thread.take().filter(|_| !frozen) {
            let _ = thread.join();
        }
    }
}

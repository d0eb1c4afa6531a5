//! What the machine thread waits for. Everything that happens to a guest, and everything that is
//! asked of it, comes to that one thread through one queue.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender};

use stillpoint_control::message::{Reply, Request};

/// What can happen to a machine while its thread waits.
#[derive(Debug)]
pub enum Event {
    /// The guest switched itself off.
    PowerOff,
    /// The guest wants to begin anew.
    Reset,
    /// A vCPU can't go on. `None`: it shut down by itself (triple fault), which resets a PC.
    VcpuOver {
        /// Which.
        vcpu: u8,
        /// What KVM said.
        failure: Option<String>,
    },
    /// A request that changes the guest.
    Control(Job),
}

/// A request for the machine thread.
#[derive(Debug)]
pub struct Job {
    /// What is asked.
    pub request: Request,
    /// File descriptors that came with it.
    pub fds: Vec<OwnedFd>,
    /// Where replies go; closed after the last one.
    pub reply: Sender<Reply>,
    /// Closed by the caller's thread when the last reply has been sent on.
    pub told: Option<Receiver<()>>,
}

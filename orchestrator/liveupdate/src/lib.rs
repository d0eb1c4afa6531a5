//! Linux's live update orchestrator: files that outlive the kernel across a kexec (`/dev/liveupdate`,
//! Documentation/userspace-api/liveupdate.rst, Linux 6.19 and later with `CONFIG_LIVEUPDATE`).
//!
//! ```text
//!  this kernel                                       the next kernel
//!  LiveUpdate::open ─▶ create ─▶ Outgoing            LiveUpdate::open ─▶ retrieve ─▶ Incoming
//!                                 │ preserve(fd, token)                               │ retrieve(token) ─▶ fd
//!                                 ▼                                                   ▼
//!                      kexec, while it is held                                      finish
//! ```
//!
//! A session is found again by its name, a file in it by its token. The two directions are two types:
//! the kernel refuses to add to a session that came from another kernel, and to take from one that did not.
//!
//! **What is lost when.** An [`Outgoing`] that is dropped preserves nothing: its process must live until the
//! kernel is left. An [`Incoming`] that is dropped is over, and what was not retrieved from it is freed: retrieve
//! all that matters, and hold on to it, before [`Incoming::finish`] or the drop.
//!
//! Must never: hand out a descriptor that a child would inherit. The kernel does not keep `FD_CLOEXEC`.

mod abi;
mod session;

pub use session::{DEVICE, Error, Incoming, LiveUpdate, NAME_MAX, Outgoing};

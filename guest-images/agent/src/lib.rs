//! The guest agent's protocol, and a client for it.
//!
//! The agent runs inside a guest: as PID 1 of our test images, or as an ordinary daemon in a
//! distribution. Hosts ask it, over vsock, how the guest is, to run programs in it, what its
//! kernel logged, how its clocks stand, and for how long its CPUs did not run.
//!
//! * [`protocol`]: the shapes of what is asked and answered.
//! * [`wire`]: one JSON object a line, within bounds.
//! * [`client`]: a blocking client over anything that reads and writes.
//!
//! Nothing in here knows of vsock, or of the agent's insides: they are the program's
//! (`main.rs`). The protocol only grows: a new field is optional, and its default means "as
//! before"; a request that an agent doesn't know is answered with [`protocol::Code::Unknown`].

pub mod client;
pub mod protocol;
pub mod wire;

//! Who lives on a host of the matrix: what is judged after each cell.

use crate::daemon::Daemon;

/// A guest at work. Its name is [`super::host::GUEST`].
pub trait Resident: std::fmt::Debug {
    /// Somebody runs it, whoever it is; the daemon may be dead.
    fn goes_on(&self, daemon: &Daemon) -> anyhow::Result<()>;

    /// It goes on, all that it does is done right, and nothing about it is wrong.
    fn is_whole(&mut self, daemon: &Daemon) -> anyhow::Result<()>;

    /// Nobody runs it any more; its disk is as after a power cut: what was said to be durable is there.
    fn is_gone(self: Box<Self>) -> anyhow::Result<()>;
}

/// Boots one under this daemon, run by this release, and sees that it is whole.
pub type Boot = fn(&Daemon, &str) -> anyhow::Result<Box<dyn Resident>>;

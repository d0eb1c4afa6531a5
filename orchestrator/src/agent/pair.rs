//! Predecessor and successor of a swap: the socketpair between them, the saved state they pass,
//! and the predecessor's answer.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use stillpoint_control::client::{Client, ClientError};
use stillpoint_control::message::{Handover, Request};
use stillpoint_control::report::Phase;
use tokio::sync::mpsc;

/// What may come on top of brownout and budget before a predecessor counts as mute.
const MARGIN: Duration = Duration::from_secs(5);

/// The two ends of the only way on which a guest is offered and adopted.
#[derive(Debug)]
pub struct Channel {
    /// For the predecessor, sent with the request.
    pub predecessor: OwnedFd,
    /// For the successor, given at its start.
    pub successor: OwnedFd,
}

/// Makes the socketpair.
pub fn channel() -> std::io::Result<Channel> {
    let (predecessor, successor) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    Ok(Channel {
        predecessor,
        successor,
    })
}

/// Makes the file for the saved state. The daemon keeps it until the successor is healthy.
pub fn state_file() -> std::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    Ok(rustix::fs::memfd_create("stillpoint-state", flags)?)
}

/// A handover to be asked for.
#[derive(Debug)]
pub struct Asked {
    /// The predecessor's control socket.
    pub control: PathBuf,
    /// The request.
    pub request: Request,
    /// How long it may take in all.
    pub longest: Duration,
    /// The predecessor's end.
    pub channel: OwnedFd,
    /// The file for the saved state.
    pub state: OwnedFd,
    /// Hears of phases as they end.
    pub progress: mpsc::UnboundedSender<Phase>,
}

/// Asks the predecessor and waits for its answer. An error means that nothing is known: the
/// caller settles it by the ownership word and the pidfds.
pub async fn hand_over(asked: Asked) -> Result<Handover, ClientError> {
    let exchange = move || {
        let client = Client::connect(&asked.control, asked.longest + MARGIN)?;
        client.hand_over(
            &asked.request,
            asked.channel,
            asked.state.as_fd(),
            |phase| {
                // Nobody listens any more when the daemon ends; the handover goes on.
                let _ = asked.progress.send(phase.clone());
            },
        )
    };
    match tokio::task::spawn_blocking(exchange).await {
        Ok(answer) => answer,
        Err(error) => Err(ClientError::Unexpected(error.to_string())),
    }
}

//! One packet with its file descriptors, over a `SOCK_SEQPACKET` Unix socket.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The longest packet, bytes. Well below the default `wmem_max` (212,992), which bounds a packet.
pub const MAX_PACKET: usize = 128 << 10;
/// The most fds beside one packet: the kernel's limit (`SCM_MAX_FD`, include/net/scm.h).
pub const MAX_FDS: usize = 253;

/// Why a packet could not be sent or read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The other side closed.
    #[error("the other side closed the connection")]
    Closed,
    /// Nothing came in time (a receive timeout was set on the socket), or would block.
    #[error("no answer in time")]
    TimedOut,
    /// More bytes or fds than a packet may have.
    #[error("a packet of {bytes} bytes and {fds} fds is beyond {MAX_PACKET} and {MAX_FDS}")]
    TooLarge {
        /// Bytes.
        bytes: usize,
        /// File descriptors.
        fds: usize,
    },
    /// The kernel cut off what came.
    #[error("a packet came in cut off: its sender breaks the protocol, or we are out of fds")]
    CutOff,
    /// Not the JSON that was expected.
    #[error("a packet that is no message of ours: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Socket(rustix::io::Errno),
}

impl From<rustix::io::Errno> for FrameError {
    fn from(errno: rustix::io::Errno) -> Self {
        use rustix::io::Errno;
        match errno {
            Errno::AGAIN | Errno::TIMEDOUT => Self::TimedOut,
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => Self::Closed,
            other => Self::Socket(other),
        }
    }
}

/// Sends `bytes` and `fds` as one packet.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrameError> {
    if bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
        return Err(FrameError::TooLarge {
            bytes: bytes.len(),
            fds: fds.len(),
        });
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        // There is room: the buffer was sized for MAX_FDS.
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    loop {
        match sendmsg(
            &socket,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        ) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives one packet into `buffer`; gives its length and the fds beside it (close-on-exec).
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), FrameError> {
    receive_with(socket, buffer, RecvFlags::empty())
}

/// As [`receive`], but gives [`FrameError::TimedOut`] at once when nothing is there.
pub fn try_receive(
    socket: impl AsFd,
    buffer: &mut [u8],
) -> Result<(usize, Vec<OwnedFd>), FrameError> {
    receive_with(socket, buffer, RecvFlags::DONTWAIT)
}

fn receive_with(
    socket: impl AsFd,
    buffer: &mut [u8],
    flags: RecvFlags,
) -> Result<(usize, Vec<OwnedFd>), FrameError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let message = loop {
        let mut slices = [IoSliceMut::new(buffer)];
        match recvmsg(&socket, &mut slices, &mut ancillary, flags) {
            Ok(message) => break message,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    let mut fds = Vec::new();
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if message
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(FrameError::CutOff);
    }
    if message.bytes == 0 {
        return Err(FrameError::Closed);
    }
    Ok((message.bytes, fds))
}

/// Sends a message as JSON.
pub fn send_json<T: serde::Serialize>(
    socket: impl AsFd,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> Result<(), FrameError> {
    send(socket, &serde_json::to_vec(message)?, fds)
}

/// Receives a message as JSON.
pub fn receive_json<T: serde::de::DeserializeOwned>(
    socket: impl AsFd,
) -> Result<(T, Vec<OwnedFd>), FrameError> {
    let mut buffer = vec![0; MAX_PACKET];
    let (len, fds) = receive(socket, &mut buffer)?;
    Ok((serde_json::from_slice(&buffer[..len])?, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("socketpair")
    }

    #[test]
    fn fds_travel_with_their_packet() {
        let (a, b) = pair();
        let (file, _other) = pair();
        send(&a, b"one", &[file.as_fd(), file.as_fd()]).expect("send");
        send(&a, b"two", &[]).expect("send");
        let mut buffer = [0; 16];
        let (len, fds) = receive(&b, &mut buffer).expect("receive");
        assert_eq!((&buffer[..len], fds.len()), (&b"one"[..], 2));
        let (len, fds) = receive(&b, &mut buffer).expect("receive");
        assert_eq!((&buffer[..len], fds.len()), (&b"two"[..], 0));
    }

    #[test]
    fn a_closed_peer_and_a_short_buffer_are_errors() {
        let (a, b) = pair();
        send(&a, b"long packet", &[]).expect("send");
        let mut small = [0; 4];
        assert!(matches!(receive(&b, &mut small), Err(FrameError::CutOff)));
        assert!(matches!(
            try_receive(&b, &mut small),
            Err(FrameError::TimedOut)
        ));
        drop(a);
        assert!(matches!(receive(&b, &mut small), Err(FrameError::Closed)));
    }
}

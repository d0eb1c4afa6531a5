//! A blocking client of a VMM's control socket.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::frame::{self, FrameError};
use crate::health::Signs;
use crate::message::{Description, Handover, ProcessId, Reply, Request};
use crate::rehearsal::Rehearsal;
use crate::report::{Phase, SwapReport};
use crate::secret::{Secret, hex};

/// Why a VMM could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("no VMM answers at {path}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: rustix::io::Errno,
    },
    /// The exchange failed.
    #[error("talking to the VMM: {0}")]
    Frame(#[from] FrameError),
    /// The VMM refused or failed; nothing changed.
    #[error("{message}")]
    Refused {
        /// A word for programs.
        code: String,
        /// What, why, and what to do.
        message: String,
    },
    /// It answers something else than was asked.
    #[error("the VMM answered out of turn: {0}")]
    Unexpected(String),
    /// It doesn't know the secret its VM was started with.
    #[error("the process behind {0} is not the VMM that was started")]
    Impostor(PathBuf),
}

/// A connection to one VMM.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    socket: OwnedFd,
}

impl Client {
    /// Connects; every later read gives up after `patience`.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, ClientError> {
        let failed = |source| ClientError::Connect {
            path: path.to_owned(),
            source,
        };
        let flags = SocketFlags::CLOEXEC;
        let kind = SocketType::SEQPACKET;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).map_err(failed)?;
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        rustix::net::connect(&socket, &address).map_err(failed)?;
        let client = Self {
            path: path.to_owned(),
            socket,
        };
        client.set_patience(patience)?;
        Ok(client)
    }

    /// How long a read waits for a reply.
    pub fn set_patience(&self, patience: Duration) -> Result<(), ClientError> {
        use rustix::net::sockopt::{Timeout, set_socket_timeout};
        set_socket_timeout(&self.socket, Timeout::Recv, Some(patience))
            .and_then(|()| set_socket_timeout(&self.socket, Timeout::Send, Some(patience)))
            .map_err(|errno| ClientError::Frame(errno.into()))
    }

    fn ask(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        frame::send_json(&self.socket, request, fds)?;
        self.answer()
    }

    fn answer(&self) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        match frame::receive_json(&self.socket)? {
            (Reply::Error { code, message }, _) => Err(ClientError::Refused { code, message }),
            answer => Ok(answer),
        }
    }

    fn unexpected(reply: &Reply) -> ClientError {
        ClientError::Unexpected(format!("{reply:?}"))
    }

    /// Asks who is there and, given the VM's secret, checks the proof.
    pub fn hello(&self, secret: Option<&Secret>) -> Result<(String, ProcessId), ClientError> {
        let random = Secret::random().map_err(|e| ClientError::Frame(e.into()))?;
        let nonce = hex(&random.as_bytes()[..16]);
        match self
            .ask(
                &Request::Hello {
                    nonce: nonce.clone(),
                },
                &[],
            )?
            .0
        {
            Reply::Identity {
                name,
                process,
                proof,
                ..
            } => {
                if secret.is_some_and(|secret| !secret.check(&nonce, &proof)) {
                    return Err(ClientError::Impostor(self.path.clone()));
                }
                Ok((name, process))
            }
            other => Err(Self::unexpected(&other)),
        }
    }

    /// What the VMM runs.
    pub fn describe(&self) -> Result<Description, ClientError> {
        match self.ask(&Request::Describe, &[])?.0 {
            Reply::Description(description) => Ok(*description),
            other => Err(Self::unexpected(&other)),
        }
    }

    /// Duplicates of guest RAM and of the ownership page.
    pub fn lend_guest(&self) -> Result<(OwnedFd, OwnedFd), ClientError> {
        let (reply, fds) = self.ask(&Request::LendGuest, &[])?;
        match (reply, <[OwnedFd; 2]>::try_from(fds)) {
            (Reply::Guest, Ok([memory, ownership])) => Ok((memory, ownership)),
            (other, _) => Err(Self::unexpected(&other)),
        }
    }

    /// Presses the guest's power button; tells whether the guest took note of it.
    pub fn press_power_button(&self) -> Result<bool, ClientError> {
        match self.ask(&Request::PressPowerButton, &[])?.0 {
            Reply::Pressed { heard } => Ok(heard),
            other => Err(Self::unexpected(&other)),
        }
    }

    /// Ends guest and VMM.
    pub fn power_off(&self) -> Result<(), ClientError> {
        match self.ask(&Request::PowerOff, &[])?.0 {
            Reply::Done => Ok(()),
            other => Err(Self::unexpected(&other)),
        }
    }

    /// Asks for a handover and waits for its end; `progress` hears of each phase. `request` must
    /// be a [`Request::HandOver`]. The socket is closed here as soon as it is sent: a copy kept
    /// open would hide a dead predecessor from its successor.
    pub fn hand_over(
        &self,
        request: &Request,
        handover_socket: OwnedFd,
        state: BorrowedFd<'_>,
        mut progress: impl FnMut(&Phase),
    ) -> Result<Handover, ClientError> {
        frame::send_json(&self.socket, request, &[handover_socket.as_fd(), state])?;
        drop(handover_socket);
        let mut reply = self.answer()?.0;
        loop {
            match reply {
                Reply::Progress(phase) => progress(&phase),
                Reply::Handover(handover) => return Ok(handover),
                other => return Err(Self::unexpected(&other)),
            }
            reply = self.answer()?.0;
        }
    }

    /// Has the guest stand still in its place, for `ceiling` at the longest.
    pub fn freeze(&self, swap: &str, ceiling: Duration) -> Result<(), ClientError> {
        let swap = swap.to_owned();
        match self.ask(&Request::Freeze { swap, ceiling }, &[])?.0 {
            Reply::Frozen => Ok(()),
            other => Err(Self::unexpected(&other)),
        }
    }

    /// Has the guest stand still and its process let go of KVM, for `ceiling` at the longest.
    pub fn detach(&self, swap: &str, ceiling: Duration) -> Result<(), ClientError> {
        let swap = swap.to_owned();
        match self.ask(&Request::Detach { swap, ceiling }, &[])?.0 {
            Reply::Detached => Ok(()),
            other => Err(Self::unexpected(&other)),
        }
    }

    /// Has the machine rebuilt of a guest that was detached for this swap. It does not run yet.
    pub fn rebuild(&self, swap: &str) -> Result<(), ClientError> {
        let swap = swap.to_owned();
        match self.ask(&Request::Rebuild { swap }, &[])?.0 {
            Reply::Rebuilt => Ok(()),
            other => Err(Self::unexpected(&other)),
        }
    }

    /// Has the guest stand still with its state stored for a jump; gives the state's size, and what that
    /// took.
    pub fn store(
        &self,
        swap: &str,
        nonce: &str,
        ceiling: Duration,
    ) -> Result<(u64, Duration), ClientError> {
        let request = Request::Store {
            swap: swap.to_owned(),
            nonce: nonce.to_owned(),
            ceiling,
        };
        match self.ask(&request, &[])?.0 {
            Reply::Stored { state_bytes, took } => Ok((state_bytes, took)),
            other => Err(Self::unexpected(&other)),
        }
    }

    /// Has a guest that is stored stand still through the jump, which comes now.
    pub fn await_jump(&self, swap: &str, ceiling: Duration) -> Result<(), ClientError> {
        let swap = swap.to_owned();
        match self.ask(&Request::AwaitJump { swap, ceiling }, &[])?.0 {
            Reply::Done => Ok(()),
            other => Err(Self::unexpected(&other)),
        }
    }

    /// Asks for a rehearsal and waits for its end. `request` must be a [`Request::Rehearse`]. The
    /// socket is closed here as soon as it is sent, so that each side hears when the other closes.
    pub fn rehearse(&self, request: &Request, socket: OwnedFd) -> Result<Rehearsal, ClientError> {
        frame::send_json(&self.socket, request, &[socket.as_fd()])?;
        drop(socket);
        match self.answer()?.0 {
            Reply::Rehearsed(rehearsal) => Ok(*rehearsal),
            other => Err(Self::unexpected(&other)),
        }
    }

    /// Has the guest run on that stands still for this swap; gives the pause's report.
    pub fn resume(&self, swap: &str) -> Result<SwapReport, ClientError> {
        let swap = swap.to_owned();
        match self.ask(&Request::Resume { swap }, &[])?.0 {
            Reply::Resumed { report } => Ok(*report),
            other => Err(Self::unexpected(&other)),
        }
    }

    /// Signs of life, at this moment.
    pub fn signs(&self) -> Result<Signs, ClientError> {
        match self.ask(&Request::Signs, &[])?.0 {
            Reply::Signs(signs) => Ok(*signs),
            other => Err(Self::unexpected(&other)),
        }
    }

    /// The report of the last swap; `None` while it is being measured.
    pub fn last_report(&self) -> Result<Option<SwapReport>, ClientError> {
        match self.ask(&Request::LastReport, &[])?.0 {
            Reply::Report { report } => Ok(report.map(|report| *report)),
            other => Err(Self::unexpected(&other)),
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

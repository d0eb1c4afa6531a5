//! Finds a VMM by its control socket and checks that it is the one.
//!
//! Three things must agree: the peer of the socket is of our uid (`SO_PEERCRED`), it proves the
//! VM's secret, and the process it says it is lives, with that pid and start time. `SO_PEERCRED`
//! names the process that called `listen`; after a swap that may be a dead predecessor, so its
//! pid is compared only while it lives.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use stillpoint_control::client::{Client, ClientError};
use stillpoint_control::health::Signs;
use stillpoint_control::message::{Description, ProcessId, Request};
use stillpoint_control::ownership::Ownership;
use stillpoint_control::rehearsal::Rehearsal;
use stillpoint_control::report::SwapReport;
use stillpoint_control::secret::Secret;

use super::process::Process;

/// How long a VMM may take to answer a simple question.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// A VMM that was found and proved, with what keeps its guest alive.
#[derive(Debug)]
pub struct Held {
    /// Its process.
    pub process: Process,
    /// What it runs.
    pub description: Description,
    /// A duplicate of guest RAM.
    pub memory: OwnedFd,
    /// The ownership word.
    pub ownership: Arc<Ownership>,
}

/// Why no VMM was found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// Nobody listens: there is no socket, or its process is dead.
    #[error("nobody listens at {0}")]
    Nobody(PathBuf),
    /// Somebody answers who is not the VMM that was started.
    #[error("{0}")]
    Impostor(String),
    /// Somebody listens who doesn't answer as a VMM should.
    #[error("the VMM at {path} can't be spoken to: {source}")]
    Mute {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: ClientError,
    },
}

/// What proves a VMM.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Its control socket.
    pub control: PathBuf,
    /// Its VM's secret.
    pub secret: Secret,
}

impl Expected {
    /// Looks for it once.
    pub async fn find(&self) -> Result<Held, FindError> {
        let expected = self.clone();
        let found = blocking(move || expected.ask()).await?;
        let (identity, description, memory, ownership) = found;
        let process = Process::open(&identity).map_err(|e| {
            FindError::Impostor(format!(
                "what answers at its socket says it is a process that {e}"
            ))
        })?;
        Ok(Held {
            process,
            description,
            memory,
            ownership: Arc::new(ownership),
        })
    }

    fn ask(&self) -> Result<(ProcessId, Description, OwnedFd, Ownership), FindError> {
        let mute = |source| self.mute(source);
        let (client, identity) = self.greet()?;
        let description = client.describe().map_err(mute)?;
        let (memory, page) = client.lend_guest().map_err(mute)?;
        let ownership = Ownership::map(page).map_err(|e| {
            FindError::Impostor(format!(
                "what answers at its socket lends no ownership page: {e}"
            ))
        })?;
        Ok((identity, description, memory, ownership))
    }

    /// Connects and checks the proof. Blocks.
    pub fn greet(&self) -> Result<(Client, ProcessId), FindError> {
        let client = match Client::connect(&self.control, PATIENCE) {
            Err(ClientError::Connect {
                source: rustix::io::Errno::CONNREFUSED | rustix::io::Errno::NOENT,
                ..
            }) => {
                return Err(FindError::Nobody(self.control.clone()));
            }
            other => other.map_err(|e| self.mute(e))?,
        };
        let peer = rustix::net::sockopt::socket_peercred(&client)
            .map_err(|e| self.mute(ClientError::Frame(e.into())))?;
        if peer.uid != rustix::process::geteuid() {
            let uid = peer.uid.as_raw();
            return Err(FindError::Impostor(format!(
                "a process of uid {uid} listens at its socket"
            )));
        }
        let (_, identity) = client.hello(Some(&self.secret)).map_err(|e| match e {
            ClientError::Impostor(_) => FindError::Impostor(e.to_string()),
            other => self.mute(other),
        })?;
        let listener = u32::try_from(peer.pid.as_raw_nonzero().get()).unwrap_or(0);
        if listener != identity.pid && ProcessId::of(listener).is_some() {
            // Not a reason to leave a guest alone: the proof stands, and the pid may be used again.
            tracing::debug!(
                listener,
                pid = identity.pid,
                "another process called listen"
            );
        }
        Ok((client, identity))
    }

    /// The report of its last swap, asked for until it is there; `None` when it isn't in time.
    pub async fn last_report(&self, swap: &str, patience: Duration) -> Option<SwapReport> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let expected = self.clone();
            let asked = blocking(move || {
                let (client, _) = expected.greet()?;
                client.last_report().map_err(|e| expected.mute(e))
            });
            match asked.await {
                Ok(Some(report)) if report.swap == swap => return Some(report),
                Ok(_) => {}
                Err(error) => tracing::debug!("no report yet: {error}"),
            }
            if tokio::time::Instant::now() >= deadline {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Asks for a rehearsal by the process at the other end of `socket`'s pair. An error means that
    /// nothing is known.
    pub async fn rehearse(
        &self,
        request: Request,
        socket: OwnedFd,
        patience: Duration,
    ) -> Result<Rehearsal, ClientError> {
        self.exchange(move |client| {
            client.set_patience(patience)?;
            client.rehearse(&request, socket)
        })
        .await
    }

    /// Signs of life of guest and VMM.
    pub async fn signs(&self) -> Result<Signs, ClientError> {
        self.exchange(|client| client.signs()).await
    }

    /// Speaks with the VMM off the runtime's threads, once it has proved itself.
    async fn exchange<T: Send + 'static>(
        &self,
        exchange: impl FnOnce(Client) -> Result<T, ClientError> + Send + 'static,
    ) -> Result<T, ClientError> {
        let expected = self.clone();
        let spoken = move || match expected.greet() {
            Ok((client, _)) => exchange(client),
            Err(FindError::Mute { source, .. }) => Err(source),
            Err(error) => Err(ClientError::Unexpected(error.to_string())),
        };
        match tokio::task::spawn_blocking(spoken).await {
            Ok(answer) => answer,
            Err(error) => Err(ClientError::Unexpected(error.to_string())),
        }
    }

    /// Presses the guest's power button; tells whether the guest took note of it.
    pub async fn press_power_button(&self) -> Result<bool, FindError> {
        let expected = self.clone();
        blocking(move || {
            let (client, _) = expected.greet()?;
            client.press_power_button().map_err(|e| expected.mute(e))
        })
        .await
    }

    /// Ends guest and VMM. The process ends after the answer.
    pub async fn power_off(&self) -> Result<(), FindError> {
        let expected = self.clone();
        blocking(move || {
            let (client, _) = expected.greet()?;
            client.power_off().map_err(|e| expected.mute(e))
        })
        .await
    }

    /// What it is when that VMM can't be spoken to.
    pub fn mute(&self, source: ClientError) -> FindError {
        FindError::Mute {
            path: self.control.clone(),
            source,
        }
    }
}

/// Runs a blocking exchange off the runtime's threads.
async fn blocking<T: Send + 'static>(
    exchange: impl FnOnce() -> Result<T, FindError> + Send + 'static,
) -> Result<T, FindError> {
    match tokio::task::spawn_blocking(exchange).await {
        Ok(result) => result,
        Err(error) => Err(FindError::Impostor(format!(
            "the exchange was cut short: {error}"
        ))),
    }
}

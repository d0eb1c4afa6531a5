//! The door for other machines: TLS 1.3 with certificates on both sides. Who calls is what their certificate says.
//!
//! ```text
//!   accept ─▶ handshake, each in a task of its own, in time ─▶ certificate read ─▶ handed to the server
//!                  │ no certificate, another CA's, expired, revoked
//!                  ▼
//!               a line in the log, and the TLS alert that says which
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::certificate::Certificate;
use super::files::Papers;
use super::{Caller, Shown};

/// How long somebody has for their handshake.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many may be at it at once. Others wait at the kernel's queue.
const AT_ONCE: usize = 64;
/// After an error of the listener's own, such as no descriptor being left.
const AGAIN: Duration = Duration::from_millis(200);

type Let = (TlsStream<TcpStream>, Caller);

/// A listener that lets in who shows a good certificate.
#[derive(Debug)]
pub struct Door {
    let_in: mpsc::Receiver<Let>,
    at: SocketAddr,
}

impl Door {
    /// Listens from now on, at a socket that is bound already.
    pub fn open(listener: TcpListener, papers: Arc<Papers>) -> std::io::Result<Self> {
        let at = listener.local_addr()?;
        let (let_one, let_in) = mpsc::channel(AT_ONCE);
        tokio::spawn(accept(listener, papers, let_one));
        Ok(Self { let_in, at })
    }

    /// Where it listens.
    pub fn at(&self) -> SocketAddr {
        self.at
    }
}

async fn accept(listener: TcpListener, papers: Arc<Papers>, let_one: mpsc::Sender<Let>) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        // Never closed.
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let (stream, from) = tokio::select! {
            () = let_one.closed() => return,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
            }
        };
        let (papers, let_one) = (papers.clone(), let_one.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(PATIENCE, shake(stream, from, papers)).await {
                // The daemon may be ending.
                Ok(Ok(one)) => drop(let_one.send(one).await),
                Ok(Err(problem)) => {
                    tracing::warn!(%from, "nobody is let in: {problem}");
                }
                Err(_) => tracing::warn!(%from, "nobody is let in: no handshake in {PATIENCE:?}"),
            }
            drop(place);
        });
    }
}

async fn shake(stream: TcpStream, from: SocketAddr, papers: Arc<Papers>) -> Result<Let, String> {
    let config = papers.now().map_err(|e| e.to_string())?;
    // Requests are small, and each is waited for.
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    let stream = TlsAcceptor::from(config).accept(stream).await;
    let stream = stream.map_err(|e| e.to_string())?;
    let shown = stream.get_ref().1.peer_certificates();
    // The verifier lets nobody through without one.
    let first = shown.and_then(|all| all.first()).ok_or("no certificate")?;
    let certificate = Certificate::of_der(first).map_err(|e| e.to_string())?;
    let caller = caller(&certificate, from, papers);
    Ok((stream, caller))
}

fn caller(certificate: &Certificate, from: SocketAddr, papers: Arc<Papers>) -> Caller {
    let serial = certificate.serial.clone();
    Caller {
        who: certificate.name.clone(),
        from: format!("{from}, certificate {serial}"),
        role: certificate.role,
        remedy: format!(
            "have a certificate issued with the role: `stillpoint auth client {} --role ROLE`",
            certificate.name
        ),
        shown: Some(Shown {
            serial,
            until_unix_s: certificate.until_unix_s,
            papers,
        }),
    }
}

/// Where a connection came from, and whose it is.
#[derive(Clone, Debug)]
pub struct By(pub Caller);

impl Listener for Door {
    type Io = TlsStream<TcpStream>;
    type Addr = By;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.let_in.recv().await {
            Some((stream, caller)) => (stream, By(caller)),
            // The listening task is gone only with the runtime.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

impl Connected<IncomingStream<'_, Door>> for By {
    fn connect_info(stream: IncomingStream<'_, Door>) -> Self {
        stream.remote_addr().clone()
    }
}

//! Where a stream leads to: an address, a Unix socket, or a vsock port.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use vsock::{VMADDR_CID_ANY, VsockListener, VsockStream};

/// The other end, one of three kinds.
#[derive(clap::Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct Target {
    /// TCP address.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) addr: Option<SocketAddr>,
    /// vsock address; CID 2 is the host.
    #[arg(long, value_name = "CID:PORT")]
    pub(crate) vsock: Option<String>,
    /// Unix socket.
    #[arg(long, value_name = "PATH")]
    pub(crate) unix: Option<PathBuf>,
}

/// What to say first to whoever stands between.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Connect {
    /// Sent as a line after connecting, and answered with a line that begins with OK: how a
    /// VMM's vsock socket leads on to a guest's port, by `CONNECT PORT`.
    #[arg(long, value_name = "LINE")]
    pub(crate) connect_line: Option<String>,
}

/// Where to listen, one of three kinds.
#[derive(clap::Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct Door {
    /// TCP address; port 0 takes a free one, and says which.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) addr: Option<SocketAddr>,
    /// vsock port.
    #[arg(long, value_name = "PORT")]
    pub(crate) vsock_port: Option<u32>,
    /// Unix socket, which must not be there yet.
    #[arg(long, value_name = "PATH")]
    pub(crate) unix: Option<PathBuf>,
}

/// A stream of one of the three kinds.
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Vsock(VsockStream),
}

/// A listening socket of one of the three kinds.
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
    Vsock(VsockListener),
}

/// Connects to `CID:PORT`.
pub(crate) fn vsock(address: &str) -> anyhow::Result<VsockStream> {
    let parsed = address.split_once(':');
    let parsed = parsed.and_then(|(cid, port)| Some((cid.parse().ok()?, port.parse().ok()?)));
    let (cid, port) = parsed.with_context(|| format!("{address} is not CID:PORT"))?;
    VsockStream::connect_with_cid_port(cid, port)
        .with_context(|| format!("connecting to vsock {address}"))
}

impl Target {
    /// Connects. A read or a write that takes longer than `patience` is an error from then on.
    pub(crate) fn connect(&self, first: &Connect, patience: Duration) -> anyhow::Result<Stream> {
        let mut stream = match self {
            Self {
                addr: Some(addr), ..
            } => {
                let stream = TcpStream::connect(addr);
                let stream = stream.with_context(|| format!("connecting to {addr}"))?;
                // A frame of an echo goes out at once.
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
            Self {
                unix: Some(path), ..
            } => {
                let stream = UnixStream::connect(path);
                Stream::Unix(stream.with_context(|| format!("connecting to {}", path.display()))?)
            }
            Self {
                vsock: Some(address),
                ..
            } => Stream::Vsock(vsock(address)?),
            _ => bail!("one of --addr, --unix and --vsock says where to connect to"),
        };
        stream.limit(patience)?;
        if let Some(line) = &first.connect_line {
            writeln!(stream, "{line}").context("sending the connect line")?;
            let answer = read_line(&mut stream).context("the answer to the connect line")?;
            ensure!(
                answer.starts_with("OK"),
                "{line}: answered {answer:?}, not OK"
            );
        }
        Ok(stream)
    }
}

impl Door {
    /// Listens, and says where on standard output.
    pub(crate) fn listen(&self) -> anyhow::Result<Listener> {
        let (listener, place) = match self {
            Self {
                addr: Some(addr), ..
            } => {
                let listener = TcpListener::bind(addr);
                let listener = listener.with_context(|| format!("listening on {addr}"))?;
                let place = listener.local_addr()?.to_string();
                (Listener::Tcp(listener), place)
            }
            Self {
                unix: Some(path), ..
            } => {
                let place = path.display().to_string();
                let listener = UnixListener::bind(path);
                (
                    Listener::Unix(listener.with_context(|| format!("listening on {place}"))?),
                    place,
                )
            }
            Self {
                vsock_port: Some(port),
                ..
            } => {
                let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, *port);
                let listener = listener.with_context(|| format!("listening on vsock port {port}"));
                (Listener::Vsock(listener?), port.to_string())
            }
            _ => bail!("one of --addr, --unix and --vsock-port says where to listen"),
        };
        println!("{}", serde_json::json!({ "listening": place }));
        Ok(listener)
    }
}

impl Listener {
    /// The next connection.
    pub(crate) fn accept(&self, patience: Duration) -> anyhow::Result<Stream> {
        let stream = match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
            Self::Unix(listener) => Stream::Unix(listener.accept()?.0),
            Self::Vsock(listener) => Stream::Vsock(listener.accept()?.0),
        };
        stream.limit(patience)?;
        Ok(stream)
    }
}

impl Stream {
    fn limit(&self, patience: Duration) -> io::Result<()> {
        let patience = Some(patience);
        match self {
            Self::Tcp(stream) => {
                stream.set_read_timeout(patience)?;
                stream.set_write_timeout(patience)
            }
            Self::Unix(stream) => {
                stream.set_read_timeout(patience)?;
                stream.set_write_timeout(patience)
            }
            Self::Vsock(stream) => {
                stream.set_read_timeout(patience)?;
                stream.set_write_timeout(patience)
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(bytes),
            Self::Unix(stream) => stream.read(bytes),
            Self::Vsock(stream) => stream.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
            Self::Vsock(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A short line, read byte by byte: what follows it is not ours to take.
pub(crate) fn read_line(stream: &mut impl Read) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        match byte {
            [b'\n'] => return Ok(String::from_utf8_lossy(&line).into_owned()),
            _ if line.len() >= 64 << 10 => return Err(io::ErrorKind::InvalidData.into()),
            [byte] => line.push(byte),
        }
    }
}

//! As much of HTTP as one question to the metadata service needs, over vsock or TCP, one
//! connection each. Answers are bounded.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use vsock::{VMADDR_CID_HOST, VsockStream};

/// The longest answer.
const MAX_ANSWER: u64 = 1 << 20;
/// What an answer may take beyond what was asked for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the metadata service is.
#[derive(Clone, Debug)]
pub(crate) enum Host {
    /// A port of the host, by vsock.
    Vsock(u32),
    /// An address.
    Tcp(SocketAddr),
    /// A Unix socket, in tests.
    Unix(PathBuf),
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vsock(port) => write!(f, "vsock port {port} of the host"),
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A connection, whatever it goes over.
pub(crate) trait Connection: Read + Write + Send {}
impl<T: Read + Write + Send> Connection for T {}

impl Host {
    /// Connects; a read or write takes no longer than `longest`.
    fn connect(&self, longest: Duration) -> io::Result<Box<dyn Connection>> {
        let longest = Some(longest + PATIENCE);
        Ok(match self {
            Self::Vsock(port) => {
                let stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, *port)?;
                stream.set_read_timeout(longest)?;
                stream.set_write_timeout(longest)?;
                Box::new(stream)
            }
            Self::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, PATIENCE)?;
                stream.set_read_timeout(longest)?;
                stream.set_write_timeout(longest)?;
                Box::new(stream)
            }
            Self::Unix(path) => {
                let stream = std::os::unix::net::UnixStream::connect(path)?;
                stream.set_read_timeout(longest)?;
                stream.set_write_timeout(longest)?;
                Box::new(stream)
            }
        })
    }

    /// The body of what is at `path`, which may be waited for so long.
    pub(super) fn get(&self, path: &str, longest: Duration) -> io::Result<String> {
        self.ask("GET", path, "", longest)
    }

    /// Posts a body.
    pub(super) fn post(&self, path: &str, body: &str) -> io::Result<()> {
        self.ask("POST", path, body, PATIENCE).map(drop)
    }

    fn ask(&self, method: &str, path: &str, body: &str, longest: Duration) -> io::Result<String> {
        let mut stream = self.connect(longest)?;
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata: true\r\n\
             Connection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.take(MAX_ANSWER).read_to_string(&mut answer)?;
        answer_of(&answer).map(str::to_owned)
    }
}

/// The body of an answer that says 200; `Connection: close` makes it all that is left.
fn answer_of(answer: &str) -> io::Result<&str> {
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the answer was cut off"))?;
    match head.split(' ').nth(1) {
        Some("200") => Ok(body),
        status => {
            let text = format!("the host answered {}: {body}", status.unwrap_or("nonsense"));
            Err(io::Error::other(text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_taken_apart() {
        let good = "HTTP/1.1 200 OK\r\nETag: \"1\"\r\n\r\nweb-1";
        assert_eq!(answer_of(good).unwrap(), "web-1");
        let bad = answer_of("HTTP/1.1 429 Too Many Requests\r\n\r\n{}").unwrap_err();
        assert!(bad.to_string().contains("429"), "{bad}");
        answer_of("HTTP/1.1 200 OK\r\n").unwrap_err();
        answer_of("").unwrap_err();
    }
}

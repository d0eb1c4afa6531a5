//! Who guests of an emulated host talk to that is no part of it: two servers on this machine, which the host
//! reaches through QEMU's user network at 10.0.2.2. They stay where they are while the host jumps.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde_json::Value;

use super::order::Outside;

/// This machine, as who is behind QEMU's user network sees it.
const MACHINE: &str = "10.0.2.2";

/// The servers; they end with it.
#[derive(Debug)]
pub(super) struct Peer {
    echo: Child,
    outside: Outside,
}

impl Peer {
    /// Starts them, at ports that are free.
    pub(super) fn start() -> anyhow::Result<Self> {
        let program = super::program("load")?;
        let mut echo = Command::new(&program)
            .args(["echo-serve", "--addr", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let mut line = String::new();
        let said = echo.stdout.take().context("it has no standard output")?;
        BufReader::new(said).read_line(&mut line)?;
        let place: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
        let port = |place: &str| place.rsplit_once(':')?.1.parse::<u16>().ok();
        let echo_port = place["listening"].as_str().and_then(port);
        let clock = TcpListener::bind("127.0.0.1:0")?;
        let clock_port = clock.local_addr()?.port();
        // It ends with this program; an accept that fails is asked for again by whoever wanted it.
        std::thread::spawn(move || {
            for stream in clock.incoming().flatten() {
                std::thread::spawn(move || tell_time(stream));
            }
        });
        let outside = Outside {
            echo: format!("{MACHINE}:{}", echo_port.context("no port of the echo")?),
            clock: format!("{MACHINE}:{clock_port}"),
        };
        Ok(Self { echo, outside })
    }

    /// Where they are, as the host sees it.
    pub(super) fn outside(&self) -> Outside {
        self.outside.clone()
    }
}

/// For each byte the time, in nanoseconds since the Unix epoch.
fn tell_time(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut byte = [0];
    while stream.read_exact(&mut byte).is_ok() {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        if stream.write_all(&now.to_le_bytes()).is_err() {
            return;
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.echo.kill();
        let _ = self.echo.wait();
    }
}

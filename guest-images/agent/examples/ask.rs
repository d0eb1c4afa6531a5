//! Asks an agent by hand: `ask SOCKET '{"do":"health"}'...`, with the VMM's vsock socket of a
//! guest, or `ask CID '...'...` where vsock is the kernel's.

use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use serde_json::Value;
use stillpoint_agent::client::{Client, dial};
use stillpoint_agent::protocol::{PORT, Request};
use vsock::VsockStream;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let place = args
        .next()
        .context("where is the agent: a socket's path, or a CID?")?;
    match place.parse() {
        Ok(cid) => ask(VsockStream::connect_with_cid_port(cid, PORT)?, args),
        Err(_) => ask(
            dial(Path::new(&place), PORT, Duration::from_secs(10))?,
            args,
        ),
    }
}

fn ask(stream: impl Read + Write, requests: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let mut client = Client::new(stream);
    for request in requests {
        let request: Request = serde_json::from_str(&request).context(request)?;
        let answer: Value = client.ask(&request)?;
        println!("{answer}");
    }
    Ok(())
}

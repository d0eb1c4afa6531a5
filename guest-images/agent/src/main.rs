//! stillpoint-agent: see the library for its protocol. This file is its command line.
//!
//! As PID 1 it takes none: what it is to do stands on the kernel's command line (`init.rs`).

/// Says something on standard error: the console, or the journal. Whether it can be heard or not,
/// nobody ends because of it, as they would by `println`.
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "stillpoint-agent: {}", format_args!($($arg)*));
    }};
}

mod init;
mod service;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use stillpoint_agent::protocol::PORT;

/// The host's vsock port at which the metadata service is.
const METADATA: u32 = 80;

const USAGE: &str = "\
stillpoint-agent: answers a host's questions about this guest

  --port N      vsock port to listen on [1024]
  --unix PATH   listen on a Unix socket instead
  --hooks DIR   where the hooks before and after a pause lie [/etc/stillpoint/hooks.d]

Or, instead of answering:

  --events WHERE      hear of pauses from the metadata service (vsock, or ADDRESS:PORT), run the
                      hooks around them, and say when this guest is ready
  --deadline SECONDS  how long the hooks before a pause may take, and those after it [60]
  --relay ADDRESS:PORT  lead what connects there to the metadata service by vsock

  --version     say which version this is
";

fn main() -> ExitCode {
    if rustix::process::getpid().is_init() {
        init::run();
    }
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> anyhow::Result<()> {
    let mut deadline = Duration::from_secs(60);
    let mut events = None;
    let mut settings = service::Settings {
        door: service::Door::Vsock(PORT),
        hooks: PathBuf::from("/etc/stillpoint/hooks.d"),
        init: false,
    };
    let mut args = std::env::args();
    args.next();
    while let Some(flag) = args.next() {
        let mut value = || args.next().with_context(|| format!("{flag} needs a value"));
        match flag.as_str() {
            "--port" => {
                let port = value()?;
                let port = port.parse().with_context(|| format!("--port {port}"))?;
                settings.door = service::Door::Vsock(port);
            }
            "--unix" => settings.door = service::Door::Unix(value()?.into()),
            "--hooks" => settings.hooks = value()?.into(),
            "--events" => events = Some(place(&value()?)?),
            "--deadline" => {
                let seconds = value()?;
                let seconds = seconds
                    .parse()
                    .with_context(|| format!("--deadline {seconds}"))?;
                deadline = Duration::from_secs(seconds);
            }
            "--relay" => {
                let address = value()?;
                let address = address
                    .parse()
                    .with_context(|| format!("--relay {address}"))?;
                return service::relay::run(address, METADATA);
            }
            init::UNDER_INIT => settings.init = true,
            "--version" => {
                println!("stillpoint-agent {}", env!("CARGO_PKG_VERSION"));
                return Ok(());
            }
            "--help" | "-h" => {
                print!("{USAGE}");
                return Ok(());
            }
            _ => bail!("{flag}: there is no such flag\n\n{USAGE}"),
        }
    }
    if let Some(host) = events {
        let watched = service::events::Settings { host, deadline };
        service::events::run(&watched, &settings.hooks);
    }
    service::run(settings)
}

/// Where the metadata service is.
fn place(text: &str) -> anyhow::Result<service::events::Host> {
    use service::events::Host;
    if text == "vsock" {
        return Ok(Host::Vsock(METADATA));
    }
    if text.starts_with('/') {
        return Ok(Host::Unix(text.into()));
    }
    let address = text.parse();
    let address =
        address.with_context(|| format!("--events {text}: neither vsock nor ADDRESS:PORT"))?;
    Ok(Host::Tcp(address))
}

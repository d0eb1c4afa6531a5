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

use anyhow::{Context, bail};
use stillpoint_agent::protocol::PORT;

const USAGE: &str = "\
stillpoint-agent: answers a host's questions about this guest

  --port N      vsock port to listen on [1024]
  --unix PATH   listen on a Unix socket instead
  --hooks DIR   where the hooks before and after a pause lie [/etc/stillpoint/hooks.d]
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
    service::run(settings)
}

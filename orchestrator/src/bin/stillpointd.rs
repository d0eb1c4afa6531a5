//! The daemon, one per host.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use orchestrator::agent::launch::launch;
use orchestrator::daemon::{self, Config};

/// Starts guests on this host, watches them, and swaps what runs them. Ending it harms no guest.
#[derive(Debug, Parser)]
#[command(name = "stillpointd", version, args_conflicts_with_subcommands = true)]
struct Args {
    /// Sockets and logs [root: /run/stillpoint; others: $XDG_RUNTIME_DIR/stillpoint].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Store and releases [root: /var/lib/stillpoint; others: ~/.local/state/stillpoint].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// The API's socket [api.sock in the run directory].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// A public key of minisign's whose signatures of releases count, to a date if there is one; may
    /// be given again.
    #[arg(long, value_name = "FILE[,until=DATE]")]
    trust: Vec<String>,
    /// Where Prometheus may ask for /metrics, such as 127.0.0.1:9464. Figures only; nothing can be changed
    /// there, and nobody is asked who they are [nowhere].
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<std::net::SocketAddr>,
    /// Where people may look at pages, such as 127.0.0.1:8080: what runs here and how its pauses went.
    /// `stillpoint page` prints the address that lets in [nowhere].
    #[arg(long, value_name = "ADDRESS:PORT")]
    web: Option<std::net::SocketAddr>,
    /// Logs as JSON, one object a line.
    #[arg(long)]
    json_logs: bool,
    /// Prints the API's OpenAPI document and exits.
    #[arg(long)]
    print_openapi: bool,
    /// Puts the store on a disk that forgets what was not synced, and cuts its power: sync=N, torn=N,
    /// synced=N, or never.
    #[cfg(feature = "fault-injection")]
    #[arg(long, value_name = "CUT", value_parser = orchestrator::store::disk::arm)]
    disk: Option<()>,
    /// Print the OpenAPI document of what guests find, and end.
    #[arg(long)]
    print_guest_openapi: bool,
    #[command(subcommand)]
    command: Option<Internal>,
}

#[derive(Debug, Subcommand)]
enum Internal {
    /// What runs between fork and the VMM; the daemon's own use only.
    #[command(hide = true)]
    Launch {
        /// Arguments of the VMM.
        #[arg(last = true)]
        args: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stillpointd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    if let Some(Internal::Launch { args }) = args.command {
        return launch(&args);
    }
    if args.print_guest_openapi {
        print!("{}", orchestrator::metadata::described::openapi_json()?);
        return Ok(());
    }
    if args.print_openapi {
        print!("{}", orchestrator::api::openapi_json()?);
        return Ok(());
    }
    log(args.json_logs);
    let run_dir = args.run_dir.unwrap_or_else(daemon::default_run_dir);
    let config = Config {
        socket: args.socket.unwrap_or_else(|| daemon::socket_in(&run_dir)),
        run_dir: std::path::absolute(run_dir)?,
        trust: args.trust,
        metrics: args.metrics,
        web: args.web,
        state_dir: std::path::absolute(args.state_dir.unwrap_or_else(daemon::default_state_dir))?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(daemon::run(config));
    // A blocking exchange with a VMM may still wait for its answer; the guest needs neither.
    runtime.shutdown_background();
    result
}

fn log(json: bool) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        // It would complain of a log that can't be written by a panic, in whatever task just logs.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    if json {
        logs.json().init();
    } else {
        logs.init();
    }
}

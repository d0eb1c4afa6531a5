//! The `stillpoint` command: one file per verb.
//!
//! Every verb prints for people, or with `--json` for programs; errors too. It exits 0 when what
//! was asked for is so, and non-zero when it is not.

mod adopt;
mod audit;
mod auth;
mod completions;
mod console;
mod doctor;
mod dry;
mod events;
pub(crate) mod format;
mod history;
mod host;
mod hosts;
mod http;
mod kernel;
mod logs;
mod ls;
mod man;
mod page;
mod prepare;
mod progress;
mod release;
mod remote;
mod report;
mod rm;
mod rollout;
mod run;
mod safeguards;
mod show;
mod simulate;
mod stop;
mod swap;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::daemon;
use crate::model::{Code, Problem};

/// Runs guests on this host, and swaps what runs them while they run.
#[derive(Debug, Parser)]
#[command(name = "stillpoint", version, propagate_version = true)]
pub struct Args {
    /// Prints JSON, errors too.
    #[arg(long, global = true)]
    json: bool,
    /// The daemon's socket [api.sock in the run directory].
    #[arg(long, global = true, value_name = "PATH", env = "STILLPOINT_SOCKET")]
    socket: Option<PathBuf>,
    /// The daemon's run directory [root: /run/stillpoint; others: $XDG_RUNTIME_DIR/stillpoint].
    #[arg(long, global = true, value_name = "DIR", env = "STILLPOINT_RUN_DIR")]
    run_dir: Option<PathBuf>,
    #[command(flatten)]
    remote: remote::RemoteArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Starts a guest.
    Run(Box<run::Args>),
    /// Lists guests.
    Ls,
    /// Shows one guest.
    Show(show::Args),
    /// Opens a guest's serial console.
    Console(console::Args),
    /// Prints what a guest's VMM logged, or its console.
    Logs(logs::Args),
    /// Ends a guest.
    Stop(stop::Args),
    /// Forgets a guest that is over.
    Rm(rm::Args),
    /// Swaps a component under a running guest.
    Swap(swap::Args),
    /// Lists hosts, has one left alone, and has guests stand still while this one is changed by hand.
    Host(host::Args),
    /// Shows what lies in memory that outlives the host's kernel, and deals with what was not revived.
    Adopt(adopt::Args),
    /// Lists, approves, cancels and watches what guests are told of their pauses.
    Events(events::Args),
    /// Prints the address of the daemon's page, with the key that lets in.
    Page,
    /// Makes and shows certificates for daemons and for those who call them from other machines: a small CA.
    Auth(auth::Args),
    /// Shows who asked the daemon for changes, and what came of it.
    Audit(audit::Args),
    /// Shows what a swap did, phase by phase.
    Report(report::Args),
    /// Shows what was asked of the daemon and what came of it, line by line.
    History(history::Args),
    /// Says what this host can and can't do, with remedies.
    Doctor(doctor::Args),
    /// Adds and lists releases.
    Release(release::Args),
    /// Rolls a release out over VMs and hosts, one update domain at a time.
    Rollout(rollout::Args),
    /// Simulates rollouts over a fleet that isn't there; needs no daemon.
    Simulate(simulate::Args),
    /// Prints completions for a shell.
    Completions(completions::Args),
    /// Writes man pages.
    Man(man::Args),
}

/// What every verb works with.
#[derive(Clone, Debug)]
struct Desk {
    json: bool,
    api: http::Api,
    run_dir: PathBuf,
}

impl Desk {
    /// What reaches past the API, into files and sockets of the host, works on the host alone.
    fn must_be_local(&self, what: &str) -> Result<(), Problem> {
        let Some(remote) = self.api.remote() else {
            return Ok(());
        };
        let message = format!(
            "{what} works on the host itself only: log in on {}, and leave --remote away",
            remote.name()
        );
        Err(Problem::new(Code::BadRequest, message))
    }
}

/// Runs the command.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return usage(&error),
    };
    let json = args.json;
    match run(args) {
        Ok(code) => code,
        Err(problem) => {
            complain(json, &problem);
            ExitCode::FAILURE
        }
    }
}

/// What clap has to say; as JSON if that was asked for anywhere on the line.
fn usage(error: &clap::Error) -> ExitCode {
    let json = std::env::args_os().any(|arg| arg == "--json");
    if json && error.use_stderr() {
        let message = error.to_string();
        let message = message.trim_start_matches("error: ").trim_end();
        complain(true, &Problem::new(Code::BadRequest, message));
        return ExitCode::from(2);
    }
    // Fails only if nobody reads it.
    let _ = error.print();
    u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from)
}

fn complain(json: bool, problem: &Problem) {
    let text = match serde_json::to_string(problem) {
        Ok(text) if json => text,
        _ => format!("stillpoint: {}", problem.message),
    };
    // Nowhere is left to say that stderr is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn run(args: Args) -> Result<ExitCode, Problem> {
    let run_dir = args.run_dir.unwrap_or_else(daemon::default_run_dir);
    let socket = args.socket.unwrap_or_else(|| daemon::socket_in(&run_dir));
    let desk = Desk {
        json: args.json,
        api: match args.remote.remote()? {
            Some(remote) => http::Api::Machine(remote),
            None => http::Api::Socket(socket),
        },
        run_dir,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Problem::new(Code::Failed, format!("cannot start: {e}")))?;
    let done = runtime.block_on(dispatch(&desk, args.verb));
    runtime.shutdown_background();
    done
}

async fn dispatch(desk: &Desk, verb: Verb) -> Result<ExitCode, Problem> {
    match verb {
        Verb::Run(args) => run::run(desk, *args).await,
        Verb::Ls => ls::run(desk).await,
        Verb::Show(args) => show::run(desk, args).await,
        Verb::Console(args) => console::run(desk, args).await,
        Verb::Logs(args) => logs::run(desk, args).await,
        Verb::Stop(args) => stop::run(desk, args).await,
        Verb::Rm(args) => rm::run(desk, args).await,
        Verb::Swap(args) => swap::run(desk, args).await,
        Verb::Host(args) => host::run(desk, args).await,
        Verb::Adopt(args) => adopt::run(desk, args).await,
        Verb::Events(args) => events::run(desk, args).await,
        Verb::Page => page::run(desk).await,
        Verb::Auth(args) => auth::run(desk, args).await,
        Verb::Audit(args) => audit::run(desk, args).await,
        Verb::Report(args) => report::run(desk, args).await,
        Verb::History(args) => history::run(desk, args).await,
        Verb::Doctor(args) => doctor::run(desk, args).await,
        Verb::Release(args) => release::run(desk, args).await,
        Verb::Rollout(args) => rollout::run(desk, args).await,
        Verb::Simulate(args) => simulate::run(desk, &args),
        Verb::Completions(args) => completions::run(&args),
        Verb::Man(args) => man::run(&args),
    }
}

/// Prints to stdout. A reader that has enough is no error.
fn say(text: &str) -> Result<(), Problem> {
    let mut out = std::io::stdout().lock();
    let printed = out
        .write_all(text.as_bytes())
        .and_then(|()| {
            if text.ends_with('\n') {
                Ok(())
            } else {
                out.write_all(b"\n")
            }
        })
        .and_then(|()| out.flush());
    match printed {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Problem::new(Code::Failed, format!("cannot print: {e}")))
        }
        _ => Ok(()),
    }
}

/// Prints a value as JSON.
fn say_json<T: serde::Serialize>(value: &T) -> Result<(), Problem> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Problem::new(Code::Failed, e.to_string()))?;
    say(&text)
}

/// A problem of this machine's files.
fn io_problem(what: impl std::fmt::Display, error: &std::io::Error) -> Problem {
    Problem::new(Code::Failed, format!("cannot {what}: {error}"))
}

/// A name as a part of a path: what can't be one names nothing either.
fn path_part(name: &str) -> Result<&str, Problem> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._+-".contains(&b);
    if !name.is_empty() && name.bytes().all(plain) {
        return Ok(name);
    }
    Err(Problem::new(
        Code::NotFound,
        format!("nothing is called {name:?}: names have a-z A-Z 0-9 . _ + - only"),
    ))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Args::command().debug_assert();
    }
}

//! `stillpoint swap vmm`; `stillpoint swap host` is in [`super::host`].

use std::process::ExitCode;
use std::time::{Duration, Instant};

use hyper::Method;
use indicatif::ProgressBar;
use stillpoint_control::clock::Policy;

use super::{Desk, format, http, progress, report, say, say_json};
use crate::api::NewSwap;
use crate::model::{Code, Event, PauseState, Problem, SwapId, SwapRecord, SwapState, VMM};

/// How long to wait for an event before looking at the record itself.
const LOOK: Duration = Duration::from_secs(1);
/// How long a daemon may stay away before the command stops waiting for it.
const DAEMON_PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    component: Component,
}

#[derive(Debug, clap::Subcommand)]
enum Component {
    /// The process that runs a guest. Exits 0 when the successor runs it, 1 when it stayed.
    Vmm(VmmArgs),
    /// Anything else of this host: its guests stand still in their places while a command changes it.
    /// Exits 0 when the command did, within the budget.
    Host(super::host::SwapArgs),
}

#[derive(Debug, clap::Args)]
struct VmmArgs {
    /// Name of the guest.
    name: String,
    /// Version of the release to swap to.
    #[arg(long, value_name = "VERSION")]
    to: String,
    /// The longest blackout allowed, such as 500ms [the guest's own].
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    budget: Option<Duration>,
    /// What the guest's clocks make of the pause: advance (they include it) or hold (they leave
    /// it out, and its wall clock is corrected afterwards) [the guest's own].
    #[arg(long, value_name = "POLICY")]
    clock: Option<Policy>,
    /// How long before the pause the guest hears of it, such as 15min; it may approve sooner [the
    /// guest's own, if it listens].
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    notice: Option<Duration>,
    /// Pause the guest without notice, for this reason, which is recorded.
    #[arg(long, value_name = "REASON", conflicts_with = "notice")]
    no_notice: Option<String>,
    /// Swap to a release below the pinned minimum (`stillpoint release pin`).
    #[arg(long)]
    allow_downgrade: bool,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    let args = match args.component {
        Component::Host(args) => return super::host::swap(desk, args).await,
        Component::Vmm(args) => args,
    };
    let VmmArgs {
        name,
        to,
        budget,
        clock,
        notice,
        no_notice,
        allow_downgrade,
    } = args;
    let name = super::path_part(&name)?;
    // Listening first: nothing is missed between the request and the stream.
    let events = desk.api.events().await?;
    let new = NewSwap {
        component: VMM.into(),
        to: to.clone(),
        budget_ns: budget.map(format::whole_ns),
        notice_ns: notice.map(format::whole_ns),
        no_notice,
        clock,
        allow_downgrade,
    };
    let path = format!("/v1/vms/{name}/swaps");
    let asked: SwapRecord = desk.api.send(Method::POST, &path, &new).await?;
    let bar = progress::waiting(desk.json, &format!("swapping {name} to {to}"));
    let swap = follow(desk, &asked.id, events, &bar).await;
    bar.finish_and_clear();
    let swap = swap?;
    if desk.json {
        say_json(&swap)?;
    } else {
        say(&report::summary(&swap))?;
    }
    Ok(match swap.state {
        SwapState::Moved => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// Follows a swap to its end.
async fn follow(
    desk: &Desk,
    id: &SwapId,
    mut events: http::Events,
    bar: &ProgressBar,
) -> Result<SwapRecord, Problem> {
    let mut seen = Instant::now();
    loop {
        match tokio::time::timeout(LOOK, events.next()).await {
            Ok(Some(event)) => {
                if !tell(&event, id, bar) {
                    continue;
                }
            }
            Ok(None) => tokio::time::sleep(LOOK).await,
            Err(_) => {}
        }
        match desk.api.get::<SwapRecord>(&format!("/v1/swaps/{id}")).await {
            Ok(swap) if swap.state.is_over() || swap.state == SwapState::InDoubt => {
                return Ok(swap);
            }
            // The daemon was restarted: the swap goes on without it, and it settles the record.
            Err(problem) if problem.code == Code::NoDaemon && seen.elapsed() < DAEMON_PATIENCE => {
                bar.set_message(format!("swap {id}: waiting for the daemon to come back"));
            }
            Err(problem) => return Err(problem),
            Ok(_) => seen = Instant::now(),
        }
    }
}

/// Shows an event of this swap; whether the swap may be over.
fn tell(event: &Event, id: &SwapId, bar: &ProgressBar) -> bool {
    match event {
        Event::Phase { swap, phase, .. } if swap == id => {
            bar.println(format!(
                "  {:<12} {}",
                phase.name,
                format::time(phase.duration)
            ));
            false
        }
        Event::Notice {
            swap,
            notice,
            state: PauseState::Scheduled,
            not_before_unix_s,
            approved: false,
            ..
        } if swap == id => {
            bar.println(format!(
                "  announced as event {notice}: starts {} unless it is approved or cancelled",
                format::until(*not_before_unix_s)
            ));
            false
        }
        Event::Swap {
            swap, state, step, ..
        } if swap == id => {
            bar.set_message(format!("swap {id}: {step}"));
            state.is_over() || *state == SwapState::InDoubt
        }
        _ => false,
    }
}

//! `stillpoint swap vmm`; `stillpoint swap host` and `swap kvm` are in [`super::host`], `swap kernel` in
//! [`super::kernel`].

mod all;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use hyper::Method;
use indicatif::ProgressBar;
use stillpoint_control::clock::Policy;

use super::{Desk, format, http, progress, report, safeguards, say, say_json};
use crate::api::{NewCheck, NewSwap};
use crate::model::{
    Code, Event, HealthState, PauseState, Preflight, Problem, SwapId, SwapRecord, SwapState, VMM,
};

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
    /// KVM's modules: all guests stand still without a machine, the modules are exchanged, and the
    /// guests are rebuilt. Exits 0 when they run on the new modules.
    Kvm(super::host::KvmArgs),
    /// Anything else of this host: its guests stand still in their places while a command changes it.
    /// Exits 0 when the command did, within the budget.
    Host(super::host::SwapArgs),
    /// The kernel of this host, by kexec: its guests are stored beside their RAM, in memory that no kernel
    /// counts as its own, and go on under the other kernel.
    Kernel(super::kernel::SwapArgs),
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Whom {
    /// Name of the guest.
    name: Option<String>,
    /// Every guest of this host that the release does not run yet; as many at once as the host has cores for.
    #[arg(long)]
    all: bool,
}

#[derive(Debug, clap::Args)]
struct VmmArgs {
    #[command(flatten)]
    whom: Whom,
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
    /// Only say whether the swap would work. The guest stands still for a moment, while its state is
    /// saved for a rehearsal; nothing is changed. Exits 0 if it would.
    #[arg(long)]
    check: bool,
    /// As --check --no-peek: only say whether the swap would work, as far as that can be told while the guest runs on.
    #[arg(long, conflicts_with_all = ["check", "no_rehearsal"])]
    dry_run: bool,
    /// With --check: leave out the rehearsal of the guest's state, and so the moment.
    #[arg(long, requires = "check")]
    no_peek: bool,
    /// Swap without a rehearsal before it.
    #[arg(long, conflicts_with = "check")]
    no_rehearsal: bool,
    /// For how long the guest is watched afterwards; 0s for not at all [the guest's own].
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    watch: Option<Duration>,
    /// Leave a guest that isn't well afterwards where it is, and only say so.
    #[arg(long)]
    no_way_back: bool,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    let args = match args.component {
        Component::Host(args) => return super::host::swap(desk, args).await,
        Component::Kvm(args) => return super::host::swap_kvm(desk, args).await,
        Component::Kernel(args) => return super::kernel::swap(desk, args).await,
        Component::Vmm(args) => args,
    };
    let VmmArgs {
        whom,
        to,
        budget,
        clock,
        notice,
        no_notice,
        allow_downgrade,
        check,
        dry_run,
        no_peek,
        no_rehearsal,
        watch,
        no_way_back,
    } = args;
    let (check, no_peek) = (check || dry_run, no_peek || dry_run);
    let new = NewSwap {
        component: VMM.into(),
        to: to.clone(),
        budget_ns: budget.map(format::whole_ns),
        notice_ns: notice.map(format::whole_ns),
        no_notice,
        rehearse: no_rehearsal.then_some(false),
        watch_ns: watch.map(format::whole_ns),
        way_back: no_way_back.then_some(false),
        clock,
        allow_downgrade,
    };
    let Some(name) = whom.name else {
        return match check {
            true => all::look(desk, new, !no_peek).await,
            false => all::swap(desk, new).await,
        };
    };
    let name = super::path_part(&name)?;
    if check {
        return look(desk, name, new, !no_peek).await;
    }
    // Listening first: nothing is missed between the request and the stream.
    let events = desk.api.events().await?;
    let path = format!("/v1/vms/{name}/swaps");
    let asked: SwapRecord = desk.api.send(Method::POST, &path, &new).await?;
    let bar = progress::waiting(desk.json, &format!("swapping {name} to {to}"));
    let swap = follow(desk, &asked.id, events, &bar).await;
    bar.finish_and_clear();
    let swap = swap?;
    let back = report::way_back(desk, &swap).await?;
    if desk.json {
        say_json(&report::with_way_back(&swap, back.as_ref()))?;
    } else {
        say(&report::summary(&swap))?;
        if let Some(back) = &back {
            say(&report::summary(back))?;
        }
    }
    Ok(match is_good(&swap) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Whether the successor runs the guest, and nothing is wrong with it so far.
fn is_good(swap: &SwapRecord) -> bool {
    let health = swap.safeguards.health.as_ref().map(|health| health.state);
    swap.state == SwapState::Moved && health != Some(HealthState::Unwell)
}

/// Says whether the swap would work.
async fn look(desk: &Desk, name: &str, swap: NewSwap, peek: bool) -> Result<ExitCode, Problem> {
    let bar = progress::waiting(
        desk.json,
        &format!("looking at a swap of {name} to {}", swap.to),
    );
    let found = check(desk, name, swap, peek).await;
    bar.finish_and_clear();
    let found = found?;
    if desk.json {
        say_json(&found)?;
    } else {
        say(&safeguards::of_preflight(&found))?;
    }
    Ok(match found.would_work {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Asks the daemon whether it would.
async fn check(desk: &Desk, name: &str, swap: NewSwap, peek: bool) -> Result<Preflight, Problem> {
    let new = NewCheck {
        swap,
        peek: Some(peek),
    };
    let path = format!("/v1/vms/{name}/checks");
    desk.api.send(Method::POST, &path, &new).await
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
            Ok(swap) if is_told(desk, &swap).await? => return Ok(swap),
            // The daemon was restarted: the swap goes on without it, and it settles the record.
            Err(problem) if problem.code == Code::NoDaemon && seen.elapsed() < DAEMON_PATIENCE => {
                bar.set_message(format!("swap {id}: waiting for the daemon to come back"));
            }
            Err(problem) => return Err(problem),
            Ok(_) => seen = Instant::now(),
        }
    }
}

/// Whether all is known of it that is waited for: how it ended, and, of a guest that moved, that it
/// was seen to be well, or was put back. What comes of the rest of the watch is in the record.
async fn is_told(desk: &Desk, swap: &SwapRecord) -> Result<bool, Problem> {
    let health = swap.safeguards.health.as_ref().map(|health| health.state);
    match (swap.state, health) {
        (SwapState::InDoubt, _) => Ok(true),
        (SwapState::Moved, Some(HealthState::Watching)) => Ok(false),
        (SwapState::Moved, Some(HealthState::Unwell)) => {
            let back = report::way_back(desk, swap).await?;
            Ok(back.is_none_or(|back| back.state.is_over()))
        }
        (state, _) => Ok(state.is_over()),
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

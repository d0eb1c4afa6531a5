//! `stillpoint swap vmm --all`: every guest of the host, as many at once as it has cores for.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hyper::Method;
use indicatif::ProgressBar;
use serde::Serialize;

use super::{DAEMON_PATIENCE, check, is_good, is_told};
use crate::api::{AskedAll, LeftOut, NewSwap, VmView};
use crate::cli::{Desk, format, progress, report, say, say_json};
use crate::doctor::Status;
use crate::model::{Code, Preflight, Problem, SwapId, SwapRecord, SwapState, VmName};

/// Between two looks at those that are not over.
const LOOK: Duration = Duration::from_millis(200);

/// What became of all.
#[derive(Debug, Serialize)]
struct Told {
    /// Each swap as it ended, with its report; in the order in which they were asked for.
    swaps: Vec<SwapRecord>,
    /// Guests that the release ran already.
    already: Vec<VmName>,
    /// Guests that could not be swapped as they were.
    left_out: Vec<LeftOut>,
    /// From the request to the end of the last, ns.
    took_ns: u64,
}

pub(super) async fn swap(desk: &Desk, new: NewSwap) -> Result<ExitCode, Problem> {
    let began = Instant::now();
    let to = new.to.clone();
    let asked: AskedAll = desk.api.send(Method::POST, "/v1/swaps", &new).await?;
    let swaps = follow(desk, &asked.asked, &to).await?;
    let told = Told {
        swaps,
        already: asked.already,
        left_out: asked.left_out,
        took_ns: format::whole_ns(began.elapsed()),
    };
    if desk.json {
        say_json(&told)?;
    } else {
        say(&text(&told, &to))?;
    }
    let good = told.left_out.is_empty() && told.swaps.iter().all(is_good);
    Ok(match good {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Whether each would work; one after another, as each takes the cores that a swap would.
pub(super) async fn look(desk: &Desk, new: NewSwap, peek: bool) -> Result<ExitCode, Problem> {
    let vms: Vec<VmView> = desk.api.get("/v1/vms").await?;
    let concerned = |vm: &VmView| vm.state.is_active() && vm.release != new.to;
    let names: Vec<VmName> = vms
        .into_iter()
        .filter(concerned)
        .map(|vm| vm.name)
        .collect();
    let bar = progress::counting(desk.json, names.len());
    let (mut found, mut left_out) = (Vec::new(), Vec::new());
    for name in names {
        bar.set_message(format!("looking at a swap of {name} to {}", new.to));
        match check(desk, name.as_str(), new.clone(), peek).await {
            Ok(preflight) => found.push(preflight),
            Err(problem) if problem.code == Code::NoDaemon => return Err(problem),
            Err(problem) => left_out.push(LeftOut { vm: name, problem }),
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let good = left_out.is_empty() && found.iter().all(|found| found.would_work);
    if desk.json {
        say_json(&serde_json::json!({ "checks": found, "left_out": left_out }))?;
    } else {
        say(&text_of_checks(&found, &left_out, &new.to))?;
    }
    Ok(match good {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Follows all to their ends.
async fn follow(desk: &Desk, asked: &[SwapRecord], to: &str) -> Result<Vec<SwapRecord>, Problem> {
    let bar = progress::counting(desk.json, asked.len());
    bar.set_message(format!("swapping all guests to {to}"));
    let mut ended: BTreeMap<SwapId, SwapRecord> = BTreeMap::new();
    let mut seen = Instant::now();
    while ended.len() < asked.len() {
        match look_at(desk, asked, &mut ended, &bar).await {
            Ok(()) => seen = Instant::now(),
            // The swaps go on without it, or when it is back.
            Err(problem) if problem.code == Code::NoDaemon && seen.elapsed() < DAEMON_PATIENCE => {
                bar.set_message("waiting for the daemon to come back");
            }
            Err(problem) => return Err(problem),
        }
        tokio::time::sleep(LOOK).await;
    }
    bar.finish_and_clear();
    let in_order = asked.iter().filter_map(|swap| ended.remove(&swap.id));
    Ok(in_order.collect())
}

/// Takes in those that are over.
async fn look_at(
    desk: &Desk,
    asked: &[SwapRecord],
    ended: &mut BTreeMap<SwapId, SwapRecord>,
    bar: &ProgressBar,
) -> Result<(), Problem> {
    let all: Vec<SwapRecord> = desk.api.get("/v1/swaps").await?;
    let all: BTreeMap<SwapId, SwapRecord> = all
        .into_iter()
        .map(|swap| (swap.id.clone(), swap))
        .collect();
    let open = asked.iter().filter_map(|swap| all.get(&swap.id));
    let open: Vec<_> = open.filter(|swap| !ended.contains_key(&swap.id)).collect();
    let going = |swap: &&&SwapRecord| swap.state != SwapState::Wanted;
    if let Some(shown) = open.iter().find(going).or(open.first()) {
        bar.set_message(format!("{}: {}", shown.vm, shown.step));
    }
    for swap in open {
        let id = &swap.id;
        if is_told(desk, swap).await? {
            let whole: SwapRecord = desk.api.get(&format!("/v1/swaps/{id}")).await?;
            if !is_good(&whole) {
                bar.println(report::summary(&whole).trim_end());
            }
            ended.insert(id.clone(), whole);
            bar.set_position(ended.len() as u64);
        }
    }
    Ok(())
}

fn text(told: &Told, to: &str) -> String {
    let mut text = String::new();
    if !told.swaps.is_empty() {
        let rows: Vec<_> = told.swaps.iter().map(row).collect();
        let head = ["VM", "FROM", "", "HOST", "GUEST", "CLOCK", ""];
        text.push_str(&format::table(&head, &[3, 4, 5], &rows));
        text.push('\n');
    }
    text.push_str(&left_out(&told.left_out));
    let good = told.swaps.iter().filter(|swap| is_good(swap)).count();
    let of = told.swaps.len() + told.left_out.len();
    text.push_str(&match of {
        0 => format!("every guest of this host runs {to} already\n"),
        _ => format!(
            "{good} of {of} guests moved to {to} in {}{}\n",
            format::time(Duration::from_nanos(told.took_ns)),
            pauses(&told.swaps)
        ),
    });
    if of > 0 && !told.already.is_empty() {
        text.push_str(&format!("{} ran it already\n", told.already.len()));
    }
    text
}

fn row(swap: &SwapRecord) -> Vec<String> {
    let report = swap.report.as_ref();
    let host = report.map(|report| report.blackout.host);
    let host = host.filter(|host| !host.is_zero()).map(format::time);
    let guest = report.and_then(|report| report.blackout.guest_worst());
    let clock = report.and_then(|report| report.clock.as_ref()?.kvmclock_error_ns);
    let reason = swap.reason.as_deref().unwrap_or_default();
    vec![
        swap.vm.to_string(),
        swap.from.version.clone(),
        swap.state.to_string(),
        host.unwrap_or_else(|| "-".into()),
        guest.map_or_else(|| "-".into(), format::time),
        clock.map_or_else(|| "-".into(), format::signed_time),
        reason.lines().next().unwrap_or_default().to_owned(),
    ]
}

/// The middle and the longest of the pauses.
fn pauses(swaps: &[SwapRecord]) -> String {
    let moved = swaps.iter().filter(|swap| is_good(swap));
    let hosts = moved.filter_map(|swap| Some(swap.report.as_ref()?.blackout.host));
    let mut hosts: Vec<Duration> = hosts.collect();
    hosts.sort_unstable();
    match (hosts.get(hosts.len() / 2), hosts.last()) {
        (Some(&middle), Some(&longest)) => format!(
            "; the host's blackout: median {}, longest {}",
            format::time(middle),
            format::time(longest)
        ),
        _ => String::new(),
    }
}

fn left_out(left_out: &[LeftOut]) -> String {
    let lines = left_out.iter().map(|LeftOut { vm, problem }| {
        let problem = problem.message.replace('\n', "\n  ");
        format!("left out: {vm}: {problem}\n")
    });
    lines.collect()
}

fn text_of_checks(found: &[Preflight], left: &[LeftOut], to: &str) -> String {
    if found.is_empty() && left.is_empty() {
        return format!("every guest of this host runs {to} already\n");
    }
    let row = |found: &Preflight| {
        let bad = found
            .checks
            .iter()
            .find(|check| check.status == Status::Fail);
        vec![
            found.vm.to_string(),
            found.from.version.clone(),
            match found.would_work {
                true => "would work".into(),
                false => "would not work".into(),
            },
            format::time(Duration::from_nanos(found.peek_ns)),
            bad.map(|check| format!("{}: {}", check.check, check.found))
                .unwrap_or_default(),
        ]
    };
    let rows: Vec<_> = found.iter().map(row).collect();
    let table = format::table(&["VM", "FROM", "", "PEEK", ""], &[3], &rows);
    format!("{table}{}", left_out(left))
}

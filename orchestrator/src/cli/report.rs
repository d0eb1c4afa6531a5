//! `stillpoint report`

mod clock;
mod recovery;
#[cfg(test)]
mod tests;

use std::process::ExitCode;
use std::time::Duration;

use stillpoint_control::report::{Phase, Side, SwapReport};

use super::{Desk, format, safeguards, say, say_json};
use crate::model::{Code, HOST, Problem, SwapRecord, SwapState};

/// Cells of the longest bar.
const BAR: u128 = 24;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Id of a swap, or name of a guest (its last swap); without it, a list of all swaps.
    what: Option<String>,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    let Some(what) = args.what else {
        return list(desk).await;
    };
    let what = super::path_part(&what)?;
    let swap = find(desk, what).await?;
    let back = way_back(desk, &swap).await?;
    if desk.json {
        say_json(&with_way_back(&swap, back.as_ref()))?;
    } else {
        say(&text(&swap))?;
        if let Some(back) = back {
            say(&format!("\n{}", text(&back)))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The swap by which this one's guest was put back, if it was.
pub(super) async fn way_back(
    desk: &Desk,
    swap: &SwapRecord,
) -> Result<Option<SwapRecord>, Problem> {
    match &swap.safeguards.put_back_by {
        Some(back) => desk.api.get(&format!("/v1/swaps/{back}")).await.map(Some),
        None => Ok(None),
    }
}

/// A swap for programs, its way back beside its own fields as `put_back`.
pub(super) fn with_way_back(swap: &SwapRecord, back: Option<&SwapRecord>) -> serde_json::Value {
    let mut value = serde_json::to_value(swap).unwrap_or_default();
    if let (Some(back), Some(fields)) = (back, value.as_object_mut()) {
        fields.insert(
            "put_back".into(),
            serde_json::to_value(back).unwrap_or_default(),
        );
    }
    value
}

async fn find(desk: &Desk, what: &str) -> Result<SwapRecord, Problem> {
    let by_id = desk.api.get(&format!("/v1/swaps/{what}")).await;
    match by_id {
        Err(problem) if problem.code == Code::NotFound => {}
        other => return other,
    }
    let of_vm: Result<Vec<SwapRecord>, Problem> =
        desk.api.get(&format!("/v1/vms/{what}/swaps")).await;
    let last = match of_vm {
        Ok(mut swaps) => swaps.pop(),
        Err(problem) if problem.code == Code::NotFound => {
            let message = format!(
                "no swap and no guest is called `{what}`; `stillpoint report` lists all swaps"
            );
            return Err(Problem::new(Code::NotFound, message));
        }
        Err(problem) => return Err(problem),
    };
    let Some(last) = last else {
        let message = format!("`{what}` was never swapped; `stillpoint swap vmm {what} --to V`");
        return Err(Problem::new(Code::NotFound, message));
    };
    desk.api.get(&format!("/v1/swaps/{}", last.id)).await
}

async fn list(desk: &Desk) -> Result<ExitCode, Problem> {
    let swaps: Vec<SwapRecord> = desk.api.get("/v1/swaps").await?;
    if desk.json {
        say_json(&swaps)?;
        return Ok(ExitCode::SUCCESS);
    }
    if swaps.is_empty() {
        say("no swaps yet")?;
        return Ok(ExitCode::SUCCESS);
    }
    let row = |swap: &SwapRecord| {
        vec![
            swap.id.to_string(),
            swap.vm.to_string(),
            swap.from.version.clone(),
            swap.to.version.clone(),
            swap.state.to_string(),
            format::ago(swap.asked_at_unix_ns),
            first_line(swap.reason.as_deref()),
        ]
    };
    let rows: Vec<_> = swaps.iter().map(row).collect();
    let head = ["SWAP", "VM", "FROM", "TO", "STATE", "ASKED", ""];
    say(&format::table(&head, &[], &rows))?;
    Ok(ExitCode::SUCCESS)
}

fn first_line(text: Option<&str>) -> String {
    text.and_then(|text| text.lines().next())
        .unwrap_or_default()
        .to_owned()
}

/// What a person wants to know when a swap is over.
pub(super) fn summary(swap: &SwapRecord) -> String {
    let (vm, from, to) = (&swap.vm, &swap.from.version, &swap.to.version);
    let mut text = match swap.state {
        SwapState::Moved => format!("{vm} moved from {from} to {to}\n"),
        SwapState::Resumed => format!("{vm} stood still while its host was changed, and runs on\n"),
        SwapState::Kept if swap.component == HOST => format!("{vm} ran on all the time\n"),
        SwapState::Kept => format!("{vm} stayed with {from}; it was not moved to {to}\n"),
        SwapState::Crashed => format!("{vm} crashed in a swap from {from} to {to}\n"),
        state => format!("{vm}: the swap from {from} to {to} is {state}\n"),
    };
    if let Some(reason) = swap.reason.as_deref().filter(|reason| !reason.is_empty()) {
        text.push_str(&format!(
            "  why        {}\n",
            reason.replace('\n', "\n             ")
        ));
    }
    text.push_str(&safeguards::of_swap(swap));
    if let Some(report) = &swap.report {
        text.push_str(&blackout(swap, report));
        text.push_str(&clock::lines(report));
        text.push_str(&recovery::lines(report));
        for warning in &report.warnings {
            text.push_str(&format!("  warning    {warning}\n"));
        }
    }
    text
}

fn blackout(swap: &SwapRecord, report: &SwapReport) -> String {
    let host = format::time(report.blackout.host);
    let guest = match report.blackout.guest_worst() {
        Some(worst) => format!(
            "guest {} (worst of {} vCPUs)",
            format::time(worst),
            report.vcpus
        ),
        None => "guest not measured".into(),
    };
    let budget = format::time(report.budget);
    match (swap.state, report.blackout.host.is_zero()) {
        (SwapState::Kept, true) if safeguards::has_peeked(swap) => {
            "  blackout   none: the guest stood still for the rehearsal alone\n".into()
        }
        (SwapState::Kept, true) => "  blackout   none: the guest never stood still\n".into(),
        (SwapState::Kept, false) => {
            format!("  blackout   host {host}, in vain; budget {budget}\n")
        }
        _ => {
            let waits = waits(report).unwrap_or_default();
            format!("  blackout   host {host}, {guest}; budget {budget}\n{waits}")
        }
    }
}

/// What a vCPU waited for a core, where that is a good part of its pause: then the host is short of cores, not the swap slow.
fn waits(report: &SwapReport) -> Option<String> {
    let waited = report.blackout.vcpus.iter().map(|vcpu| vcpu.queued).max()?;
    let longest = report.blackout.vcpus.iter().map(|vcpu| vcpu.out).max()?;
    (waited * 10 > longest).then(|| {
        let waited = format::time(waited);
        format!("             a vCPU waited {waited} of it for a core\n")
    })
}

fn text(swap: &SwapRecord) -> String {
    let mut text = format!("swap {}, {}\n", swap.id, format::ago(swap.asked_at_unix_ns));
    text.push_str(&summary(swap));
    let Some(report) = &swap.report else {
        return text;
    };
    text.push_str(&format!(
        "  guest      {} vCPUs, {}; saved state {} bytes, format {}\n",
        report.vcpus,
        format::size(report.memory_bytes),
        report.state_bytes,
        report.state_format
    ));
    if !report.phases.is_empty() {
        text.push('\n');
        text.push_str(&phases(&report.phases));
    }
    text
}

/// Bars compare like with like: what the guest waits for, and what it doesn't.
fn phases(phases: &[Phase]) -> String {
    let longest = |in_blackout: bool| {
        let same = phases
            .iter()
            .filter(|phase| phase.in_blackout == in_blackout);
        same.map(|phase| phase.duration)
            .max()
            .unwrap_or(Duration::ZERO)
    };
    let (dark, bright) = (longest(true), longest(false));
    let rows: Vec<Vec<String>> = phases
        .iter()
        .map(|phase| {
            let whole = if phase.in_blackout { dark } else { bright };
            vec![
                phase.name.clone(),
                side(phase.side).to_owned(),
                if phase.in_blackout { "stands" } else { "runs" }.to_owned(),
                format::time(phase.duration),
                format::bar(phase.duration, whole, BAR),
            ]
        })
        .collect();
    format::table(&["PHASE", "WHERE", "GUEST", "TIME", ""], &[3], &rows)
}

fn side(side: Side) -> &'static str {
    match side {
        Side::Predecessor => "predecessor",
        Side::Successor => "successor",
        Side::Agent => "daemon",
    }
}

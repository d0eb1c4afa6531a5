//! `stillpoint swap kernel`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use hyper::Method;

use super::{Desk, format, host, io_problem, progress, say, say_json};
use crate::api::{NewKernelCheck, NewKernelSwap};
use crate::doctor::{Check, Status};
use crate::model::{HostSwap, JumpPhase, KernelJump, Problem, Share};

#[derive(Debug, clap::Args)]
pub(super) struct SwapArgs {
    /// The image of the kernel to jump into.
    #[arg(long, value_name = "IMAGE")]
    kernel: PathBuf,
    /// Its initial RAM disk.
    #[arg(long, value_name = "IMAGE")]
    initrd: Option<PathBuf>,
    /// Its command line [the running kernel's].
    #[arg(long, value_name = "TEXT")]
    command_line: Option<String>,
    /// Its command line is the running kernel's, which is also so when none is given.
    #[arg(long, conflicts_with = "command_line")]
    reuse_cmdline: bool,
    /// The longest the guests stand still, such as 20s. It is kept until the jump; after that a breach is
    /// reported, as nothing can be taken back then.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = format::parse_time)]
    budget: Duration,
    /// How long before the pause the guests hear of it, such as 15min; they may approve sooner [each
    /// one's own, if any listens].
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    notice: Option<Duration>,
    /// Pause the guests without notice, for this reason, which is recorded.
    #[arg(long, value_name = "REASON", conflicts_with = "notice")]
    no_notice: Option<String>,
    /// Only say whether it would work, guest by guest. The kernel is loaded for it, and forgotten again; each guest
    /// stands still for a moment, while its record is made for a rehearsal. Exits 0 if it would.
    #[arg(long)]
    check: bool,
    /// As --check --no-peek: only say whether it would work, as far as that can be told while the guests run on.
    #[arg(long, conflicts_with_all = ["check", "no_rehearsal"])]
    dry_run: bool,
    /// With --check: leave out the rehearsal of the guests' records, and so the moment.
    #[arg(long, requires = "check")]
    no_peek: bool,
    /// Jump without a rehearsal of the guests' revival before it.
    #[arg(long, conflicts_with = "check")]
    no_rehearsal: bool,
}

/// `stillpoint swap kernel`
pub(super) async fn swap(desk: &Desk, args: SwapArgs) -> Result<ExitCode, Problem> {
    let absolute = |path: PathBuf| {
        let made = std::path::absolute(&path);
        made.map_err(|e| io_problem(format_args!("make {} absolute", path.display()), &e))
    };
    let new = NewKernelSwap {
        kernel: absolute(args.kernel)?,
        initrd: args.initrd.map(absolute).transpose()?,
        command_line: args.command_line,
        budget_ns: format::whole_ns(args.budget),
        notice_ns: args.notice.map(format::whole_ns),
        no_notice: args.no_notice,
        rehearse: args.no_rehearsal.then_some(false),
    };
    if args.check || args.dry_run {
        let peek = Some(!(args.no_peek || args.dry_run));
        return check(desk, &NewKernelCheck { swap: new, peek }).await;
    }
    let asked: HostSwap = desk
        .api
        .send(Method::POST, "/v1/host/kernel-swaps", &new)
        .await?;
    // Where the jump takes this command along with everything else, nobody reads what it says.
    host::follow_to_end(desk, &asked).await
}

async fn check(desk: &Desk, new: &NewKernelCheck) -> Result<ExitCode, Problem> {
    let path = "/v1/host/kernel-swaps/check";
    let bar = progress::waiting(desk.json, "looking at a swap of the host's kernel");
    let checks = desk.api.send(Method::POST, path, new).await;
    bar.finish_and_clear();
    let checks: Vec<Check> = checks?;
    let would = checks.iter().all(|check| check.status != Status::Fail);
    if desk.json {
        say_json(&checks)?;
    } else {
        let row = |check: &Check| {
            let found = match check.remedy.as_str() {
                "" => check.found.clone(),
                remedy => format!("{}; {remedy}", check.found),
            };
            vec![check.check.clone(), check.status.to_string(), found]
        };
        let rows: Vec<_> = checks.iter().map(row).collect();
        say(&format::table(&["WHAT", "", "FOUND"], &[], &rows))?;
        say(match would {
            true => "the host's kernel can be swapped, as far as can be told without doing it",
            false => "the host's kernel can't be swapped",
        })?;
    }
    Ok(match would {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// What a jump is, in a line.
pub(super) fn what(jump: &KernelJump) -> String {
    match &jump.to {
        Some(to) => format!("kernel {} to {to}", jump.from),
        None => format!("kernel {} to {}", jump.from, jump.image.display()),
    }
}

/// What of a jump is to be read: (name, value).
pub(super) fn lines(jump: &KernelJump) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    let of = |share: Share| {
        let all = jump.phases.iter();
        all.filter(move |phase| phase.share == share && phase.in_blackout)
            .map(|phase| phase.duration_ns)
            .sum::<u64>()
    };
    let time = |ns| format::time(Duration::from_nanos(ns));
    if !jump.phases.is_empty() {
        let (ours, kernels) = (of(Share::Ours), of(Share::Kernel));
        lines.push((
            "shares".into(),
            format!("ours {}, the kernels' {}", time(ours), time(kernels)),
        ));
    }
    for JumpPhase {
        name,
        in_blackout,
        duration_ns,
        ..
    } in &jump.phases
    {
        let when = match in_blackout {
            true => "",
            false => ", while the guests ran",
        };
        lines.push((format!("  {name}"), format!("{}{when}", time(*duration_ns))));
    }
    if let Some(clock) = &jump.clock {
        let text = match (&clock.problem, clock.off_ns, clock.left_ns) {
            (Some(problem), ..) => format!("not corrected: {problem}"),
            (None, Some(off), left) => format!(
                "was off by {off} ns, is by {} ns",
                left.map_or_else(|| "?".into(), |ns| ns.to_string())
            ),
            _ => "not looked at".into(),
        };
        lines.push(("wall clock".into(), text));
    }
    lines
}

//! `stillpoint swap host`, `stillpoint swap kvm`, and `stillpoint host`

use std::process::ExitCode;
use std::time::{Duration, Instant};

use hyper::Method;
use indicatif::ProgressBar;

use super::dry::{self, Dry};
use super::{Desk, format, progress, say, say_json};
use crate::api::{NewHostSwap, NewKvm};
use crate::model::{Code, HostSwap, HostSwapState, KvmCheck, KvmSwap, Problem};

/// Where kernels have their modules.
const MODULES: &str = "/lib/modules";
/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(50);
/// How long a daemon may stay away before the command stops waiting for it.
const DAEMON_PATIENCE: Duration = Duration::from_secs(60);

/// What all ways of standing still have in common.
#[derive(Debug, clap::Args)]
pub(super) struct Terms {
    /// The longest a guest stands still, such as 10s, and at most 30s.
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    budget: Duration,
    /// How long before the pause the guests hear of it, such as 15min; they may approve sooner [each
    /// one's own, if any listens].
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    notice: Option<Duration>,
    /// Pause the guests without notice, for this reason, which is recorded.
    #[arg(long, value_name = "REASON", conflicts_with = "notice")]
    no_notice: Option<String>,
}

/// Of a pause in which guests keep their machines.
#[derive(Debug, clap::Args)]
pub(super) struct InPlace {
    /// A guest that is to stand still; may be given more than once [all that run].
    #[arg(long = "vm", value_name = "NAME")]
    vms: Vec<String>,
    /// What a shell runs, once the guests run again, when it failed or the budget ended.
    #[arg(long, value_name = "COMMAND")]
    undo: Option<String>,
    #[command(flatten)]
    terms: Terms,
    #[command(flatten)]
    dry: Dry,
}

#[derive(Debug, clap::Args)]
pub(super) struct KvmArgs {
    /// The folder with the modules to load, kvm.ko and the vendor's; or a name below /lib/modules [the same
    /// files again].
    #[arg(long, value_name = "DIR|VERSION")]
    to: Option<std::path::PathBuf>,
    /// A parameter that is to be another than now, such as kvm_amd.nested=0; may be given more than once.
    #[arg(long = "parameter", value_name = "MODULE.NAME=VALUE")]
    parameters: Vec<String>,
    /// Only say whether it would work; nothing is touched. Exits 0 if it would.
    #[arg(long, visible_alias = "dry-run", conflicts_with_all = ["undo", "command"])]
    check: bool,
    /// What a shell runs when COMMAND failed, before the guests come back.
    #[arg(long, value_name = "COMMAND", requires = "command")]
    undo: Option<String>,
    #[command(flatten)]
    terms: Terms,
    /// Instead of exchanging the modules: the command that does it, after `--`.
    #[arg(last = true, value_name = "COMMAND", conflicts_with_all = ["to", "parameters"])]
    command: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct SwapArgs {
    #[command(flatten)]
    terms: InPlace,
    /// The command, after `--`; the daemon runs it, as its own user.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    act: Act,
}

#[derive(Debug, clap::Subcommand)]
enum Act {
    /// Has guests stand still until they are released, and no longer than the budget.
    Hold(InPlace),
    /// Lets guests run on that are held.
    Release {
        /// The hold's id [the one there is].
        id: Option<String>,
    },
    /// Says what this host lacks for its kernel to be swapped under its guests, and shows the boot
    /// configuration for it; writes it when asked to.
    Prepare(super::prepare::Args),
    /// Lists the hosts of the fleet.
    Ls,
    /// Has a host left alone: no rollout begins anything there, and no guest is started there.
    Cordon(super::hosts::CordonArgs),
    /// Ends a cordon.
    Uncordon {
        /// The host [this one].
        name: Option<String>,
        #[command(flatten)]
        dry: Dry,
    },
    /// Cordons a host and says what runs there. Guests are not moved to other hosts: with --stop those of
    /// this host are ended, otherwise they run on.
    Drain(super::hosts::DrainArgs),
    /// Forgets a host that is no more, with its guests.
    Forget {
        /// The host.
        name: String,
        #[command(flatten)]
        dry: Dry,
    },
    /// Lists what was done to this host while its guests stood still.
    Changes,
    /// Shows one of them, with what its command printed.
    Show {
        /// Its id.
        id: String,
    },
}

impl InPlace {
    async fn would(&self, desk: &Desk, meanwhile: &str) -> Result<ExitCode, Problem> {
        let names = dry::running(desk, &self.vms).await?;
        let budget = format::time(self.terms.budget);
        dry::would(
            desk,
            &format!("{names} would stand still {meanwhile}, and for {budget} at the longest"),
        )
    }

    fn with(self, command: Vec<String>) -> NewHostSwap {
        NewHostSwap {
            command,
            undo: self.undo,
            vms: self.vms,
            ..self.terms.ask()
        }
    }
}

impl Terms {
    fn ask(self) -> NewHostSwap {
        NewHostSwap {
            budget_ns: format::whole_ns(self.budget),
            notice_ns: self.notice.map(format::whole_ns),
            no_notice: self.no_notice,
            ..NewHostSwap::default()
        }
    }
}

/// `stillpoint swap host`
pub(super) async fn swap(desk: &Desk, args: SwapArgs) -> Result<ExitCode, Problem> {
    if args.terms.dry.dry_run {
        let command = args.command.join(" ");
        return args
            .terms
            .would(desk, &format!("while `{command}` is run"))
            .await;
    }
    let new = args.terms.with(args.command);
    let swap = ask(desk, &new, HostSwapState::is_over).await?;
    show(desk, &swap)
}

/// `stillpoint swap kvm`
pub(super) async fn swap_kvm(desk: &Desk, args: KvmArgs) -> Result<ExitCode, Problem> {
    let to = match args.to {
        Some(folder) => Some(absolute(&folder_of(folder, std::path::Path::new(MODULES)))?),
        None => None,
    };
    let kvm = NewKvm {
        to,
        parameters: args.parameters,
    };
    if args.check {
        return check_kvm(desk, &kvm).await;
    }
    let new = NewHostSwap {
        kvm: Some(kvm),
        command: args.command,
        undo: args.undo,
        ..args.terms.ask()
    };
    let swap = ask(desk, &new, HostSwapState::is_over).await?;
    show(desk, &swap)
}

/// A bare word is a version, where the kernel's modules of it have a folder; anything else is a path.
fn folder_of(given: std::path::PathBuf, modules: &std::path::Path) -> std::path::PathBuf {
    let version = modules.join(&given);
    match given.components().count() == 1 && !given.exists() && version.is_dir() {
        true => version,
        false => given,
    }
}

/// The daemon has another working directory.
fn absolute(folder: &std::path::Path) -> Result<String, Problem> {
    let path = std::path::absolute(folder).map_err(|error| {
        let message = format!("{}: {error}", folder.display());
        Problem::new(Code::BadRequest, message)
    })?;
    Ok(path.display().to_string())
}

async fn check_kvm(desk: &Desk, kvm: &NewKvm) -> Result<ExitCode, Problem> {
    let path = "/v1/host/kvm/checks";
    let check: KvmCheck = desk.api.send(Method::POST, path, kvm).await?;
    if desk.json {
        say_json(&check)?;
    } else {
        say(&check_text(&check))?;
    }
    Ok(match check.problems.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn check_text(check: &KvmCheck) -> String {
    let mut text = match check.problems.is_empty() {
        true => "KVM's modules can be exchanged\n".to_owned(),
        false => "KVM's modules can't be exchanged now\n".to_owned(),
    };
    for problem in &check.problems {
        text.push_str(&format!("  problem    {problem}\n"));
    }
    for module in check.swap.iter().flat_map(|swap| &swap.to) {
        text.push_str(&format!("  load       {}\n", module.file));
    }
    text.push_str(&format!("  guests     {}\n", check.vms.join(", ")));
    text
}

/// `stillpoint host`
pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    match args.act {
        Act::Hold(terms) => hold(desk, terms).await,
        Act::Release { id } => release(desk, id).await,
        Act::Prepare(args) => super::prepare::run(desk, &args),
        Act::Ls => super::hosts::ls(desk).await,
        Act::Cordon(args) => super::hosts::cordon(desk, args).await,
        Act::Uncordon { name, dry } => super::hosts::uncordon(desk, name, dry).await,
        Act::Forget { name, dry } => super::hosts::forget(desk, &name, dry).await,
        Act::Drain(args) => super::hosts::drain(desk, args).await,
        Act::Changes => changes(desk).await,
        Act::Show { id } => show(desk, &get(desk, &id).await?),
    }
}

async fn get(desk: &Desk, id: &str) -> Result<HostSwap, Problem> {
    let path = format!("/v1/host/swaps/{}", super::path_part(id)?);
    desk.api.get(&path).await
}

/// Asks for one, and waits until it is as far as that.
async fn ask(
    desk: &Desk,
    new: &NewHostSwap,
    is_far: impl Fn(HostSwapState) -> bool,
) -> Result<HostSwap, Problem> {
    let asked: HostSwap = desk.api.send(Method::POST, "/v1/host/swaps", new).await?;
    let bar = progress::waiting(desk.json, &format!("swap {} of this host", asked.id));
    let swap = follow(desk, &asked, &bar, is_far).await;
    bar.finish_and_clear();
    swap
}

/// Waits until one is over that was asked for, and shows it.
pub(super) async fn follow_to_end(desk: &Desk, asked: &HostSwap) -> Result<ExitCode, Problem> {
    let bar = progress::waiting(desk.json, &format!("swap {} of this host", asked.id));
    let swap = follow(desk, asked, &bar, HostSwapState::is_over).await;
    bar.finish_and_clear();
    show(desk, &swap?)
}

async fn follow(
    desk: &Desk,
    asked: &HostSwap,
    bar: &ProgressBar,
    is_far: impl Fn(HostSwapState) -> bool,
) -> Result<HostSwap, Problem> {
    let mut seen = Instant::now();
    loop {
        match get(desk, &asked.id.0).await {
            Ok(swap) if swap.state.is_over() || is_far(swap.state) => return Ok(swap),
            Ok(swap) => {
                seen = Instant::now();
                bar.set_message(format!("{}: {}", swap.id, swap.step));
            }
            // The daemon was restarted: the guests run on by themselves, and it settles the record.
            Err(problem) if problem.code == Code::NoDaemon && seen.elapsed() < DAEMON_PATIENCE => {
                bar.set_message("waiting for the daemon to come back");
            }
            Err(problem) => return Err(problem),
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn hold(desk: &Desk, terms: InPlace) -> Result<ExitCode, Problem> {
    if terms.dry.dry_run {
        return terms.would(desk, "until they are released").await;
    }
    let budget = terms.terms.budget;
    let new = terms.with(Vec::new());
    let swap = ask(desk, &new, |state| state == HostSwapState::InProgress).await?;
    if swap.state != HostSwapState::InProgress {
        return show(desk, &swap);
    }
    if desk.json {
        say_json(&swap)?;
    } else {
        say(&format!(
            "{} stand still, for {} at the longest; `stillpoint host release {}` lets them go",
            swap.guests(),
            format::time(budget),
            swap.id
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn release(desk: &Desk, id: Option<String>) -> Result<ExitCode, Problem> {
    let id = match id {
        Some(id) => id,
        None => the_hold(desk).await?,
    };
    let path = format!("/v1/host/swaps/{}/release", super::path_part(&id)?);
    let asked: HostSwap = desk.api.send(Method::POST, &path, &()).await?;
    let bar = progress::waiting(desk.json, "letting the guests go");
    let swap = follow(desk, &asked, &bar, HostSwapState::is_over).await;
    bar.finish_and_clear();
    show(desk, &swap?)
}

async fn the_hold(desk: &Desk) -> Result<String, Problem> {
    let swaps: Vec<HostSwap> = desk.api.get("/v1/host/swaps").await?;
    let mut held = swaps
        .iter()
        .filter(|swap| swap.is_by_hand() && !swap.state.is_over());
    held.next().map(|swap| swap.id.to_string()).ok_or_else(|| {
        let message = "no guests are held; `stillpoint host changes` lists what was".to_owned();
        Problem::new(Code::NotFound, message)
    })
}

async fn changes(desk: &Desk) -> Result<ExitCode, Problem> {
    let swaps: Vec<HostSwap> = desk.api.get("/v1/host/swaps").await?;
    if desk.json {
        say_json(&swaps)?;
        return Ok(ExitCode::SUCCESS);
    }
    if swaps.is_empty() {
        say("nothing was done to this host while its guests stood still")?;
        return Ok(ExitCode::SUCCESS);
    }
    let row = |swap: &HostSwap| {
        vec![
            swap.id.to_string(),
            swap.state.to_string(),
            format::ago(swap.asked_at_unix_ns),
            swap.pause_ns
                .map_or_else(|| "-".into(), |ns| format::time(Duration::from_nanos(ns))),
            swap.vms.len().to_string(),
            what(swap),
        ]
    };
    let rows: Vec<_> = swaps.iter().map(row).collect();
    let head = ["SWAP", "STATE", "ASKED", "PAUSE", "GUESTS", "WHAT"];
    say(&format::table(&head, &[3, 4], &rows))?;
    Ok(ExitCode::SUCCESS)
}

fn what(swap: &HostSwap) -> String {
    if let Some(jump) = &swap.kernel {
        return super::kernel::what(jump);
    }
    let command = swap.command.join(" ");
    match (&swap.kvm, command.is_empty()) {
        (None, true) => "by hand".into(),
        (None, false) => command,
        (Some(_), false) => format!("KVM, by {command}"),
        (Some(kvm), true) => format!("KVM: {}", files(kvm)),
    }
}

fn files(kvm: &KvmSwap) -> String {
    let files: Vec<_> = kvm.to.iter().map(|module| module.file.as_str()).collect();
    files.join(", ")
}

fn show(desk: &Desk, swap: &HostSwap) -> Result<ExitCode, Problem> {
    if desk.json {
        say_json(swap)?;
    } else {
        say(&text(swap))?;
    }
    Ok(match swap.state {
        HostSwapState::Failed | HostSwapState::Refused => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    })
}

fn text(swap: &HostSwap) -> String {
    let mut text = format!(
        "swap {} of this host is {}: {}\n",
        swap.id,
        swap.state,
        what(swap)
    );
    let mut line = |name: &str, value: String| {
        let value = value.trim_end().replace('\n', "\n             ");
        text.push_str(&format!("  {name:<10} {value}\n"));
    };
    if let Some(reason) = &swap.reason {
        line("why", reason.clone());
    }
    line("guests", swap.guests());
    let budget = format::time(Duration::from_nanos(swap.budget_ns));
    match swap.pause_ns {
        Some(ns) => line(
            "pause",
            format!(
                "{} at the longest; budget {budget}",
                format::time(Duration::from_nanos(ns))
            ),
        ),
        None => line("pause", format!("none; budget {budget}")),
    }
    for (name, value) in swap.kernel.iter().flat_map(super::kernel::lines) {
        line(&name, value);
    }
    if let Some(ended) = &swap.ended {
        line("command", ended.to_string());
    }
    if let (Some(undo), Some(undone)) = (&swap.undo, &swap.undone) {
        line("undo", format!("{undo}: {undone}"));
    }
    if !swap.output.is_empty() {
        line("printed", swap.output.clone());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{CommandEnd, SwapId, VmName};

    fn name(text: &str) -> VmName {
        VmName::try_from(text.to_owned()).expect("a name")
    }

    #[test]
    fn a_version_is_a_folder_of_the_kernels_modules() {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(dir.path().join("6.1.0-99")).expect("made");
        let of = |given: &str| folder_of(given.into(), dir.path());
        assert_eq!(of("6.1.0-99"), dir.path().join("6.1.0-99"));
        for path in ["/opt/kvm", "./6.1.0-99", "6.1.0-98", "/"] {
            assert_eq!(of(path), std::path::Path::new(path));
        }
    }

    #[test]
    fn a_person_reads_what_became_of_it() {
        let swap = HostSwap {
            rollout: None,
            id: SwapId("1".into()),
            kvm: None,
            command: vec!["modprobe".into(), "tg3".into()],
            kernel: None,
            undo: Some("modprobe old".into()),
            vms: [name("a"), name("b")].into(),
            budget_ns: 2_000_000_000,
            notice_ns: None,
            no_notice: None,
            state: HostSwapState::Failed,
            step: "done".into(),
            reason: Some("the command: exit status 3".into()),
            process: None,
            ended: Some(CommandEnd::Exit(3)),
            undone: Some(CommandEnd::Exit(0)),
            output: "no such module\ngiving up\n".into(),
            pause_ns: Some(12_300_000),
            asked_at_unix_ns: 0,
            ended_at_unix_ns: None,
        };
        let expected = "\
swap 1 of this host is failed: modprobe tg3
  why        the command: exit status 3
  guests     a, b
  pause      12.3 ms at the longest; budget 2.00 s
  command    exit status 3
  undo       modprobe old: exit status 0
  printed    no such module
             giving up
";
        assert_eq!(text(&swap), expected);
    }
}

//! `stillpoint rollout`: many swaps, one update domain at a time.

mod policy;
mod tables;
mod watch;

use std::process::ExitCode;

use hyper::Method;

use super::{Desk, format, say, say_json};
use crate::api::{Explained, NewAct};
use crate::fleet::ask::{Act, NewRollout};
use crate::fleet::explain::{RolloutSummary, RolloutView};
use crate::fleet::record::HistoryStep;
use crate::model::{Code, Label, Problem, Rung, labels};
use crate::plan::rollout::State;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Shows what a rollout would do, and does nothing.
    Plan(Box<NewArgs>),
    /// Shows what a rollout will do, starts it, and watches it. Exits 0 if it finishes.
    Start(Box<NewArgs>),
    /// Watches a rollout until it is over or stops. Exits 0 if it finishes.
    Watch {
        /// Its id [the one that goes on].
        id: Option<String>,
    },
    /// Lists rollouts.
    Ls,
    /// Shows a rollout, and why each VM isn't being updated now.
    Show {
        /// Its id [the one that goes on].
        id: Option<String>,
    },
    /// Begins nothing more; what is under way ends.
    Pause(ActArgs),
    /// Lets one go on that was paused or stopped by itself; failures so far are forgiven.
    Resume(ActArgs),
    /// Ends one as soon as nothing is under way. What moved stays where it is.
    Abort {
        #[command(flatten)]
        args: ActArgs,
        /// Put back all that it touched.
        #[arg(long)]
        roll_back: bool,
    },
    /// Shows what was done, step by step, and why.
    History {
        /// Its id [the one that goes on, or the last].
        id: Option<String>,
    },
    /// Says in one sentence why a VM is not being updated now.
    Explain {
        /// The VM: NAME, or HOST/NAME.
        vm: String,
    },
}

#[derive(Debug, clap::Args)]
struct ActArgs {
    /// Its id [the one that goes on].
    id: Option<String>,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, clap::Args)]
struct NewArgs {
    /// Version of the release to roll out.
    #[arg(long, value_name = "VERSION")]
    to: String,
    /// What is swapped: vmm, guest by guest; kvm, the modules of a host under all its guests together; or kernel,
    /// the host's, which has no way back and needs --no-roll-back.
    #[arg(long, value_name = "COMPONENT", default_value_t = Rung::Vmm)]
    component: Rung,
    /// Of a component that takes a whole host: the longest that its guests stand still, such as 10s, and at most 30s.
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    budget: Option<std::time::Duration>,
    /// Only VMs of this availability set, or hosts that run any; may be given again [all].
    #[arg(long = "set", value_name = "NAME")]
    sets: Vec<String>,
    /// Only VMs on this host; may be given again [all].
    #[arg(long = "host", value_name = "NAME")]
    hosts: Vec<String>,
    /// Only VMs on hosts that have this label (`stillpointd --label`); may be given again, and each counts [all].
    #[arg(long = "label", value_name = "NAME=VALUE")]
    labels: Vec<Label>,
    /// Only this VM, as NAME or HOST/NAME; may be given again [all].
    #[arg(long = "vm", value_name = "NAME")]
    vms: Vec<String>,
    /// Not this VM; may be given again.
    #[arg(long, value_name = "NAME")]
    exclude: Vec<String>,
    /// Roll out a release below the pinned minimum (`stillpoint release pin`).
    #[arg(long)]
    allow_downgrade: bool,
    #[command(flatten)]
    policy: policy::Args,
    /// Only show what would be done; the same as `plan`.
    #[arg(long)]
    dry_run: bool,
    /// Start it and don't watch it.
    #[arg(long)]
    detach: bool,
}

impl NewArgs {
    fn asked(self, dry_run: bool) -> Result<NewRollout, Problem> {
        Ok(NewRollout {
            component: self.component.word().into(),
            budget_ns: self.budget.map(format::whole_ns),
            to: self.to,
            policy: self.policy.policy()?,
            sets: self.sets,
            hosts: self.hosts,
            labels: labels(self.labels)
                .map_err(|e| Problem::new(Code::BadRequest, format!("--label: {e}")))?,
            vms: self.vms,
            exclude: self.exclude,
            allow_downgrade: self.allow_downgrade,
            dry_run,
        })
    }
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    match args.verb {
        Verb::Plan(args) => plan(desk, args.asked(true)?).await,
        Verb::Start(args) if args.dry_run => plan(desk, args.asked(true)?).await,
        Verb::Start(args) => start(desk, *args).await,
        Verb::Watch { id } => watch::watch(desk, &the_one(desk, id, false).await?).await,
        Verb::Ls => ls(desk).await,
        Verb::Show { id } => show(desk, &get(desk, &the_one(desk, id, false).await?).await?),
        Verb::Pause(args) => act(desk, args, Act::Pause).await,
        Verb::Resume(args) => act(desk, args, Act::Resume).await,
        Verb::Abort { args, roll_back } => match roll_back {
            true => act(desk, args, Act::RollBack).await,
            false => act(desk, args, Act::Abort).await,
        },
        Verb::History { id } => history(desk, &the_one(desk, id, true).await?).await,
        Verb::Explain { vm } => explain(desk, &vm).await,
    }
}

async fn get(desk: &Desk, id: &str) -> Result<RolloutView, Problem> {
    desk.api
        .get(&format!("/v1/rollouts/{}", super::path_part(id)?))
        .await
}

async fn all(desk: &Desk) -> Result<Vec<RolloutSummary>, Problem> {
    desk.api.get("/v1/rollouts").await
}

/// The rollout that was named; or the one that goes on, or the last one where that will do.
async fn the_one(desk: &Desk, id: Option<String>, or_last: bool) -> Result<String, Problem> {
    if let Some(id) = id {
        return Ok(id);
    }
    let mut all = all(desk).await?;
    let open: Vec<_> = all.iter().filter(|one| !one.state.is_over()).collect();
    match open.as_slice() {
        [one] => Ok(one.id.0.clone()),
        [] if or_last && !all.is_empty() => Ok(all.pop().map(|one| one.id.0).unwrap_or_default()),
        [] => Err(Problem::new(
            Code::NotFound,
            "no rollout goes on; `stillpoint rollout ls` lists those that did",
        )),
        several => {
            let ids: Vec<&str> = several.iter().map(|one| one.id.0.as_str()).collect();
            let message = format!("several rollouts go on; say which: {}", ids.join(", "));
            Err(Problem::new(Code::BadRequest, message))
        }
    }
}

fn show(desk: &Desk, view: &RolloutView) -> Result<ExitCode, Problem> {
    match desk.json {
        true => say_json(view)?,
        false => say(&tables::of_view(view))?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn plan(desk: &Desk, new: NewRollout) -> Result<ExitCode, Problem> {
    let view: RolloutView = desk.api.send(Method::POST, "/v1/rollouts", &new).await?;
    match desk.json {
        true => say_json(&view)?,
        false => say(&tables::of_plan(&view))?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn start(desk: &Desk, args: NewArgs) -> Result<ExitCode, Problem> {
    let detach = args.detach;
    let new = args.asked(false)?;
    if !desk.json {
        let first = NewRollout {
            dry_run: true,
            ..new.clone()
        };
        let view: RolloutView = desk.api.send(Method::POST, "/v1/rollouts", &first).await?;
        say(&tables::of_plan(&view))?;
    }
    let view: RolloutView = desk.api.send(Method::POST, "/v1/rollouts", &new).await?;
    let id = view.rollout.id.0.clone();
    if detach {
        match desk.json {
            true => say_json(&view)?,
            false => say(&format!(
                "rollout {id} is started; `stillpoint rollout watch {id}` shows how far it is"
            ))?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    watch::watch(desk, &id).await
}

async fn ls(desk: &Desk) -> Result<ExitCode, Problem> {
    let all = all(desk).await?;
    if desk.json {
        say_json(&all)?;
    } else if all.is_empty() {
        say("no rollout was started yet")?;
    } else {
        let row = |one: &RolloutSummary| {
            vec![
                one.id.to_string(),
                one.to.clone(),
                one.state.to_string(),
                format!("{}/{}", one.done, one.units),
                one.failed.to_string(),
                format::ago(one.asked_at_unix_ns),
                one.reason.clone().unwrap_or_default(),
            ]
        };
        let rows: Vec<_> = all.iter().map(row).collect();
        let head = ["ROLLOUT", "TO", "STATE", "DONE", "FAILED", "ASKED", "WHY"];
        say(&format::table(&head, &[3, 4], &rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn act(desk: &Desk, args: ActArgs, act: Act) -> Result<ExitCode, Problem> {
    let id = the_one(desk, args.id, false).await?;
    if args.dry_run {
        let view = get(desk, &id).await?;
        let away = view.rollout.units.iter();
        let under_way = away.filter(|unit| unit.phase.is_in_flight()).count();
        let touched = view.rollout.units.iter();
        let touched = touched.filter(|unit| unit.phase.is_touched()).count();
        let back = match view.rollout.rung().takes_whole_host() {
            true => " (hosts, with all their guests, to what was there before)",
            false => "",
        };
        let text = match act {
            Act::Pause => format!("nothing more would begin; {under_way} under way would end"),
            Act::Resume => "it would go on, with all failures so far forgiven".into(),
            Act::Abort => {
                format!("it would end after the {under_way} under way; what moved would stay")
            }
            Act::RollBack => format!("the {touched} that it touched would be put back{back}"),
        };
        return dry(desk, &view, &text);
    }
    let path = format!("/v1/rollouts/{}/acts", super::path_part(&id)?);
    let view: RolloutView = desk.api.send(Method::POST, &path, &NewAct { act }).await?;
    match desk.json {
        true => say_json(&view)?,
        false => say(&format!("rollout {id} is {}", view.rollout.state))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn dry(desk: &Desk, view: &RolloutView, text: &str) -> Result<ExitCode, Problem> {
    match desk.json {
        true => say_json(&serde_json::json!({ "rollout": view.rollout.id, "would": text }))?,
        false => say(&format!(
            "rollout {} is {}: {text}",
            view.rollout.id, view.rollout.state
        ))?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn history(desk: &Desk, id: &str) -> Result<ExitCode, Problem> {
    let path = format!("/v1/rollouts/{}/history", super::path_part(id)?);
    let steps: Vec<HistoryStep> = desk.api.get(&path).await?;
    match desk.json {
        true => say_json(&steps)?,
        false => say(&tables::of_history(&steps))?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn explain(desk: &Desk, vm: &str) -> Result<ExitCode, Problem> {
    let parts: Result<Vec<&str>, _> = vm.split('/').map(super::path_part).collect();
    let path = format!("/v1/explain?vm={}", parts?.join("/").replace('+', "%2B"));
    let explained: Explained = desk.api.get(&path).await?;
    match desk.json {
        true => say_json(&explained)?,
        false => say(&explained.why)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether nobody has to be waited for: it is over, or waits for a hand.
fn is_at_rest(state: State) -> bool {
    state.is_over() || matches!(state, State::Stopped | State::Paused)
}

//! `stillpoint host ls`, `cordon`, `uncordon` and `drain`: the hosts of the fleet.

use std::process::ExitCode;
use std::time::Duration;

use hyper::Method;
use serde::Serialize;

use super::dry::{self, Dry};
use super::{Desk, format, progress, say, say_json};
use crate::api::{NewCordon, VmView};
use crate::fleet::explain::HostView;
use crate::fleet::record::ComponentCard;
use crate::model::{Code, Problem};

#[derive(Debug, clap::Args)]
pub(super) struct CordonArgs {
    /// The host [this one].
    name: Option<String>,
    /// Why, which is recorded.
    #[arg(long, value_name = "REASON")]
    reason: String,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct DrainArgs {
    #[command(flatten)]
    cordon: CordonArgs,
    /// End the guests of this host: their power buttons are pressed, and after the grace they are
    /// powered off.
    #[arg(long)]
    stop: bool,
    /// How long each guest has to switch itself off.
    #[arg(long, value_name = "TIME", value_parser = format::parse_time, default_value = "60s", requires = "stop")]
    grace: Duration,
}

async fn all(desk: &Desk) -> Result<Vec<HostView>, Problem> {
    desk.api.get("/v1/hosts").await
}

/// The host that was named, or this one.
async fn the_one(desk: &Desk, name: Option<&str>) -> Result<HostView, Problem> {
    let is_meant = |host: &HostView| match name {
        Some(name) => host.name.as_str() == name,
        None => host.is_this,
    };
    let mut found = all(desk).await?.into_iter().filter(is_meant);
    found.next().ok_or_else(|| {
        let name = name.unwrap_or("this one");
        let message = format!("no host `{name}`; `stillpoint host ls` shows those there are");
        Problem::new(Code::NotFound, message)
    })
}

pub(super) async fn ls(desk: &Desk) -> Result<ExitCode, Problem> {
    let hosts = all(desk).await?;
    if desk.json {
        say_json(&hosts)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<_> = hosts.iter().map(row).collect();
    let head = [
        "HOST",
        "IS",
        "ZONE",
        "FAULT DOMAIN",
        "LABELS",
        "GUESTS",
        "RELEASES",
        "KVM",
        "KERNEL",
        "NOTES",
    ];
    say(&format::table(&head, &[5], &rows))?;
    Ok(ExitCode::SUCCESS)
}

fn row(host: &HostView) -> Vec<String> {
    let mut notes = Vec::new();
    if host.is_this {
        notes.push("this one".to_owned());
    }
    if host.drives {
        notes.push("drives rollouts".into());
    }
    if let Some(skew) = host.clock {
        notes.push(format!(
            "its clock is {skew} of the driver's: nothing is begun there"
        ));
    }
    if let Some(reason) = &host.cordon {
        notes.push(format!("cordoned: {reason}"));
    }
    let labels = host.labels.iter();
    let labels = labels.map(|(name, value)| format!("{name}={value}"));
    vec![
        host.name.to_string(),
        if host.alive { "heard" } else { "not heard" }.into(),
        host.zone.clone(),
        host.fault_domain.clone(),
        labels.collect::<Vec<_>>().join(" "),
        host.guests.to_string(),
        host.releases.join(" "),
        component(&host.kvm),
        component(&host.kernel),
        notes.join("; "),
    ]
}

/// What a host runs of a component, and what else it has.
fn component(card: &ComponentCard) -> String {
    let others = card
        .releases
        .iter()
        .filter(|release| **release != card.runs);
    let others: Vec<_> = others.map(String::as_str).collect();
    match others.is_empty() {
        true => card.runs.clone(),
        false => format!("{}; has {}", card.runs, others.join(" ")),
    }
}

fn path(host: &HostView) -> String {
    format!("/v1/hosts/{}/cordon", host.name)
}

async fn put(desk: &Desk, host: &HostView, reason: String) -> Result<HostView, Problem> {
    desk.api
        .send(Method::PUT, &path(host), &NewCordon { reason })
        .await
}

pub(super) async fn cordon(desk: &Desk, args: CordonArgs) -> Result<ExitCode, Problem> {
    let host = the_one(desk, args.name.as_deref()).await?;
    let name = host.name.clone();
    let (host, text) = match args.dry_run {
        true => (host, format!("host {name} would be cordoned")),
        false => (
            put(desk, &host, args.reason).await?,
            format!(
                "host {name} is cordoned: no rollout begins anything there, and no guest is started there"
            ),
        ),
    };
    match desk.json {
        true => say_json(&host)?,
        false => say(&text)?,
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn uncordon(
    desk: &Desk,
    name: Option<String>,
    dry: Dry,
) -> Result<ExitCode, Problem> {
    let host = the_one(desk, name.as_deref()).await?;
    if dry.dry_run {
        let is = match &host.cordon {
            Some(reason) => format!("which is cordoned ({reason}), would be so no more"),
            None => "is not cordoned, and nothing would change".into(),
        };
        return dry::would(desk, &format!("host {}, {is}", host.name));
    }
    let host: HostView = desk.api.take_away(&path(&host)).await?;
    match desk.json {
        true => say_json(&host)?,
        false => say(&format!("host {} is not cordoned", host.name))?,
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn forget(desk: &Desk, name: &str, dry: Dry) -> Result<ExitCode, Problem> {
    if dry.dry_run {
        let host = the_one(desk, Some(name)).await?;
        if host.alive {
            let message =
                format!("host {name} is heard: it would be back at once; end its daemon first");
            return Err(Problem::new(Code::StillRunning, message));
        }
        return dry::would(
            desk,
            &format!(
                "host {name} would be forgotten, with its {} guests",
                host.guests
            ),
        );
    }
    let path = format!("/v1/hosts/{}", super::path_part(name)?);
    desk.api.delete(&path).await?;
    match desk.json {
        true => say_json(&serde_json::json!({ "forgotten": name }))?,
        false => say(&format!("host {name} is forgotten, with its guests"))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// What draining a host came to.
#[derive(Debug, Serialize)]
struct Drained {
    host: HostView,
    /// Guests that were ended.
    stopped: Vec<String>,
    /// Guests that run on.
    running: Vec<String>,
}

pub(super) async fn drain(desk: &Desk, args: DrainArgs) -> Result<ExitCode, Problem> {
    let DrainArgs {
        cordon,
        stop,
        grace,
    } = args;
    let host = the_one(desk, cordon.name.as_deref()).await?;
    if stop && !host.is_this {
        let message = format!(
            "guests of {} are ended by its own daemon: run `stillpoint host drain --stop` there",
            host.name
        );
        return Err(Problem::new(Code::BadRequest, message));
    }
    let guests: Vec<VmView> = match host.is_this {
        true => desk.api.get("/v1/vms").await?,
        false => Vec::new(),
    };
    let running = guests.into_iter().filter(|vm| vm.state.is_active());
    let mut running: Vec<String> = running.map(|vm| vm.name.to_string()).collect();
    let mut stopped = Vec::new();
    let host = match cordon.dry_run {
        true => host,
        false => put(desk, &host, cordon.reason).await?,
    };
    if stop && !cordon.dry_run {
        for name in std::mem::take(&mut running) {
            let bar = progress::waiting(desk.json, &format!("stopping {name}"));
            let ns = format::whole_ns(grace);
            let path = format!("/v1/vms/{name}/stop?grace_ns={ns}");
            let ended: Result<VmView, Problem> = desk.api.send(Method::POST, &path, &()).await;
            bar.finish_and_clear();
            match ended {
                Ok(_) => stopped.push(name),
                // It ended by itself.
                Err(problem) if problem.code == Code::NotRunning => stopped.push(name),
                Err(problem) => return Err(problem),
            }
        }
    }
    let left = host.guests.saturating_sub(stopped.len());
    let drained = Drained {
        host,
        stopped,
        running,
    };
    match desk.json {
        true => say_json(&drained)?,
        false => say(&said(&drained, left, stop, cordon.dry_run))?,
    }
    Ok(match left == 0 || cordon.dry_run {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn said(drained: &Drained, left: usize, stop: bool, dry: bool) -> String {
    let name = &drained.host.name;
    let cordoned = match dry {
        true => format!("host {name} would be cordoned"),
        false => format!("host {name} is cordoned"),
    };
    let guests = match (dry, stop, left) {
        (_, _, 0) => "no guest runs there".to_owned(),
        (true, true, left) => format!("{left} guests would be stopped"),
        (_, _, left) => {
            let named = match drained.running.is_empty() {
                true => String::new(),
                false => format!(" ({})", drained.running.join(", ")),
            };
            format!(
                "{left} guests{named} run on: Stillpoint updates a host under its guests and moves none to \
                 another host. Stop them with --stop, or update the host with them on it"
            )
        }
    };
    format!("{cordoned}; {guests}")
}

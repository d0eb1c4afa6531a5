//! `stillpoint events`

use std::process::ExitCode;

use hyper::Method;

use super::dry::{self, Dry};
use super::{Desk, format, say, say_json};
use crate::api::Cancel;
use crate::model::{Code, Event, Pause, PauseState, Problem};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    act: Act,
}

#[derive(Debug, clap::Subcommand)]
enum Act {
    /// Lists pauses that are to come; with --all those that are over too.
    Ls {
        /// Those that are over too.
        #[arg(long)]
        all: bool,
    },
    /// Says "go" in the guests' place.
    Approve {
        /// The event's id.
        event: String,
        #[command(flatten)]
        dry: Dry,
    },
    /// Withdraws a pause before it starts; the swap it is for is not done.
    Cancel {
        /// The event's id.
        event: String,
        /// Why, for the record.
        #[arg(long)]
        reason: Option<String>,
        #[command(flatten)]
        dry: Dry,
    },
    /// Prints what is announced, approved, started, cancelled and over, as it happens.
    Watch,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    match args.act {
        Act::Ls { all } => ls(desk, all).await,
        Act::Approve { event, dry } if dry.dry_run => {
            say_would(
                desk,
                &event,
                "would be approved, and starts at once if all of its groups have",
            )
            .await
        }
        Act::Cancel { event, dry, .. } if dry.dry_run => {
            say_would(desk, &event, "would be cancelled, and its swap not done").await
        }
        Act::Approve { event, .. } => {
            let path = format!("/v1/pauses/{}/approve", super::path_part(&event)?);
            let pause: Pause = desk.api.send(Method::POST, &path, &()).await?;
            show(desk, &pause, &format!("{event} is approved"))
        }
        Act::Cancel { event, reason, .. } => {
            let path = format!("/v1/pauses/{}/cancel", super::path_part(&event)?);
            let cancel = Cancel { reason };
            let pause: Pause = desk.api.send(Method::POST, &path, &cancel).await?;
            show(desk, &pause, &format!("{event} is cancelled"))
        }
        Act::Watch => watch(desk).await,
    }
}

/// Says what would become of an event, if it can still become anything else.
async fn say_would(desk: &Desk, event: &str, what: &str) -> Result<ExitCode, Problem> {
    let pauses: Vec<Pause> = desk.api.get("/v1/pauses").await?;
    let mut notices = pauses.iter().flat_map(|pause| {
        let notices = pause.notices.iter();
        notices.map(move |notice| (pause, notice))
    });
    let found = notices.find(|(_, notice)| notice.event.to_string().eq_ignore_ascii_case(event));
    let (pause, notice) = found.ok_or_else(|| {
        let message = format!("there is no event `{event}`; `stillpoint events ls` lists them");
        Problem::new(Code::NotFound, message)
    })?;
    if pause.state != PauseState::Scheduled {
        let message = format!("event {event} is {}", pause.state);
        return Err(Problem::new(Code::TooLate, message));
    }
    let vms: Vec<_> = notice.vms.iter().map(ToString::to_string).collect();
    dry::would(desk, &format!("the pause of {} {what}", vms.join(", ")))
}

fn show(desk: &Desk, pause: &Pause, text: &str) -> Result<ExitCode, Problem> {
    if desk.json {
        say_json(pause)?;
    } else {
        say(text)?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn ls(desk: &Desk, all: bool) -> Result<ExitCode, Problem> {
    let mut pauses: Vec<Pause> = desk.api.get("/v1/pauses").await?;
    pauses.retain(|pause| all || pause.state.is_open());
    if desk.json {
        say_json(&pauses)?;
    } else if pauses.is_empty() {
        say("no pauses are to come")?;
    } else {
        let rows: Vec<_> = pauses.iter().flat_map(rows).collect();
        let head = ["EVENT", "VMS", "STATE", "STARTS", "APPROVED", "SWAP", ""];
        say(&format::table(&head, &[], &rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn rows(pause: &Pause) -> impl Iterator<Item = Vec<String>> {
    pause.notices.iter().map(|notice| {
        let vms: Vec<_> = notice.vms.iter().map(ToString::to_string).collect();
        let starts = match (pause.state, pause.started_at_unix_ns) {
            (PauseState::Scheduled, _) => format::until(pause.not_before_unix_s),
            (_, Some(at)) => format::ago(at),
            (_, None) => "-".into(),
        };
        let no_notice = pause.no_notice.as_ref();
        let no_notice = no_notice.map(|reason| format!("without notice: {reason}"));
        let reason = pause.measured.as_ref().and_then(|m| m.reason.clone());
        vec![
            notice.event.to_string(),
            vms.join(","),
            pause.state.to_string(),
            starts,
            if notice.approval.is_some() {
                "yes"
            } else {
                "no"
            }
            .into(),
            pause.swap.to_string(),
            no_notice.or(reason).unwrap_or_default(),
        ]
    })
}

async fn watch(desk: &Desk) -> Result<ExitCode, Problem> {
    let mut events = desk.api.events().await?;
    while let Some(event) = events.next().await {
        let Event::Notice {
            vm,
            notice,
            state,
            not_before_unix_s,
            approved,
            ..
        } = &event
        else {
            continue;
        };
        if desk.json {
            let line = serde_json::to_string(&event);
            say(&line.map_err(|e| Problem::new(Code::Failed, e.to_string()))?)?;
            continue;
        }
        let more = match (state, approved) {
            (PauseState::Scheduled, false) => {
                format!(", starts {}", format::until(*not_before_unix_s))
            }
            (PauseState::Scheduled, true) => ", approved".into(),
            _ => String::new(),
        };
        say(&format!("{notice} {vm}: {state}{more}"))?;
    }
    Err(Problem::new(Code::NoDaemon, "the daemon ended"))
}

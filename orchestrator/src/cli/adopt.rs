//! `stillpoint adopt`

use std::process::ExitCode;

use hyper::Method;

use super::dry::{self, Dry};
use super::{Desk, format, path_part, say, say_json};
use crate::api::{CarveOutRetry, CarveOutView};
use crate::model::{Code, Problem, VmState};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Try a guest again that was not revived after a jump.
    #[arg(long, value_name = "NAME", group = "act")]
    retry: Option<String>,
    /// By this release, where the one that ran it does not take it up [the one that ran it, or the newest that reads its
    /// state].
    #[arg(
        id = "release",
        long = "with",
        value_name = "VERSION",
        requires = "retry"
    )]
    with: Option<String>,
    /// Give back the memory of a guest that is not to be run from its record any more.
    #[arg(long, value_name = "NAME", group = "act")]
    forget: Option<String>,
    /// Begin the directory anew: whatever is in it is given up. For one that is damaged.
    #[arg(long, group = "act")]
    forget_all: bool,
    #[command(flatten)]
    dry: Dry,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    const ALL: &str = "/v1/host/carve-out";
    if args.dry.dry_run {
        let view: CarveOutView = desk.api.get(ALL).await?;
        return say_would(desk, &args, &view);
    }
    let view: CarveOutView = match (args.retry, args.forget) {
        (Some(name), _) => {
            let path = format!("{ALL}/{}/retry", path_part(&name)?);
            let retry = CarveOutRetry { release: args.with };
            desk.api.send(Method::POST, &path, &retry).await?
        }
        (None, Some(name)) => {
            let path = format!("{ALL}/{}", path_part(&name)?);
            desk.api.send(Method::DELETE, &path, &()).await?
        }
        (None, None) if args.forget_all => desk.api.send(Method::DELETE, ALL, &()).await?,
        (None, None) => desk.api.get(ALL).await?,
    };
    if desk.json {
        say_json(&view)?;
    } else {
        say(&text(&view))?;
    }
    Ok(match view.problem {
        Some(_) => ExitCode::FAILURE,
        None => ExitCode::SUCCESS,
    })
}

fn say_would(desk: &Desk, args: &Args, view: &CarveOutView) -> Result<ExitCode, Problem> {
    let (name, what) = match (&args.retry, &args.forget) {
        (Some(name), _) => (name, "would be tried again"),
        (None, Some(name)) => (name, "would be given up, and its memory given back"),
        (None, None) if args.forget_all => {
            let many = view.guests.len();
            return dry::would(
                desk,
                &format!("all {many} guests there would be given up, with their memory"),
            );
        }
        (None, None) => return dry::would(desk, "nothing would change"),
    };
    let found = view.guests.iter().find(|guest| guest.vm == *name);
    let found = found.ok_or_else(|| {
        let message = format!("`{name}` has no memory that outlives the kernel");
        Problem::new(Code::NotFound, message)
    })?;
    dry::would(
        desk,
        &format!("{name}, whose record is {}, {what}", found.record),
    )
}

fn text(view: &CarveOutView) -> String {
    if let Some(problem) = &view.problem {
        return problem.clone();
    }
    let mut text = match view.size {
        0 => format!("{}: memfds, each a guest's own\n", view.path),
        size => format!(
            "{}: {} of {} free\n",
            view.path,
            format::size(view.free),
            format::size(size)
        ),
    };
    let rows: Vec<_> = view
        .guests
        .iter()
        .map(|guest| {
            vec![
                guest.vm.clone(),
                guest
                    .state
                    .map_or_else(|| "-".into(), |state| state.to_string()),
                guest.record.clone(),
                format::size(guest.ram_len),
                format!("{:#x}", guest.ram),
            ]
        })
        .collect();
    if !rows.is_empty() {
        let head = ["NAME", "STATE", "RECORD", "RAM", "AT"];
        text.push_str(&format::table(&head, &[3, 4], &rows));
    }
    for guest in &view.guests {
        let lost = guest
            .state
            .is_none_or(|state| !state.is_active() && state != VmState::Stopped);
        if let (true, Some(reason)) = (lost, &guest.reason) {
            text.push_str(&format!("\n{}: {reason}", guest.vm));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::CarvedGuest;

    #[test]
    fn a_person_reads_who_is_where_and_what_is_lost() {
        let guest = |vm: &str, state, record: &str, reason: Option<&str>| CarvedGuest {
            vm: vm.into(),
            state: Some(state),
            ram: 2 << 20,
            ram_len: 64 << 20,
            record: record.into(),
            reason: reason.map(str::to_owned),
        };
        let view = CarveOutView {
            path: "/dev/dax0.0".into(),
            size: 256 << 20,
            free: 128 << 20,
            problem: None,
            guests: vec![
                guest("web-1", VmState::Running, "consumed", None),
                guest("web-2", VmState::Failed, "stored", Some("no disk")),
            ],
        };
        let text = text(&view);
        assert!(
            text.starts_with("/dev/dax0.0: 128 MiB of 256 MiB free\n"),
            "{text}"
        );
        assert!(text.ends_with("web-2: no disk"), "{text}");
        assert!(!text.contains("web-1:"), "{text}");
    }
}

//! `stillpoint history`

use std::process::ExitCode;

use super::{Desk, format, say, say_json};
use crate::model::{JournalEntry, Problem};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of a guest, which may be forgotten; without it, everything.
    name: Option<String>,
    /// So many lines, the newest.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    last: u32,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    let mut path = format!("/v1/journal?last={}", args.last);
    if let Some(name) = &args.name {
        path += &format!("&vm={}", super::path_part(name)?);
    }
    let lines: Vec<JournalEntry> = desk.api.get(&path).await?;
    if desk.json {
        say_json(&lines)?;
    } else if lines.is_empty() {
        say("nothing yet")?;
    } else {
        let rows: Vec<_> = lines.iter().map(row).collect();
        say(&format::table(&["WHEN", "VM", "", "", "SWAP"], &[], &rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(line: &JournalEntry) -> Vec<String> {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    vec![
        format::ago(line.at_unix_ns),
        or_none(line.vm.as_ref().map(ToString::to_string)),
        line.kind.to_string(),
        line.text.clone(),
        line.swap
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
    ]
}

//! `stillpoint audit`

use std::process::ExitCode;

use super::{Desk, format, say, say_json};
use crate::model::{AuditEntry, Problem};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    act: Act,
}

#[derive(Debug, clap::Subcommand)]
enum Act {
    /// Lists changes that were asked for, oldest first: who, from where, in which role, what, and what came of it.
    Ls {
        /// Only those of this caller, as the list shows them: `uid 0`, or a certificate's name.
        #[arg(long, value_name = "WHO")]
        who: Option<String>,
        /// So many lines, the newest.
        #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
        last: u32,
    },
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    let Act::Ls { who, last } = args.act;
    let mut path = format!("/v1/audit?last={last}");
    if let Some(who) = &who {
        path += &format!("&who={}", encoded(who));
    }
    let lines: Vec<AuditEntry> = desk.api.get(&path).await?;
    if desk.json {
        say_json(&lines)?;
    } else if lines.is_empty() {
        say("nothing yet")?;
    } else {
        let rows: Vec<_> = lines.iter().map(row).collect();
        let head = ["WHEN", "WHO", "ROLE", "WHAT", "CAME OF IT", "FROM"];
        say(&format::table(&head, &[], &rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Text as a part of a query.
fn encoded(text: &str) -> String {
    let one = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            char::from(byte).to_string()
        }
        other => format!("%{other:02X}"),
    };
    text.bytes().map(one).collect()
}

fn row(line: &AuditEntry) -> Vec<String> {
    let body = line
        .body
        .as_deref()
        .map_or(String::new(), |body| format!(" {body}"));
    let reason = line
        .reason
        .as_deref()
        .map_or(String::new(), |reason| format!(": {reason}"));
    vec![
        format::ago(line.at_unix_ns),
        line.who.clone(),
        line.role.map_or("none", crate::auth::Role::word).into(),
        format!("{} {}{body}", line.method, line.path),
        format!("{}{reason}", line.outcome),
        line.from.clone(),
    ]
}

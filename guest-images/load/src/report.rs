//! The last word of each load.

use std::io::{IsTerminal, Write};

use serde::Serialize;

/// What came of a load.
pub(crate) trait Report: Serialize {
    /// Whether nothing was lost.
    fn ok(&self) -> bool;
    /// One sentence for people.
    fn sentence(&self) -> String;
}

#[derive(Serialize)]
struct Line<'a, R> {
    report: &'a R,
}

/// Tells it on standard output, and whether all is well.
pub(crate) fn tell(report: &impl Report, json: bool) -> anyhow::Result<bool> {
    let mut out = std::io::stdout().lock();
    if json || !out.is_terminal() {
        serde_json::to_writer(&mut out, &Line { report })?;
        writeln!(out)?;
    } else {
        writeln!(out, "{}", report.sentence())?;
    }
    out.flush()?;
    Ok(report.ok())
}

//! Reads a daemon's audit log.
#![allow(dead_code)] // Each test file uses its own part.

use serde_json::Value;

use crate::daemon::Daemon;

/// Of the audit log: who, in which role, which path, and what came of it.
pub(crate) fn audited(daemon: &Daemon) -> Vec<(String, String, String, String)> {
    let lines = daemon.ask(&["audit", "ls", "--last", "1000"]).good();
    let text = |line: &Value, field: &str| line[field].as_str().unwrap_or_default().to_owned();
    let all = lines.as_array().expect("lines").iter();
    all.map(|line| {
        (
            text(line, "who"),
            text(line, "role"),
            text(line, "path"),
            text(line, "outcome"),
        )
    })
    .collect()
}

pub(crate) fn is_audited(
    daemon: &Daemon,
    who: &str,
    role: &str,
    path: &str,
    outcome: &str,
) -> bool {
    let wanted = (who.into(), role.into(), path.into(), outcome.into());
    audited(daemon).contains(&wanted)
}

//! Where the daemon's log goes: to journald with its fields, where systemd connected it to that, or to standard error.
//!
//! systemd names in `JOURNAL_STREAM` the device and inode of the socket by which it takes lines from standard error. Only if
//! that is still our standard error is journald spoken to directly: whoever redirects it wants the lines there.

use std::io::IsTerminal;
use std::os::unix::fs::MetadataExt;

use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry};

/// What our fields begin with in the journal: `STILLPOINT_VM`, `STILLPOINT_SWAP`, `STILLPOINT_ROLLOUT`.
const PREFIX: &str = "STILLPOINT";

/// Everything is logged from now on; as JSON on standard error, if it is to be.
pub fn begin(json: bool) {
    if json || !is_journal() {
        return to_stderr(json);
    }
    match tracing_journald::layer() {
        Ok(layer) => {
            let layer = layer
                .with_field_prefix(Some(PREFIX.into()))
                .with_syslog_identifier("stillpointd".into())
                .with_priority_mappings(PriorityMappings {
                    // What others call informational; a notice is what an operator is to see.
                    info: Priority::Informational,
                    debug: Priority::Debug,
                    ..PriorityMappings::new()
                });
            Registry::default().with(filter()).with(layer).init();
        }
        Err(error) => {
            to_stderr(false);
            tracing::warn!(
                "journald can't be spoken to directly, its lines have no fields: {error}"
            );
        }
    }
}

fn filter() -> EnvFilter {
    EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"))
}

fn to_stderr(json: bool) {
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter())
        .with_ansi(std::io::stderr().is_terminal())
        // It would complain of a log that can't be written by a panic, in whatever task just logs.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    if json {
        logs.json().init();
    } else {
        logs.init();
    }
}

/// Whether standard error is what systemd connected to journald.
fn is_journal() -> bool {
    let named = std::env::var("JOURNAL_STREAM").ok();
    let named = named.as_deref().and_then(device_and_inode);
    // A file of its own, that isn't closed.
    let ours = std::fs::metadata("/proc/self/fd/2").ok();
    let ours = ours.map(|ours| (ours.dev(), ours.ino()));
    named.is_some() && named == ours
}

fn device_and_inode(text: &str) -> Option<(u64, u64)> {
    let (device, inode) = text.split_once(':')?;
    Some((device.parse().ok()?, inode.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_systemd_names_is_read() {
        assert_eq!(device_and_inode("8:123456"), Some((8, 123_456)));
        for bad in ["", "8", "8:", ":1", "a:b", "8:1:2"] {
            assert_eq!(device_and_inode(bad), None, "{bad}");
        }
    }
}

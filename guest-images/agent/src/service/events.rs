//! Hears of pauses from the metadata service, and runs the hooks around them.
//!
//! ```text
//!  Scheduled ─▶ hooks.d/before ─┬─ all ended well ─▶ approve ─▶ (paused) ─▶ gone ─▶ hooks.d/after
//!                               └─ one did not ───▶ no approval: the pause comes at its time
//! ```
//!
//! Hooks before a pause have a deadline; what does not end in it did not end well. A pause that was
//! not announced (its event is `Started` when it is seen first) has no hooks before it, and those
//! after it all the same. An event that is cancelled ends like any other: `after` undoes `before`.
//!
//! It never ends because the service is away: the daemon of the host may be starting anew.

mod http;

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use stillpoint_agent::protocol::{Exit, Hooks};

pub(crate) use http::Host;

use super::hooks;

const EVENTS: &str = "/metadata/scheduledevents?api-version=2020-07-01";
const NAME: &str = "/metadata/instance/compute/name?api-version=2021-12-13&format=text";
/// A question waits so long for something new. Within the service's own bound.
const POLL: Duration = Duration::from_secs(50);
/// Between two tries when the service can't be reached, or the answer was of no use.
const AGAIN: Duration = Duration::from_secs(1);

/// What this works by.
#[derive(Debug)]
pub(crate) struct Settings {
    /// Where the service is.
    pub(crate) host: Host,
    /// How long the hooks before a pause may take together, and those after it.
    pub(crate) deadline: Duration,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Document {
    document_incarnation: u64,
    events: Vec<Event>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Event {
    event_id: String,
    event_status: String,
    resources: Vec<String>,
}

/// What is done about events, without the service: for this loop and its tests.
#[derive(Debug, Default)]
struct Watch {
    /// What events call this guest, once it is known. It stays so for as long as the guest runs.
    name: Option<String>,
    /// Events that the hooks before were run for, or that came too late for them.
    begun: BTreeSet<String>,
    /// Events that this guest is ready for, and the service was not told yet: it may be away.
    ready: BTreeSet<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Act {
    /// Run the hooks before this event, and approve it.
    Prepare(String),
    /// Run the hooks after it.
    Resume(String),
}

impl Watch {
    /// What is to be done now that this document is seen.
    fn see(&mut self, document: &Document) -> Vec<Act> {
        let name = self.name.clone();
        let ours = |event: &&Event| event.resources.iter().any(|r| Some(r) == name.as_ref());
        let mut acts = Vec::new();
        let gone: Vec<String> = self
            .begun
            .iter()
            .filter(|id| !document.events.iter().any(|event| event.event_id == **id))
            .cloned()
            .collect();
        for id in gone {
            self.begun.remove(&id);
            self.ready.remove(&id);
            acts.push(Act::Resume(id));
        }
        for event in document.events.iter().filter(ours) {
            if self.begun.insert(event.event_id.clone()) && event.event_status == "Scheduled" {
                acts.push(Act::Prepare(event.event_id.clone()));
            }
        }
        acts
    }
}

/// Watches for ever.
pub(crate) fn run(settings: &Settings, directory: &Path) -> ! {
    say!("watching for events at {}", settings.host);
    let mut watch = Watch::default();
    let mut seen = 0;
    loop {
        match turn(settings, directory, &mut watch, seen) {
            Ok(incarnation) => seen = incarnation,
            Err(error) => {
                say!("events: {error}");
                std::thread::sleep(AGAIN);
            }
        }
    }
}

/// Asks once, and does what is to be done; the incarnation that was seen.
fn turn(settings: &Settings, directory: &Path, watch: &mut Watch, seen: u64) -> io::Result<u64> {
    let host = &settings.host;
    if watch.name.is_none() {
        watch.name = Some(host.get(NAME, AGAIN)?);
    }
    let wait = POLL.as_secs();
    let path = format!("{EVENTS}&wait_for_change=true&last_etag={seen}&timeout_sec={wait}");
    let document: Document = serde_json::from_str(&host.get(&path, POLL)?)?;
    for act in watch.see(&document) {
        match act {
            Act::Prepare(id) => {
                if hooked(&directory.join("before"), &id, settings.deadline) {
                    watch.ready.insert(id);
                }
            }
            Act::Resume(id) => {
                hooked(&directory.join("after"), &id, settings.deadline);
                say!("event {id}: over");
            }
        }
    }
    while let Some(id) = watch.ready.first().cloned() {
        let body = serde_json::json!({ "StartRequests": [{ "EventId": id }] });
        // What fails is said again in the next turn.
        host.post(EVENTS, &body.to_string())?;
        watch.ready.remove(&id);
        say!("event {id}: ready");
    }
    Ok(document.document_incarnation)
}

/// Runs the hooks of a directory; whether all ended well.
fn hooked(directory: &Path, id: &str, deadline: Duration) -> bool {
    let deadline = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
    let hooks = match hooks::run(directory, deadline) {
        Ok(hooks) => hooks,
        Err(problem) => {
            say!("event {id}: {}", problem.text);
            return false;
        }
    };
    let Hooks { ran, left_out } = &hooks;
    for hook in ran.iter().filter(|hook| hook.exit != Some(Exit::Code(0))) {
        let said = hook.output.stderr.trim_end();
        say!(
            "event {id}: hook {} ended with {:?}: {said}",
            hook.name,
            hook.exit
        );
    }
    if *left_out > 0 {
        say!(
            "event {id}: no time was left for {left_out} hooks in {}",
            directory.display()
        );
    }
    *left_out == 0 && ran.iter().all(|hook| hook.exit == Some(Exit::Code(0)))
}

#[cfg(test)]
mod tests;

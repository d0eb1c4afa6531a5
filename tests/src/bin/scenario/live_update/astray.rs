//! A guest that does not come back after a jump, as its release takes up no state: it is kept and told of by
//! name, the others go on, no other jump is begun over it, a daemon that dies finds it again; and another
//! release has it go on.

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_carveout::mark::Mark;
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::releases::Release;

use crate::kernel::{goes_on, told};
use crate::stages;

/// Its name.
pub(super) const GUEST: &str = "pulse-astray";
/// The release that runs it, as the store knows it.
const BENT: &str = "9.9.9";

/// Starts it; gives what it shows.
pub(super) fn begin(daemon: &Daemon) -> anyhow::Result<Value> {
    let bent = Release::Faulty("spoil=load");
    let path = bent.binary()?.display().to_string();
    let mut add = vec!["release", "add", "--unsigned", "--as", BENT];
    let arguments = bent.arguments();
    add.extend(arguments.iter().flat_map(|&argument| ["--arg", argument]));
    add.push(&path);
    daemon.must(&add)?;
    let seen = stages::run_pulse(daemon, GUEST, &["--release", BENT])?;
    println!("scenario: {GUEST} is run by a release that takes up no state");
    Ok(told(&seen))
}

/// Before the jump: its rehearsal finds it out, and the host does not jump.
pub(super) fn is_found_out(daemon: &Daemon, into: &str) -> anyhow::Result<()> {
    let answer = stages::swap_kernel(daemon, into, &["--no-notice", "a scenario"])?;
    let swap = stages::last_swap(daemon)?;
    let why = swap["reason"].as_str().unwrap_or_default();
    ensure!(
        !answer.success
            && swap["state"] == "refused"
            && [GUEST, BENT, "refuses all state"]
                .iter()
                .all(|part| why.contains(part)),
        "{swap:#}"
    );
    println!("scenario: the rehearsal finds it out, and the host does not jump");
    Ok(())
}

fn refused(daemon: &Daemon, args: &[&str], why: &str) -> anyhow::Result<()> {
    let answer = daemon.stillpoint(args)?;
    let said = format!("{}{}", answer.error, answer.json);
    ensure!(!answer.success && said.contains(why), "{args:?}: {said}");
    Ok(())
}

/// It is kept for another try, and nothing was done to it.
fn is_kept(daemon: &Daemon) -> anyhow::Result<()> {
    let shown = daemon.must(&["show", GUEST])?;
    ensure!(shown["state"] == "failed", "{shown:#}");
    let view = daemon.must(&["adopt"])?;
    let mut guests = view["guests"].as_array().into_iter().flatten();
    let found = guests.find(|guest| guest["vm"] == GUEST);
    let found = found.with_context(|| format!("{view:#}"))?;
    ensure!(found["record"] == Mark::Stored.to_string(), "{view:#}");
    Ok(())
}

/// After the jump.
pub(super) fn comes_back(
    daemon: &mut Daemon,
    (swap, into): (&Value, &str),
    before: &Value,
) -> anyhow::Result<()> {
    ensure!(swap["state"] == "failed", "{swap:#}");
    let why = swap["reason"].as_str().unwrap_or_default();
    ensure!(why.ends_with(&format!("kept: {GUEST}")), "{swap:#}");
    is_kept(daemon)?;
    let retry = ["adopt", "--retry", GUEST];
    let by = |release| [&retry[..], &["--with", release]].concat();
    refused(daemon, &retry, "refuses all state")?;
    refused(daemon, &by("1.2.3"), "is not in the store")?;
    refused(daemon, &["rm", GUEST], "may yet be run")?;
    let jump = stages::swap_kernel(daemon, into, &["--check"])?;
    let said = format!("{}{}", jump.error, jump.json);
    ensure!(
        !jump.success && said.contains("came from the kernel before"),
        "{said}"
    );
    is_kept(daemon)?;
    println!("scenario: {GUEST} is kept, whatever was tried, and no other jump is begun over it");
    daemon.kill()?;
    ensure!(
        daemon
            .held()
            .iter()
            .any(|name| *name == format!("came-{GUEST}")),
        "{:?}",
        daemon.held()
    );
    daemon.restart()?;
    is_kept(daemon)?;
    println!("scenario: the daemon died, and the next one has it from the fd store");
    daemon.must(&by(Release::Current.version()))?;
    goes_on(daemon, GUEST, before)?;
    let shown = daemon.must(&["show", GUEST])?;
    ensure!(
        shown["release"] == Release::Current.version() && shown["state"] == "running",
        "{shown:#}"
    );
    refused(daemon, &retry, "consumed")?;
    ensure!(
        !daemon.held().iter().any(|name| name.starts_with("came-")),
        "{:?}",
        daemon.held()
    );
    println!("scenario: {GUEST} went on by another release");
    Ok(())
}

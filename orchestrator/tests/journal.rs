//! The daemon's power is cut at each write to its store: before it, in the middle of it, and right after
//! it. The next daemon says what was in progress, finishes or undoes it, and nothing that anybody was told
//! is lost.
//!
//! The store lies on a disk that forgets what was not synced (`orchestrator/src/store/disk.rs`), so its files
//! are as of the last sync, and `kill -9` is to them what a power cut is. In half of the runs the guests'
//! processes and the run directory go too, as they do when a host loses its power.

mod daemon;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use daemon::{Daemon, until};
use serde_json::Value;

/// What goes with the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// Nothing else: guests go on.
    Daemon,
    /// Everything that is not on disk.
    Power,
}

/// What was told to whoever asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Told {
    added: bool,
    runs: bool,
    moved: bool,
    stopped: bool,
    /// All of it: the cut was not reached.
    all: bool,
}

/// Starts a daemon whose disk is cut then; whether it came to answer.
fn start(daemon: &mut Daemon, cut: &str) -> bool {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(daemon.path().join("log"))
        .expect("log");
    let mut command = daemon.command();
    let child = command.arg("--disk").arg(cut).stderr(log).spawn();
    daemon.try_adopt(child.expect("stillpointd"))
}

/// Adds releases, runs a guest, swaps it, stops it, as far as the daemon lives.
fn go_on(daemon: &Daemon) -> Told {
    let mut told = Told::default();
    let toy = daemon.toy("0.2.0", &[1, 2], &[2, 1]);
    let toy = toy.to_str().expect("UTF-8");
    let adds = |name| {
        daemon
            .ask(&["release", "add", "--unsigned", toy, "--as", name])
            .ok
    };
    told.added = adds("good") && adds("next");
    told.runs = told.added && daemon.run("web", "good").ok;
    // Asked of a daemon that dies it would be waited for.
    told.moved = told.runs && daemon.swap_or_die("web", "next");
    told.stopped = told.moved && daemon.ask(&["stop", "web"]).ok;
    told.all = told.stopped && !daemon.has_died();
    told
}

/// Processes that run a toy of this daemon's, and the release of each.
fn toys(daemon: &Daemon) -> Vec<(u32, String)> {
    let releases = daemon.path().join("state/releases");
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let toy = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let exe: PathBuf = std::fs::read_link(entry.path().join("exe")).ok()?;
        let release = exe.strip_prefix(&releases).ok()?.iter().next()?;
        Some((pid, release.to_str()?.to_owned()))
    };
    processes.filter_map(toy).collect()
}

fn cut_power(daemon: &Daemon) {
    for (pid, _) in toys(daemon) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("pid"));
        let _ = rustix::process::kill_process(pid.expect("pid"), rustix::process::Signal::KILL);
    }
    until("the toys are gone", || toys(daemon).is_empty());
    let _ = std::fs::remove_dir_all(daemon.path().join("run"));
}

/// One run. Whether the cut was reached.
fn cut(at: &str, loss: Loss) -> bool {
    let mut daemon = Daemon::prepare();
    let told = match start(&mut daemon, at) {
        true => go_on(&daemon),
        false => Told::default(),
    };
    if told.all {
        return false;
    }
    until("the daemon has died", || daemon.has_died());
    daemon.bury();
    if loss == Loss::Power {
        cut_power(&daemon);
    }
    assert!(start(&mut daemon, "never"), "{at}: {}", daemon.log());
    let context = format!("{at}, {loss:?}, {told:?}");
    is_settled(&daemon, &context);
    agrees(&daemon, told, loss, &context);
    is_told(&daemon, &context);
    if told.added {
        // It is as good as any.
        daemon.run("probe", "good").good();
    }
    true
}

/// Nothing is open any more.
fn is_settled(daemon: &Daemon, context: &str) {
    until(&format!("all is settled: {context}"), || {
        let vms = daemon.ask(&["ls"]).good();
        let over = ["running", "stopped", "crashed", "failed"].map(Value::from);
        let vms_over = vms
            .as_array()
            .is_some_and(|vms| vms.iter().all(|vm| over.contains(&vm["state"])));
        let swaps = daemon.ask(&["report"]).good();
        let over = ["moved", "kept", "crashed"].map(Value::from);
        let swaps_over = swaps
            .as_array()
            .is_some_and(|swaps| swaps.iter().all(|swap| over.contains(&swap["state"])));
        vms_over && swaps_over
    });
}

/// Records and processes say the same, and what was told is so.
fn agrees(daemon: &Daemon, told: Told, loss: Loss, context: &str) {
    let all = daemon.ask(&["ls"]).good();
    let vm = all.as_array().and_then(|all| all.first()).cloned();
    assert!(
        !told.runs || vm.is_some(),
        "{context}: the guest is forgotten"
    );
    let entries = std::fs::read_dir(daemon.path().join("state/releases"));
    let names = entries
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name());
    let left: Vec<_> = names
        .filter(|name| name.as_encoded_bytes().starts_with(b"."))
        .collect();
    assert!(left.is_empty(), "{context}: half-added releases: {left:?}");
    let releases = daemon.ask(&["release", "ls"]).good();
    let releases = releases.as_array().map_or(0, Vec::len);
    assert!(
        !told.added || releases == 2,
        "{context}: {releases} releases"
    );
    let swaps = daemon.ask(&["report"]).good();
    let swap = swaps.as_array().and_then(|all| all.first()).cloned();
    let moved = swap.as_ref().is_some_and(|swap| swap["state"] == "moved");
    assert!(!told.moved || moved, "{context}: {swap:?}");
    let Some(vm) = vm else {
        assert!(toys(daemon).is_empty(), "{context}: a guest of nobody");
        return;
    };
    let release = if moved { "next" } else { "good" };
    assert_eq!(vm["release"], release, "{context}: {vm:#}");
    let runs = vm["state"] == "running";
    // A predecessor retires, a successor that is not wanted is killed.
    let one: Vec<_> = vm["process"]["pid"]
        .as_u64()
        .filter(|_| runs)
        .map(|pid| (u32::try_from(pid).expect("pid"), release.to_owned()))
        .into_iter()
        .collect();
    until(
        &format!("{one:?} alone runs: {context}, {:?}", toys(daemon)),
        || toys(daemon) == one,
    );
    let was_to_stop = vm["wanted"] == "stopped";
    assert!(
        !told.stopped || vm["state"] == "stopped",
        "{context}: {vm:#}"
    );
    if told.runs && !was_to_stop {
        let so = match loss {
            Loss::Daemon => "running",
            // It did not switch itself off.
            Loss::Power => "crashed",
        };
        assert_eq!(vm["state"], so, "{context}: {vm:#}");
    }
}

/// The journal says what was in progress when the daemon died, and what came of it.
fn is_told(daemon: &Daemon, context: &str) {
    let lines = daemon.ask(&["history", "--last", "1000"]).good();
    let lines = lines.as_array().expect("lines");
    let of_daemon = |line: &&Value| line["kind"] == "daemon";
    let starts: Vec<_> = lines.iter().filter(of_daemon).collect();
    let last = starts.last().expect("a start");
    let begun = last["number"].as_u64().expect("a number");
    if starts.len() > 1 {
        let text = last["text"].as_str().unwrap_or_default();
        assert!(text.contains("cut off"), "{context}: {text}");
    }
    let mut stories: BTreeMap<(String, String), Vec<(bool, String)>> = BTreeMap::new();
    for line in lines.iter().filter(|line| line["vm"].is_string()) {
        let key = (line["vm"].to_string(), line["swap"].to_string());
        let is_new = line["number"].as_u64() > Some(begun);
        let kind = line["kind"].as_str().unwrap_or_default().to_owned();
        stories.entry(key).or_default().push((is_new, kind));
    }
    let of = |(_, kind): &(bool, String), kinds: &[&str]| kinds.contains(&kind.as_str());
    for (what, story) in stories {
        let (new, old): (Vec<_>, Vec<_>) = story.iter().cloned().partition(|(is_new, _)| *is_new);
        let open = old.last().is_some_and(|last| of(last, &["asked", "step"]));
        let found = new.iter().any(|line| of(line, &["found"]));
        // Of a swap that crashed with a power cut the machine's own lines tell only now.
        assert_eq!(open, found, "{context}: {what:?} is told as {story:?}");
        let end = story.last().expect("a line");
        assert!(
            of(end, &["done", "undone"]),
            "{context}: {what:?} is told as {story:?}"
        );
    }
}

/// Cuts at every sync of the whole story, at this moment of each. How many there were.
fn at_every_write(moment: &str, loss: Loss, step: u64) -> u64 {
    let (next, last) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let number = 1 + next.fetch_add(1, Ordering::Relaxed) * step;
                    if number >= last.load(Ordering::Relaxed) {
                        return;
                    }
                    if !cut(&format!("{moment}={number}"), loss) {
                        last.fetch_min(number, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let writes = last.load(Ordering::Relaxed) - 1;
    println!("{writes} syncs, cut {moment}, lost with it: {loss:?}");
    // The whole story writes more often than that: the cuts were where they should be.
    assert!(writes > 15, "only {writes} writes");
    writes
}

#[test]
fn a_daemon_killed_before_any_write_is_on_disk() {
    at_every_write("sync", Loss::Daemon, 1);
}

#[test]
fn a_daemon_killed_after_any_write_before_it_could_tell() {
    at_every_write("synced", Loss::Daemon, 1);
}

#[test]
fn a_power_cut_in_the_middle_of_any_write() {
    at_every_write("torn", Loss::Power, 1);
}

#[test]
fn a_power_cut_after_any_write() {
    at_every_write("synced", Loss::Power, 1);
}

/// The disk forgets, or the tests above would show nothing.
#[test]
fn what_was_not_synced_is_forgotten() {
    let mut daemon = Daemon::prepare();
    // The first sync of all: the store is not there yet.
    assert!(!start(&mut daemon, "sync=1"), "it was not cut");
    until("the daemon has died", || daemon.has_died());
    daemon.bury();
    let store = daemon.path().join("state/store.sqlite");
    assert_eq!(std::fs::metadata(store).expect("the store").len(), 0);
    let said = Command::new(env!("CARGO_BIN_EXE_stillpointd"))
        .args(["--disk", "soon"])
        .output();
    let said = said.expect("stillpointd");
    assert!(!said.status.success(), "what is no cut was taken");
}

//! Children that ended and that nobody asked how: a zombie keeps its pid for as long as the daemon lives, and a daemon lives for years.
//!
//! Who waits for a process asks [`super::process::Process::exit`] as soon as it has ended, and reaps it so. What is dropped before it
//! ended, or found dead on another way, is left. So whoever was dead at two looks in a row is reaped here.

use std::collections::BTreeSet;
use std::time::Duration;

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// Between two looks: much longer than anybody who waits for a process takes to ask.
const LOOK: Duration = Duration::from_secs(5);

/// Reaps until the daemon ends.
pub async fn reap() {
    let mut dead = BTreeSet::new();
    loop {
        tokio::time::sleep(LOOK).await;
        dead = look(&dead);
    }
}

/// Reaps those that are dead and were at the last look; gives those that are dead since.
fn look(before: &BTreeSet<i32>) -> BTreeSet<i32> {
    let mut dead: BTreeSet<i32> = children().into_iter().filter(|&pid| is_dead(pid)).collect();
    dead.retain(|pid| {
        let is_left = before.contains(pid);
        if is_left {
            tracing::debug!(pid, "reaped: nobody had asked how it ended");
            wait(*pid, WaitIdOptions::empty());
        }
        !is_left
    });
    dead
}

/// Children of this process, whichever of its threads they were started by (proc_pid_children(5)).
fn children() -> Vec<i32> {
    let threads = std::fs::read_dir("/proc/self/task");
    let threads = threads.into_iter().flatten().flatten();
    let lists = threads.map(|thread| std::fs::read_to_string(thread.path().join("children")));
    let pids = lists.flatten().flat_map(|list| {
        let pids = list.split_whitespace().map(str::parse::<i32>);
        pids.filter_map(Result::ok).collect::<Vec<_>>()
    });
    pids.collect()
}

/// Whether a child has ended; it is left as it is.
fn is_dead(pid: i32) -> bool {
    wait(pid, WaitIdOptions::NOWAIT)
}

fn wait(pid: i32, more: WaitIdOptions) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | more;
    let child = Pid::from_raw(pid).map(WaitId::Pid);
    child.is_some_and(|child| matches!(waitid(child, options), Ok(Some(_))))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::process::Command;
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_dead_are_reaped_at_the_second_look_and_the_living_are_left() {
        let start = |script: &str| {
            let child = Command::new("sh").args(["-c", script]).spawn();
            i32::try_from(child.expect("a child").id()).expect("a pid")
        };
        let (gone, here) = (start("exit 3"), start("exec sleep 100"));
        let deadline = Instant::now() + Duration::from_secs(30);
        while !is_dead(gone) {
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        let first = look(&BTreeSet::new());
        assert!(first.contains(&gone) && !first.contains(&here), "{first:?}");
        assert!(is_dead(gone), "whoever waits for it may still ask");
        // Children of other tests are not ours to reap.
        let second = look(&BTreeSet::from([gone, here]));
        assert!(!second.contains(&gone) && !second.contains(&here));
        assert!(!PathBuf::from(format!("/proc/{gone}")).exists());
        assert!(PathBuf::from(format!("/proc/{here}")).exists());
        let here = Pid::from_raw(here).expect("a pid");
        rustix::process::kill_process(here, rustix::process::Signal::KILL).expect("kill");
        waitid(WaitId::Pid(here), WaitIdOptions::EXITED).expect("wait");
    }
}

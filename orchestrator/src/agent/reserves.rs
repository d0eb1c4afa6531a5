//! What a successor needs of its host beside the guest, and whether it is there: for the time of a swap
//! two processes stand where one does.
//!
//! The need is taken from the process that runs the guest now: another release may need somewhat more.
//! Guest RAM is one file, which both map, so none of it is needed twice, huge pages least of all.

use std::path::{Path, PathBuf};

use rustix::process::{Resource, getrlimit};

use crate::doctor::{Check, Status};

/// What a process needs before it has a guest: binary, heap, stacks of threads.
const BASE_KIB: u64 = 16 << 10;
/// Of a limit, what is left to others.
const CGROUPS: &str = "/sys/fs/cgroup";

/// What the process that runs the guest uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Used {
    /// Memory of its own, and page tables.
    kib: u64,
    threads: u64,
    fds: u64,
}

/// Looks at all of it. `pid` runs the guest.
pub fn look(pid: u32) -> Vec<Check> {
    match used(pid) {
        Some(used) => {
            let cgroups = cgroups(pid);
            vec![
                memory(used, &cgroups),
                descriptors(pid, used),
                tasks(used, &cgroups),
            ]
        }
        None => {
            let found = format!("/proc/{pid} can't be read");
            let remedy = "ask again: the guest's process may just have been exchanged";
            vec![Check::new("resources", Status::Warn, found, remedy)]
        }
    }
}

fn used(pid: u32) -> Option<Used> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(Used {
        kib: field(&status, "RssAnon:")? + field(&status, "VmPTE:")?,
        threads: field(&status, "Threads:")?,
        fds: std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64,
    })
}

/// A number behind a name, as in `/proc/PID/status` and `/proc/meminfo`.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

fn number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The process's cgroup and those around it; none where there is no cgroup v2.
fn cgroups(pid: u32) -> Vec<PathBuf> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let own = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let Some(own) = own else { return Vec::new() };
    let root = Path::new(CGROUPS);
    let own = root.join(own);
    let around = own.ancestors().take_while(|path| path.starts_with(root));
    around.map(Path::to_owned).collect()
}

/// The tightest of a controller's limits: what is left below it, and whose it is.
fn left(cgroups: &[PathBuf], controller: &str) -> Option<(u64, PathBuf)> {
    let each = cgroups.iter().filter_map(|path| {
        // `max`, where there is no limit, is no number.
        let most = number(&path.join(format!("{controller}.max")))?;
        let now = number(&path.join(format!("{controller}.current")))?;
        Some((most.saturating_sub(now), path.clone()))
    });
    each.min()
}

fn memory(used: Used, cgroups: &[PathBuf]) -> Check {
    let need = used.kib + BASE_KIB;
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let host = field(&meminfo, "MemAvailable:").unwrap_or(0);
    let mut tightest = (
        host,
        "on this host".to_owned(),
        "free some of the host's memory",
    );
    if let Some((bytes, path)) = left(cgroups, "memory")
        && bytes >> 10 < tightest.0
    {
        let place = format!("below memory.max of {}", path.display());
        tightest = (
            bytes >> 10,
            place,
            "raise that limit, or stop something below it",
        );
    }
    let (there, place, remedy) = tightest;
    let found = format!(
        "{} MiB beside the guest's RAM, {} MiB are free {place}; huge pages: none, RAM is shared",
        need >> 10,
        there >> 10
    );
    judge("memory", need, there, found, remedy)
}

fn descriptors(pid: u32, used: Used) -> Check {
    // In a handover every file is held twice for a moment, on each side.
    let need = used.fds * 2;
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let now = line.and_then(|line| line.split_ascii_whitespace().nth(4)?.parse().ok());
    // A successor has its limit from the daemon.
    let next = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let there = next.min(now.unwrap_or(u64::MAX));
    let found = format!("{need} file descriptors, {there} may be open in a process");
    let remedy = "raise LimitNOFILE of the daemon's unit (`ulimit -Hn`) and restart it";
    let own = judge("descriptors", need, there, found, remedy);
    if own.status != Status::Ok {
        return own;
    }
    let files = std::fs::read_to_string("/proc/sys/fs/file-nr").unwrap_or_default();
    let mut files = files
        .split_ascii_whitespace()
        .map(|n| n.parse().unwrap_or(0));
    let (open, most): (u64, u64) = (
        files.next().unwrap_or(0),
        files.next_back().unwrap_or(u64::MAX),
    );
    let there = most.saturating_sub(open);
    match there < need {
        true => {
            let found = format!("{need} file descriptors, {there} more may be open on this host");
            judge(
                "descriptors",
                need,
                there,
                found,
                "raise the sysctl fs.file-max",
            )
        }
        false => own,
    }
}

fn tasks(used: Used, cgroups: &[PathBuf]) -> Check {
    let need = used.threads + 2;
    let most = ["pid_max", "threads-max"]
        .map(|name| number(&Path::new("/proc/sys/kernel").join(name)).unwrap_or(u64::MAX));
    // `/proc/loadavg` has "runnable/all" as its fourth word.
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let all = load
        .split_ascii_whitespace()
        .nth(3)
        .and_then(|word| word.split_once('/'));
    let now = all.and_then(|(_, all)| all.parse().ok()).unwrap_or(0);
    let host = most[0].min(most[1]).saturating_sub(now);
    let mut tightest = (
        host,
        "on this host".to_owned(),
        "raise the sysctls kernel.pid_max and kernel.threads-max",
    );
    if let Some((there, path)) = left(cgroups, "pids")
        && there < tightest.0
    {
        let place = format!("below pids.max of {}", path.display());
        tightest = (
            there,
            place,
            "raise that limit (TasksMax), or stop something below it",
        );
    }
    if let Some((there, uid)) = left_to_user().filter(|(there, _)| *there < tightest.0) {
        let place = format!("for uid {uid}");
        tightest = (
            there,
            place,
            "raise LimitNPROC of the daemon's unit (`ulimit -Hu`)",
        );
    }
    let (there, place, remedy) = tightest;
    let found = format!("{need} threads, {there} more may be {place}");
    judge("tasks", need, there, found, remedy)
}

/// What `RLIMIT_NPROC` leaves to our user; root has no such limit.
fn left_to_user() -> Option<(u64, u32)> {
    let uid = rustix::process::geteuid();
    let most = getrlimit(Resource::Nproc)
        .current
        .filter(|_| !uid.is_root())?;
    let uid = uid.as_raw();
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let threads = processes.filter_map(|entry| {
        let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
        (field(&status, "Uid:")? == u64::from(uid)).then(|| field(&status, "Threads:"))?
    });
    Some((most.saturating_sub(threads.sum()), uid))
}

fn judge(check: &str, need: u64, there: u64, found: String, remedy: &str) -> Check {
    match there {
        there if there < need => Check::new(check, Status::Fail, found, remedy),
        // It is there now, and may be gone when it is needed.
        there if there < need * 2 => Check::new(check, Status::Warn, found, remedy),
        _ => Check::ok(check, found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_what_it_needs_and_says_how_much() {
        let checks = look(std::process::id());
        let names: Vec<_> = checks.iter().map(|check| check.check.as_str()).collect();
        assert_eq!(names, ["memory", "descriptors", "tasks"]);
        for check in checks {
            assert!(check.found.chars().any(|c| c.is_ascii_digit()), "{check:?}");
            assert_eq!(check.remedy.is_empty(), check.status == Status::Ok);
        }
    }

    #[test]
    fn the_tightest_limit_counts_and_is_named() {
        let dir = tempfile::tempdir().expect("dir");
        let inner = dir.path().join("slice/scope");
        std::fs::create_dir_all(&inner).expect("dirs");
        let write = |at: &Path, name: &str, text: &str| {
            std::fs::write(at.join(name), text).expect("write");
        };
        write(&inner, "pids.max", "max\n");
        write(&inner, "pids.current", "9\n");
        let slice = dir.path().join("slice");
        write(&slice, "pids.max", "12\n");
        write(&slice, "pids.current", "10\n");
        let cgroups = [inner, slice.clone()];
        assert_eq!(left(&cgroups, "pids"), Some((2, slice)));
        let used = Used {
            threads: 3,
            ..Used::default()
        };
        let check = tasks(used, &cgroups);
        assert_eq!(check.status, Status::Fail);
        assert!(check.found.starts_with("5 threads, 2 more"), "{check:?}");
        assert!(check.found.contains("slice") && check.remedy.contains("TasksMax"));
    }

    #[test]
    fn what_is_nearly_gone_is_warned_of() {
        let status = |there| judge("x", 10, there, String::new(), "").status;
        assert_eq!(status(9), Status::Fail);
        assert_eq!(status(19), Status::Warn);
        assert_eq!(status(20), Status::Ok);
    }
}

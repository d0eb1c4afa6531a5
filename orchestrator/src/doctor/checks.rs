//! The checks that need no VMM.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::Resource;

use super::{Check, Status};

/// What is the same for every directory of this host.
pub(super) fn host() -> Vec<Check> {
    vec![
        systemd(),
        cgroups(),
        memlock(),
        huge_pages(),
        shmem_thp(),
        memory(),
        outlives(),
    ]
}

/// What of this host outlives its kernel.
fn outlives() -> Check {
    const NAME: &str = "outlives the kernel";
    if Path::new(stillpoint_liveupdate::DEVICE).exists() {
        return Check::ok(
            NAME,
            "memfds that live update keeps, unless the daemon was told of a carve-out",
        );
    }
    let devices = std::fs::read_dir("/sys/bus/dax/devices");
    match devices.is_ok_and(|mut devices| devices.next().is_some()) {
        true => Check::ok(NAME, "a carve-out, if the daemon was told of it"),
        false => Check::new(
            NAME,
            Status::Warn,
            "nothing: there is neither live update nor a device-dax",
            "none needed unless the host's kernel is to be swapped under guests; `stillpoint host prepare` \
             says what is missing",
        ),
    }
}

/// A directory of ours: there, ours, closed to others; or to be made.
pub(super) fn directory(check: &str, path: &Path) -> Check {
    let shown = path.display();
    let Ok(found) = std::fs::symlink_metadata(path) else {
        return Check::ok(
            check,
            format!("{shown} will be made when the daemon starts"),
        );
    };
    let own = rustix::process::geteuid().as_raw();
    let (uid, mode) = (found.uid(), found.mode() & 0o7777);
    if found.is_dir() && uid == own && mode & 0o077 == 0 {
        return Check::ok(check, format!("{shown}, mode {mode:04o}"));
    }
    let found = format!(
        "{shown} is not a directory of uid {own} with mode 0700 (uid {uid}, mode {mode:04o})"
    );
    let remedy = "chown and chmod 0700 it, or give another (`--run-dir`, `--state-dir`)";
    Check::new(check, Status::Fail, found, remedy)
}

/// SQLite is built in; that it works is shown by using it.
pub(super) fn sqlite() -> Check {
    let version = rusqlite::Connection::open_in_memory()
        .and_then(|c| c.query_row("SELECT sqlite_version()", [], |row| row.get::<_, String>(0)));
    match version {
        Ok(version) => Check::ok("sqlite", format!("{version}, built in")),
        Err(error) => Check::new(
            "sqlite",
            Status::Fail,
            error.to_string(),
            "report this as a bug",
        ),
    }
}

fn systemd() -> Check {
    if Path::new("/run/systemd/system").is_dir() {
        return Check::ok("systemd", "runs: each guest gets a scope of its own");
    }
    let remedy = "none needed; guests live in the daemon's cgroup, and nothing restarts the daemon";
    Check::new("systemd", Status::Warn, "does not run here", remedy)
}

fn cgroups() -> Check {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Check::ok("cgroups", "version 2");
    }
    let remedy = "none needed; limits per guest through systemd want version 2";
    Check::new("cgroups", Status::Warn, "version 1, or none", remedy)
}

fn memlock() -> Check {
    let limit = rustix::process::getrlimit(Resource::Memlock).current;
    match limit {
        None => Check::ok("memlock limit", "none"),
        Some(bytes) => {
            let remedy = "optional: LimitMEMLOCK=infinity lets guest RAM be locked; without it, \
                          pages swapped out make a blackout longer";
            let found = format!("{} MiB", bytes >> 20);
            Check::new("memlock limit", Status::Warn, found, remedy)
        }
    }
}

fn read(path: &str) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

fn huge_pages() -> Check {
    let pages = |size: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{size}/free_hugepages");
        read(&path).unwrap_or_else(|| "no".into())
    };
    let (two, one) = (pages("2048kB"), pages("1048576kB"));
    let found = format!("{two} of 2 MiB and {one} of 1 GiB free");
    if [&two, &one]
        .iter()
        .any(|n| !matches!(n.as_str(), "0" | "no"))
    {
        return Check::ok("huge pages", found);
    }
    let remedy = "optional: `sysctl vm.nr_hugepages=N` for `--pages hugetlb2m`; without them a \
                  successor maps large guests more slowly, while the guest runs";
    Check::new("huge pages", Status::Warn, found, remedy)
}

fn shmem_thp() -> Check {
    let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let Some(text) = read(path) else {
        let remedy = "none needed; `--pages thp` then means base pages";
        return Check::new(
            "THP for shmem",
            Status::Warn,
            "not known to this kernel",
            remedy,
        );
    };
    let chosen = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or(text.as_str(), |(chosen, _)| chosen)
        .to_owned();
    if matches!(chosen.as_str(), "never" | "deny") {
        let remedy = "optional: `echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled` \
                      for `--pages thp`; without it guest RAM has base pages";
        return Check::new("THP for shmem", Status::Warn, chosen, remedy);
    }
    Check::ok("THP for shmem", chosen)
}

fn memory() -> Check {
    let text = read("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok());
    match kib {
        Some(kib) if kib < 512 << 10 => Check::new(
            "memory",
            Status::Warn,
            format!("{} MiB available", kib >> 10),
            "end something, or give guests less",
        ),
        Some(kib) => Check::ok("memory", format!("{} MiB available", kib >> 10)),
        None => Check::new("memory", Status::Warn, "/proc/meminfo does not say", ""),
    }
}

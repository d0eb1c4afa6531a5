//! A full disk: what can't be recorded is not done, and what was done is recorded in the end.
//!
//! The disk is a tiny tmpfs in a mount namespace of the daemon's own.

mod daemon;

use std::path::PathBuf;
use std::process::Command;

use daemon::{Daemon, until};

/// A daemon whose state directory is a small disk, and the way to it; `None` where the kernel
/// lets no user make a mount namespace.
fn on_a_small_disk() -> Option<(Daemon, PathBuf)> {
    let may = Command::new("unshare").args(["-Urm", "true"]).status();
    if !may.is_ok_and(|status| status.success()) {
        eprintln!("skipped: full disk: user and mount namespaces are not permitted here");
        return None;
    }
    let mut daemon = Daemon::prepare();
    let state = daemon.path().join("state");
    std::fs::create_dir(&state).expect("state dir");
    let log = std::fs::File::create(daemon.path().join("log")).expect("log");
    let inner = daemon.command();
    let script = "mount -t tmpfs -o size=192m,mode=0700 small \"$STATE\" && exec \"$0\" \"$@\"";
    let child = Command::new("unshare")
        .args(["-Urm", "sh", "-c", script])
        .arg(inner.get_program())
        .args(inner.get_args())
        .env("STATE", &state)
        .stderr(log)
        .spawn()
        .expect("unshare");
    daemon.adopt(child);
    let inside = PathBuf::from(format!("/proc/{}/root", daemon.pid()));
    let disk = inside.join(state.strip_prefix("/").expect("absolute"));
    Some((daemon, disk.join("filler")))
}

fn fill(filler: &PathBuf) {
    use std::io::Write;
    let mut file = std::fs::File::create(filler).expect("filler");
    let block = vec![1; 1 << 20];
    while file.write_all(&block).is_ok() {}
    // The last pages, too.
    while file.write_all(&block[..512]).is_ok() {}
}

#[test]
fn what_can_not_be_recorded_is_not_done() {
    let Some((daemon, filler)) = on_a_small_disk() else {
        return;
    };
    daemon.add("1", None);
    daemon.run("web", "1").good();
    let pid = daemon.vmm_pid("web");
    fill(&filler);
    let (code, message) = daemon.ask(&["swap", "vmm", "web", "--to", "1"]).bad();
    assert_eq!(code, "store_full", "{message}");
    let (code, _) = daemon.run("other", "1").bad();
    assert_eq!(code, "store_full");
    let (code, _) = daemon.ask(&["stop", "web"]).bad();
    assert_eq!(code, "store_full");
    let vm = daemon.show("web");
    assert_eq!(
        (&vm["state"], daemon.vmm_pid("web")),
        (&"running".into(), pid)
    );
    std::fs::remove_file(&filler).expect("make room");
    assert_eq!(daemon.swap("web", "1")["state"], "moved");
}

/// Standard error on a full disk, whose page is just at its end: each line that is logged fails.
#[test]
fn a_log_that_can_not_be_written_costs_nothing() {
    let mut daemon = Daemon::prepare();
    let full = std::fs::File::options().write(true).open("/dev/full");
    let mut command = daemon.command();
    let child = command.stderr(full.expect("/dev/full")).spawn();
    daemon.adopt(child.expect("stillpointd"));
    daemon.add("1", None);
    daemon.run("web", "1").good();
    assert_eq!(daemon.swap("web", "1")["state"], "moved");
    daemon.ask(&["stop", "web"]).good();
    assert!(daemon.terminate().success());
}

#[test]
fn a_swap_that_ends_on_a_full_disk_is_recorded_when_there_is_room() {
    let Some((daemon, filler)) = on_a_small_disk() else {
        return;
    };
    daemon.add("slow", Some("slow"));
    daemon.add("1", None);
    daemon.run("web", "slow").good();
    let mut asked = daemon
        .cli(&["swap", "vmm", "web", "--to", "1"])
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("stillpoint");
    until("the handover is on its way", || {
        daemon.log().contains("phase=\"adopt\"")
    });
    fill(&filler);
    until("the daemon says that it can't record", || {
        daemon.log().contains("not recorded, will be tried again")
    });
    std::fs::remove_file(&filler).expect("make room");
    assert!(asked.wait().expect("wait").success());
    assert_eq!(daemon.show("web")["release"], "1");
}

//! Who calls by the socket, by the kernel's word; and the record of what a dead daemon had begun.

mod audited;
mod daemon;
mod papers;
mod skipped;

use std::process::Command;

use audited::{audited, is_audited};
use daemon::{Daemon, Said, until};

#[test]
fn a_change_that_a_dead_daemon_had_begun_is_on_record_as_cut_off() {
    use rustix::process::{Pid, Signal, kill_process};
    let mut daemon = Daemon::start();
    daemon.add("1", None);
    daemon.run("web", "1").good();
    // Its process stands still, so that its end takes a while.
    let pid = i32::try_from(daemon.vmm_pid("web")).expect("a pid");
    let pid = Pid::from_raw(pid).expect("a pid");
    kill_process(pid, Signal::STOP).expect("SIGSTOP");
    let stop = |daemon: &Daemon| {
        let mut command = daemon.cli(&["stop", "web", "--now"]);
        let null = std::process::Stdio::null;
        command
            .stdout(null())
            .stderr(null())
            .spawn()
            .expect("stillpoint")
    };
    let own = format!("uid {}", rustix::process::geteuid().as_raw());
    let count = |daemon: &Daemon, outcome: &str| {
        let all = audited(daemon).into_iter();
        let of = all.filter(|(who, _, path, came)| {
            *who == own && path.starts_with("/v1/vms/web/stop") && came == outcome
        });
        of.count()
    };
    let mut asked = stop(&daemon);
    until("it is begun", || count(&daemon, "under_way") == 1);
    daemon.kill();
    assert!(!asked.wait().expect("wait").success());
    daemon.spawn();
    assert_eq!(
        (count(&daemon, "under_way"), count(&daemon, "cut_off")),
        (0, 1)
    );
    assert!(
        daemon.log().contains("stillpoint audit ls"),
        "{}",
        daemon.log()
    );

    // A caller who goes away is on record, too.
    let mut asked = stop(&daemon);
    until("it is begun", || count(&daemon, "under_way") == 1);
    asked.kill().expect("kill");
    asked.wait().expect("wait");
    until("it is cut off", || count(&daemon, "cut_off") == 2);
    kill_process(pid, Signal::CONT).expect("SIGCONT");
}

/// Runs the command as another user, in these groups, against a copy that this user may run.
fn as_user(daemon: &Daemon, groups: &str, args: &[&str]) -> Said {
    let copy = daemon.path().join("stillpoint");
    if !copy.exists() {
        std::fs::copy(env!("CARGO_BIN_EXE_stillpoint"), &copy).expect("copy");
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534"]);
    match groups {
        "" => command.arg("--clear-groups"),
        groups => command.args(["--groups", groups]),
    };
    command
        .arg(copy)
        .arg("--json")
        .arg("--run-dir")
        .arg(daemon.path().join("run"))
        .args(args);
    papers::said(command.output().expect("setpriv"))
}

#[test]
fn local_users_have_the_role_of_their_group_by_the_kernels_word() {
    use std::os::unix::fs::PermissionsExt;
    let root = rustix::process::geteuid().is_root();
    if !root || Command::new("setpriv").arg("--version").output().is_err() {
        return skipped::skip("needs root and setpriv, to be other users");
    }
    let mut daemon = Daemon::prepare();
    std::fs::set_permissions(daemon.path(), PermissionsExt::from_mode(0o711)).expect("chmod");
    daemon.more(&["--operate-group", "4711", "--read-group", "4712"]);
    daemon.spawn();
    daemon.add("1", None);
    daemon.add("2", None);
    daemon.run("web", "1").good();
    let swap = &["swap", "vmm", "web", "--to", "2"];
    as_user(&daemon, "4712", &["ls"]).good();
    let (code, message) = as_user(&daemon, "4712", swap).bad();
    assert_eq!(code, "forbidden");
    assert!(
        message.contains("needs the role `operate`") && message.contains("uid 65534 has `read`"),
        "{message}"
    );
    for args in [&["ls"][..], swap] {
        let (code, message) = as_user(&daemon, "", args).bad();
        assert_eq!(code, "forbidden");
        assert!(message.contains("uid 65534 has no role here"), "{message}");
        assert!(message.contains("--operate-group"), "{message}");
    }
    assert_eq!(daemon.show("web")["release"], "1");
    as_user(&daemon, "4000,4711", swap).good();
    assert_eq!(daemon.show("web")["release"], "2");
    let (_, message) = as_user(&daemon, "4711", &["release", "rm", "1"]).bad();
    assert!(message.contains("needs the role `admin`"), "{message}");
    // By a rollout the hosts themselves are as little theirs as by hand; to look at one is.
    let kvm = [
        "rollout",
        "start",
        "--component",
        "kvm",
        "--to",
        "1.1",
        "--budget",
        "1s",
        "--detach",
    ];
    let (code, message) = as_user(&daemon, "4711", &kvm).bad();
    assert_eq!(code, "forbidden");
    assert!(
        message.contains("needs the role `admin`, and uid 65534 has `operate`"),
        "{message}"
    );
    let (code, _) = as_user(&daemon, "4711", &[&kvm[..], &["--dry-run"]].concat()).bad();
    assert_eq!(
        code, "not_found",
        "there is no such release, and that is all"
    );
    assert!(is_audited(
        &daemon,
        "uid 65534",
        "operate",
        "/v1/vms/web/swaps",
        "done"
    ));
    assert!(is_audited(
        &daemon,
        "uid 65534",
        "",
        "/v1/vms/web/swaps",
        "denied"
    ));
    // Nothing else of the run directory is open to them.
    let run = daemon.path().join("run");
    let mode = |name: &str| {
        let path = run.join(name);
        std::fs::metadata(path).expect(name).permissions().mode() & 0o777
    };
    assert_eq!(
        (mode("."), mode("vms"), mode("lock")),
        (0o711, 0o700, 0o600)
    );

    // Without groups it is closed again.
    assert!(daemon.terminate().success());
    daemon.more(&[]);
    daemon.spawn();
    assert_eq!((mode("."), mode("api.sock")), (0o700, 0o600));
    let (_, message) = as_user(&daemon, "4711", &["ls"]).bad();
    assert!(
        message.contains("may not use the daemon's socket"),
        "{message}"
    );
}

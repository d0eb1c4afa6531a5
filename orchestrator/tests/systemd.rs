//! What the daemon says to systemd, heard on a socket of the test's own.

mod daemon;
mod wire;

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use daemon::Daemon;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

/// The socket that systemd would own.
struct Ear(UnixDatagram);

impl Ear {
    fn at(daemon: &Daemon) -> Self {
        let socket = UnixDatagram::bind(daemon.path().join("notify")).expect("bind");
        let patience = Some(Duration::from_secs(20));
        socket.set_read_timeout(patience).expect("patience");
        Self(socket)
    }

    /// The next message that says `what`, with its fds.
    fn hear(&self, what: &str) -> (String, Vec<OwnedFd>) {
        loop {
            let mut bytes = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut slices = [std::io::IoSliceMut::new(&mut bytes)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let message = rustix::net::recvmsg(&self.0, &mut slices, &mut ancillary, flags)
                .unwrap_or_else(|e| panic!("waiting for {what}: {e}"));
            let mut fds = Vec::new();
            for part in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = part {
                    fds.extend(rights);
                }
            }
            let text = String::from_utf8_lossy(&bytes[..message.bytes]).into_owned();
            if text.contains(what) {
                return (text, fds);
            }
        }
    }
}

#[test]
fn systemd_hears_of_start_end_and_keeps_what_guests_need() {
    let mut daemon = Daemon::prepare();
    let ear = Ear::at(&daemon);
    let mut command = daemon.command();
    command.env("NOTIFY_SOCKET", daemon.path().join("notify"));
    daemon.adopt(command.spawn().expect("stillpointd"));
    ear.hear("READY=1");
    daemon.add("1", None);
    daemon.run("web", "1").good();
    let (text, ram) = ear.hear("FDNAME=ram-web");
    assert!(text.contains("FDSTORE=1"), "{text}");
    let size = rustix::fs::fstat(ram.first().expect("an fd").as_fd())
        .expect("stat")
        .st_size;
    assert_eq!(size, 1 << 20, "the toy's RAM");
    let (text, own) = ear.hear("FDNAME=own-web");
    assert!(text.contains("FDSTORE=1") && own.len() == 1, "{text}");
    daemon.ask(&["stop", "web"]).good();
    assert!(ear.hear("FDNAME=ram-web").0.contains("FDSTOREREMOVE=1"));
    assert!(ear.hear("FDNAME=own-web").0.contains("FDSTOREREMOVE=1"));
    assert!(daemon.terminate().success());
    ear.hear("STOPPING=1");
}

/// The unit as it is shipped: a daemon that dies is there again at once, however often. A key in a section
/// where systemd does not look for it is ignored with a warning that nobody reads.
#[test]
fn the_unit_starts_a_daemon_that_died_at_once_and_for_ever() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/stillpointd.service");
    let unit = std::fs::read_to_string(path).expect("the unit");
    let (of_unit, rest) = unit.split_once("[Service]").expect("sections");
    let has = |text: &str, line: &str| text.lines().any(|l| l == line);
    assert!(has(of_unit, "StartLimitIntervalSec=0"), "{of_unit}");
    assert!(has(rest, "Restart=always"), "{rest}");
    assert!(has(rest, "RestartSec=100ms"), "{rest}");
    let dir = tempfile::tempdir().expect("temp dir");
    let copy = dir.path().join("stillpointd.service");
    // It need not be installed to be looked at.
    let unit = unit.replace("/usr/bin/stillpointd", "/bin/true");
    std::fs::write(&copy, unit).expect("copy");
    let verify = std::process::Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(&copy)
        .output();
    match verify {
        Ok(said) => {
            let said = String::from_utf8_lossy(&said.stderr).into_owned();
            assert!(!said.contains("stillpointd.service:"), "{said}");
        }
        Err(error) => eprintln!("systemd-analyze does not look at it: {error}"),
    }
}

#[test]
fn what_systemd_kept_for_no_guest_is_let_go() {
    let mut daemon = Daemon::prepare();
    let ear = Ear::at(&daemon);
    let kept = rustix::fs::memfd_create("kept-ram", rustix::fs::MemfdFlags::CLOEXEC);
    // LISTEN_PID must be the daemon's own, which only the shell that becomes it knows.
    let inner = daemon.command();
    let mut command = std::process::Command::new("sh");
    command
        .args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""])
        .arg(inner.get_program())
        .args(inner.get_args())
        .env("NOTIFY_SOCKET", daemon.path().join("notify"))
        .env("LISTEN_FDS", "1")
        .env("LISTEN_FDNAMES", "ram-gone")
        .fd_mappings(vec![FdMapping {
            parent_fd: kept.expect("memfd"),
            child_fd: 3,
        }])
        .expect("fd 3");
    daemon.adopt(command.spawn().expect("stillpointd"));
    assert!(ear.hear("FDNAME=ram-gone").0.contains("FDSTOREREMOVE=1"));
    ear.hear("READY=1");
    let fds = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("fds");
    for fd in fds.flatten() {
        let target = std::fs::read_link(fd.path()).unwrap_or_default();
        assert!(!target.to_string_lossy().contains("kept-ram"), "still held");
    }
}

/// The units that we ship are what systemd takes for units.
#[test]
fn unit_files_are_sound() {
    let analyze = std::process::Command::new("systemd-analyze")
        .arg("--version")
        .output();
    if analyze.is_err() {
        return wire::skip("unit_files_are_sound", "no systemd-analyze here");
    }
    let dir = tempfile::tempdir().expect("temp dir");
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    for unit in [
        "systemd/stillpointd.service",
        "../guest-images/agent/stillpoint-agent.service",
        "../guest-images/agent/stillpoint-events.service",
        "../guest-images/agent/stillpoint-relay.service",
    ] {
        let text = std::fs::read_to_string(root.join(unit)).expect(unit);
        // What it starts is not installed here.
        let program = |line: &str| match line.split_once("=/") {
            Some((key, rest)) if key.starts_with("ExecStart") && !key.ends_with("Pre") => {
                let arguments = rest.split_once(' ').map_or("", |(_, arguments)| arguments);
                format!("{key}=/bin/true {arguments}")
            }
            _ => line.to_owned(),
        };
        let lines: Vec<_> = text.lines().map(program).collect();
        assert!(
            lines.iter().any(|line| line.contains("=/bin/true")),
            "{unit}"
        );
        let path = dir
            .path()
            .join(root.join(unit).file_name().expect("a name"));
        std::fs::write(&path, lines.join("\n")).expect("a copy");
        let mut command = std::process::Command::new("systemd-analyze");
        let output = command
            .args(["verify", "--man=no"])
            .arg(&path)
            .output()
            .expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr);
        let of_ours = said.lines().filter(|line| line.contains("stillpoint"));
        let of_ours: Vec<_> = of_ours.collect();
        assert!(
            output.status.success() && of_ours.is_empty(),
            "{unit}: {said}"
        );
    }
}

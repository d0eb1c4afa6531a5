//! What the daemon sends to journald, heard on a socket in its place: in a mount namespace of the daemon's own.

mod daemon;
mod skipped;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use daemon::{Daemon, until};
use skipped::skip;

/// The fields of an entry, in journald's own protocol.
fn entry(mut bytes: &[u8]) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
        let line = String::from_utf8(bytes[..end].to_vec()).expect("UTF-8");
        bytes = &bytes[end + 1..];
        let (name, value) = match line.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            // A name alone: eight bytes of length, and the value.
            None => {
                let (length, rest) = bytes.split_first_chunk::<8>().expect("a length");
                let length = usize::try_from(u64::from_le_bytes(*length)).expect("short");
                let value = String::from_utf8(rest[..length].to_vec()).expect("UTF-8");
                bytes = &rest[length + 1..];
                (line, value)
            }
        };
        fields.insert(name, value);
    }
    fields
}

/// A command that runs another where `/run/systemd/journal` is that directory, for itself alone.
fn where_journal_is(dir: &Path, command: &Command) -> Command {
    let script = "mount -t tmpfs none /run && mkdir -p /run/systemd/journal && mount --bind \"$0\" /run/systemd/journal \
                  && exec \"$@\"";
    let mut unshared = Command::new("unshare");
    unshared.args(["--mount", "sh", "-c", script]).arg(dir);
    unshared.arg(command.get_program()).args(command.get_args());
    unshared.stdin(Stdio::null());
    unshared
}

#[test]
fn under_systemd_entries_have_the_ids_of_what_they_tell_of() {
    let mut daemon = Daemon::prepare();
    let journal = daemon.path().join("journal");
    std::fs::create_dir(&journal).expect("dir");
    let socket = UnixDatagram::bind(journal.join("socket")).expect("bind");
    let may = where_journal_is(&journal, &Command::new("true"))
        .stderr(Stdio::null())
        .status();
    if !may.is_ok_and(|status| status.success()) {
        return skip("no mount namespace can be made here; that needs root");
    }
    // Read from the start: few entries fit into the socket, and then the daemon waits.
    let heard: Arc<Mutex<Vec<BTreeMap<String, String>>>> = Arc::default();
    let hears = heard.clone();
    std::thread::spawn(move || {
        let mut bytes = vec![0; 1 << 20];
        while let Ok(length) = socket.recv(&mut bytes) {
            hears.lock().expect("lock").push(entry(&bytes[..length]));
        }
    });
    let log = std::fs::File::create(daemon.path().join("log")).expect("log");
    let stream = log.metadata().expect("its inode");
    let mut command = where_journal_is(&journal, &daemon.command());
    command.env(
        "JOURNAL_STREAM",
        format!("{}:{}", stream.dev(), stream.ino()),
    );
    command
        .env_remove("NOTIFY_SOCKET")
        .env_remove("STILLPOINT_STORE")
        .stderr(log);
    daemon.adopt(command.spawn().expect("unshare"));
    for release in ["good", "next"] {
        daemon.add(release, None);
    }
    daemon.run("web", "good").good();
    let started = daemon.ask(&[
        "rollout",
        "start",
        "--detach",
        "--to",
        "next",
        "--bake",
        "0s",
        "--well-for",
        "50ms",
        "--notice",
        "0s",
    ]);
    let rollout = started.good()["rollout"]["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let find = |says: &str| {
        let heard = heard.lock().expect("lock");
        let found = heard.iter().find(|entry| {
            entry.get("STILLPOINT_ROLLOUT") == Some(&rollout) && entry["MESSAGE"].contains(says)
        });
        found.cloned()
    };
    for says in ["the rollout is finished", "the swap is over"] {
        until(&format!("{says}, of that rollout"), || find(says).is_some());
    }
    let over = find("the swap is over").expect("it was heard");
    let field = |name: &str| over.get(name).map(String::as_str).unwrap_or_default();
    assert_eq!(field("STILLPOINT_VM"), "web");
    assert_eq!(field("STILLPOINT_OUTCOME"), "moved");
    assert!(field("STILLPOINT_SWAP").starts_with(&rollout), "{over:?}");
    assert_eq!(field("PRIORITY"), "6");
    assert_eq!(field("SYSLOG_IDENTIFIER"), "stillpointd");
    assert_eq!(daemon.log(), "", "nothing beside that");
}

#[test]
fn elsewhere_lines_go_to_standard_error() {
    // What systemd named for another process, as a daemon that was started from a service's shell has it.
    let mut daemon = Daemon::prepare();
    daemon.env("JOURNAL_STREAM", "8:1");
    daemon.spawn();
    until("it says that it is ready", || {
        daemon.log().contains("ready")
    });
    daemon.terminate();
    // Asked for as JSON it is JSON, wherever standard error leads.
    let log = std::fs::File::create(daemon.path().join("log")).expect("log");
    let stream = log.metadata().expect("its inode");
    let named = format!("{}:{}", stream.dev(), stream.ino());
    let mut command = daemon.command();
    command
        .arg("--json-logs")
        .env("JOURNAL_STREAM", &named)
        .stderr(log);
    daemon.adopt(command.spawn().expect("stillpointd"));
    daemon.terminate();
    for line in daemon.log().lines() {
        serde_json::from_str::<serde_json::Value>(line).expect(line);
    }
    // Where nobody listens in journald's place, standard error has it, and the reason.
    let log = std::fs::File::create(daemon.path().join("log")).expect("log");
    let stream = log.metadata().expect("its inode");
    let mut command = daemon.command();
    command.env(
        "JOURNAL_STREAM",
        format!("{}:{}", stream.dev(), stream.ino()),
    );
    if Path::new("/run/systemd/journal/socket").exists() {
        return;
    }
    daemon.adopt(command.stderr(log).spawn().expect("stillpointd"));
    until("it says that it is ready", || {
        daemon.log().contains("ready")
    });
    let log = daemon.log();
    assert!(
        log.contains("journald can't be spoken to directly") && log.contains("ready"),
        "{log}"
    );
}

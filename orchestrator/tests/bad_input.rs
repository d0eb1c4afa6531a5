//! Bad input: each has its own text, and leaves guest and store as they were.

mod daemon;

use daemon::Daemon;

#[test]
fn a_second_daemon_is_refused() {
    let daemon = Daemon::start();
    let said = daemon.refused();
    assert!(said.contains("another stillpointd serves"), "{said}");
}

#[test]
fn a_locked_store_is_refused() {
    let mut daemon = Daemon::start();
    daemon.terminate();
    let path = daemon.path().join("state/store.sqlite");
    // Before it is locked: closing any fd of the file would drop this process's locks.
    let before = std::fs::read(&path).expect("read");
    let holder = rusqlite::Connection::open(&path).expect("open");
    holder
        .execute_batch("PRAGMA locking_mode=EXCLUSIVE; BEGIN EXCLUSIVE")
        .expect("lock");
    let said = daemon.refused();
    assert!(said.contains("is locked by another process"), "{said}");
    drop(holder);
    assert!(
        std::fs::read(&path).expect("read") == before,
        "it was changed"
    );
    daemon.spawn();
}

#[test]
fn a_damaged_store_is_refused_and_left_as_it_is() {
    let mut daemon = Daemon::start();
    daemon.terminate();
    let path = daemon.path().join("state/store.sqlite");
    let mut bytes = std::fs::read(&path).expect("read");
    // The header stays, the pages behind it don't.
    bytes[100..].fill(0x5a);
    std::fs::write(&path, &bytes).expect("write");
    let said = daemon.refused();
    assert!(said.contains("is damaged"), "{said}");
    assert!(
        std::fs::read(&path).expect("read") == bytes,
        "it was changed"
    );
}

#[test]
fn a_directory_open_to_others_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let daemon = Daemon::prepare();
    let run = daemon.path().join("run");
    std::fs::create_dir(&run).expect("dir");
    std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o777)).expect("chmod");
    let said = daemon.refused();
    assert!(said.contains("has mode 0777"), "{said}");
}

#[test]
fn a_bad_spec_names_its_field() {
    let daemon = Daemon::start();
    daemon.add("1", None);
    let refused = |spec: &str, field: &str| {
        let file = daemon.path().join("spec.json");
        std::fs::write(&file, spec).expect("write");
        let (code, message) = daemon
            .ask(&["run", "--spec", file.to_str().expect("UTF-8")])
            .bad();
        assert_eq!(code, "bad_request");
        assert!(message.contains(&format!("`{field}`")), "{message}");
    };
    refused(r#"{"name":"a","kernel":{"path":"/k"},"cpu":2}"#, "cpu");
    refused(r#"{"name":"a","kernel":{"path":"/k"},"cpus":0}"#, "cpus");
    refused(r#"{"name":"../a","kernel":{"path":"/k"}}"#, "name");
    refused(r#"{"name":"a","kernel":{"path":""}}"#, "kernel.path");
    refused(
        r#"{"name":"a","kernel":{"path":"/k"},"memory":{"size":5}}"#,
        "memory.size",
    );
    // The daemon checks for itself: other clients exist.
    let body = r#"{"spec":{"name":"a","cpus":0,"kernel":{"path":"/k"}}}"#;
    let (status, text) = put(&daemon, "a", body);
    assert!(status == 400 && text.contains("`cpus`"), "{status} {text}");
    let (status, text) = put(
        &daemon,
        "a",
        r#"{"spec":{"name":"a","kernel":{"path":"k"}}}"#,
    );
    assert!(
        status == 400 && text.contains("`kernel.path`"),
        "{status} {text}"
    );
    let (status, text) = put(
        &daemon,
        "b",
        r#"{"spec":{"name":"a","kernel":{"path":"/k"}}}"#,
    );
    assert!(status == 400 && text.contains("`name`"), "{status} {text}");
    let (status, text) = put(
        &daemon,
        "a",
        r#"{"spec":{"name":"a","kernel":{"path":"/k","x":1}}}"#,
    );
    assert!(status == 400 && text.contains("`x`"), "{status} {text}");
    assert_eq!(
        daemon.ask(&["ls"]).good(),
        serde_json::json!([]),
        "nothing was recorded"
    );
}

/// A request as any program would send it.
fn put(daemon: &Daemon, name: &str, body: &str) -> (u16, String) {
    use std::io::{Read, Write};
    let socket = daemon.path().join("run/api.sock");
    let mut stream = std::os::unix::net::UnixStream::connect(socket).expect("connect");
    let len = body.len();
    write!(
        stream,
        "PUT /v1/vms/{name} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
         Connection: close\r\nContent-Length: {len}\r\n\r\n{body}"
    )
    .expect("send");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("answer");
    let status = text.split(' ').nth(1).and_then(|s| s.parse().ok());
    (status.expect("a status"), text)
}

#[test]
fn a_second_guest_of_the_same_name_is_refused() {
    let daemon = Daemon::start();
    daemon.add("1", None);
    daemon.run("web", "1").good();
    let pid = daemon.vmm_pid("web");
    let (code, message) = daemon.run("web", "1").bad();
    assert_eq!(code, "name_taken", "{message}");
    assert_eq!(daemon.vmm_pid("web"), pid);
}

#[test]
fn a_guest_that_does_not_start_says_why_and_may_be_tried_again() {
    let daemon = Daemon::start();
    daemon.add("1", None);
    daemon.add("dies", Some("crash-at-start"));
    let (code, message) = daemon
        .ask(&["run", "a", "--kernel", "/nowhere/k", "--release", "1"])
        .bad();
    assert_eq!(code, "start_failed");
    assert!(message.contains("/nowhere/k is not there"), "{message}");
    let (code, message) = daemon.run("a", "dies").bad();
    assert_eq!(code, "start_failed");
    assert!(
        message.contains("signal 6") && message.contains("crashing as told"),
        "{message}"
    );
    assert_eq!(daemon.show("a")["state"], "failed");
    daemon.run("a", "1").good();
    let (code, _) = daemon.run("b", "no-such").bad();
    assert_eq!(code, "not_found");
}

#[test]
fn swaps_that_can_not_be_are_refused_and_the_guest_goes_on() {
    let daemon = Daemon::start();
    daemon.add("1", None);
    daemon.run("web", "1").good();
    let pid = daemon.vmm_pid("web");
    let refused = |name: &str, to: &str| daemon.ask(&["swap", "vmm", name, "--to", to]).bad();

    let (code, message) = refused("nobody", "1");
    assert!(
        code == "not_found" && message.contains("nobody"),
        "{message}"
    );
    let (code, message) = refused("web", "9.9.9");
    assert!(
        code == "not_found" && message.contains("9.9.9"),
        "{message}"
    );
    let far = daemon.toy("7.0.0", &[7], &[7]);
    daemon
        .ask(&["release", "add", far.to_str().expect("UTF-8"), "--unsigned"])
        .good();
    let (code, message) = refused("web", "7.0.0");
    assert_eq!(code, "no_common_format");
    assert!(
        message.contains("[7]") && message.contains("[2, 1]"),
        "{message}"
    );
    let (code, _) = daemon
        .ask(&["swap", "vmm", "web", "--to", "1", "--budget", "31s"])
        .bad();
    assert_eq!(code, "bad_request");
    let (code, message) = daemon
        .ask(&["swap", "vmm", "web", "--to", "1", "--clock", "hold"])
        .bad();
    assert!(
        code == "bad_request" && message.contains("`clock`") && message.contains("vsock"),
        "{message}"
    );
    assert_eq!(daemon.vmm_pid("web"), pid);
    assert_eq!(
        daemon.ask(&["report"]).good(),
        serde_json::json!([]),
        "nothing was recorded"
    );

    daemon.ask(&["stop", "web"]).good();
    let (code, message) = refused("web", "1");
    assert!(
        code == "not_running" && message.contains("stopped"),
        "{message}"
    );
    let (code, _) = daemon.ask(&["stop", "web"]).bad();
    assert_eq!(code, "not_running");
}

#[test]
fn a_binary_that_was_tampered_with_is_not_run() {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    let daemon = Daemon::start();
    daemon.add("1", None);
    daemon.add("2", None);
    daemon.run("web", "1").good();
    let pid = daemon.vmm_pid("web");
    let binary = daemon.path().join("state/releases/2/stillpoint-vmm");
    std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o700)).expect("chmod");
    let mut file = std::fs::File::options()
        .append(true)
        .open(&binary)
        .expect("open");
    file.write_all(b"!").expect("tamper");
    drop(file);
    let (code, message) = daemon.ask(&["swap", "vmm", "web", "--to", "2"]).bad();
    assert_eq!(code, "digest_mismatch");
    let digests = message
        .split(' ')
        .filter(|w| w.trim_end_matches(',').len() == 64);
    assert_eq!(digests.count(), 2, "both digests are named: {message}");
    assert_eq!(daemon.vmm_pid("web"), pid);
    let (code, message) = daemon.run("other", "2").bad();
    assert_eq!(code, "start_failed");
    assert!(message.contains("not the one that was added"), "{message}");
}

#[test]
fn a_file_that_is_no_release_is_not_added() {
    let daemon = Daemon::start();
    let (code, message) = daemon
        .ask(&["release", "add", "/bin/true", "--unsigned"])
        .bad();
    assert_eq!(code, "not_a_release", "{message}");
    let text = daemon.path().join("text");
    std::fs::write(&text, "hello").expect("write");
    let (code, message) = daemon
        .ask(&[
            "release",
            "add",
            text.to_str().expect("UTF-8"),
            "--unsigned",
        ])
        .bad();
    assert_eq!(code, "not_a_release", "{message}");
    // A release never changes: the same version with other arguments is another release.
    daemon.add("1", None);
    daemon.add("1", None);
    let toy = daemon.path().join("toy-0.2.0");
    let toy = toy.to_str().expect("UTF-8");
    let (code, _) = daemon
        .ask(&[
            "release",
            "add",
            toy,
            "--unsigned",
            "--as",
            "1",
            "--arg=--toy=hang",
        ])
        .bad();
    assert_eq!(code, "release_exists");
    let releases = daemon.ask(&["release", "ls"]).good();
    let ones = releases
        .as_array()
        .map(|all| all.iter().filter(|r| r["version"] == "1").count());
    assert_eq!(ones, Some(1));
}

#[test]
fn stale_sockets_are_cleared_and_strange_ones_are_not() {
    use std::os::unix::net::UnixListener;
    let mut daemon = Daemon::start();
    daemon.add("1", None);
    daemon.kill();
    assert!(
        daemon.path().join("run/api.sock").exists(),
        "left by the killed daemon"
    );
    let dir = daemon.path().join("run/vms/web");
    std::fs::create_dir_all(&dir).expect("dir");
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).expect("chmod");
    drop(UnixListener::bind(dir.join("control.sock")).expect("bind"));
    daemon.spawn();
    daemon.run("web", "1").good();
    daemon.ask(&["stop", "web"]).good();
    // Somebody listens: not ours to remove, and no place for a guest.
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        None,
    )
    .expect("socket");
    let path = dir.join("control.sock");
    let address = rustix::net::SocketAddrUnix::new(&path).expect("address");
    rustix::net::bind(&socket, &address).expect("bind");
    rustix::net::listen(&socket, 1).expect("listen");
    let (code, message) = daemon.run("web", "1").bad();
    assert_eq!(code, "start_failed");
    assert!(message.contains("something answers"), "{message}");
}

#[test]
fn without_a_daemon_the_error_says_how_to_start_one() {
    let daemon = Daemon::prepare();
    let (code, message) = daemon.ask(&["ls"]).bad();
    assert!(
        code == "no_daemon" && message.contains("stillpointd"),
        "{message}"
    );
    let said = daemon.ask(&["doctor"]);
    assert!(
        said.out.as_array().is_some_and(|found| found.len() > 5),
        "{said:?}"
    );
}

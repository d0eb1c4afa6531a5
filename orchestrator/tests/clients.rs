//! Programs that nobody here wrote, unmodified, as guests run them: from Debian's archive and from Python's
//! package index. What can't be fetched is skipped, with the reason.

mod daemon;
mod wire;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;

use daemon::{Daemon, until};
use serde_json::Value;
use wire::{guest, is_inside, run, sh, skip, until_served};

/// What Debian 12 ships, and the digest of its package.
const AGENT: (&str, &str) = (
    "resource-agents=1:4.12.0-2",
    "8e4194dc833f7fa83ea976516774a8ad1cbb4a362037d1efbf217e97b1f27b43",
);
const EVENTS: &str = "http://169.254.169.254/metadata/scheduledevents?api-version=2020-07-01";

/// A place for what is fetched, kept from run to run.
fn fetched(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Runs it; its output, or why it failed.
fn tried(command: &mut Command) -> Result<Output, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        return Ok(output);
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(format!(
        "{command:?}: {}",
        error.trim().lines().last().unwrap_or_default()
    ))
}

/// Debian's cluster agents, unpacked: once, as two tests that do so at the same time are in each other's way.
fn cluster_agents() -> Result<PathBuf, String> {
    static UNPACKED: LazyLock<Result<PathBuf, String>> = LazyLock::new(unpack_agents);
    UNPACKED.clone()
}

fn unpack_agents() -> Result<PathBuf, String> {
    let (package, digest) = AGENT;
    let place = fetched("resource-agents");
    let file = place.join("package.deb");
    std::fs::create_dir_all(&place).map_err(|e| e.to_string())?;
    if !file.exists() {
        let mut download = Command::new("apt-get");
        tried(
            download
                .args(["download", "-q", package])
                .current_dir(&place),
        )?;
        let name = tried(
            Command::new("sh")
                .args(["-c", "ls *.deb"])
                .current_dir(&place),
        )?;
        let name = String::from_utf8_lossy(&name.stdout).trim().to_owned();
        std::fs::rename(place.join(name), &file).map_err(|e| e.to_string())?;
    }
    let sum = tried(Command::new("sha256sum").arg(&file))?;
    let sum = String::from_utf8_lossy(&sum.stdout).into_owned();
    assert!(sum.starts_with(digest), "another package: {sum}");
    let root = place.join("root");
    tried(Command::new("dpkg-deb").arg("-x").args([&file, &root]))?;
    Ok(root.join("usr/lib/ocf"))
}

/// Python packages, pinned with their digests, in a directory of their own.
fn packages() -> Result<PathBuf, String> {
    let list = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/clients/requirements.txt"
    );
    let place = fetched("python");
    let done = place.join("done");
    let wanted = std::fs::read(list).map_err(|e| e.to_string())?;
    if std::fs::read(&done).is_ok_and(|had| had == wanted) {
        return Ok(place);
    }
    let mut pip = Command::new("python3");
    pip.args([
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
    ]);
    pip.args([
        "--only-binary",
        ":all:",
        "--require-hashes",
        "--upgrade",
        "-r",
        list,
        "--target",
    ]);
    tried(pip.arg(&place))?;
    std::fs::write(&done, wanted).map_err(|e| e.to_string())?;
    Ok(place)
}

fn prepared(name: &str, fetched: Result<PathBuf, String>) -> Option<PathBuf> {
    match fetched {
        Ok(place) => Some(place),
        Err(reason) => {
            skip(name, &reason);
            None
        }
    }
}

/// A guest that knows its gateway, as most do.
fn with_gateway(number: u32) {
    let address = format!("10.0.{number}.2");
    guest(number, &address, &format!("52:54:00:00:00:0{number}"));
    sh(&format!(
        "ip address add 10.0.{number}.1/24 dev t{number}
         ip -n g{number} route add default via 10.0.{number}.1"
    ));
}

/// One guest, and the daemon.
fn scene() -> Daemon {
    with_gateway(1);
    let daemon = wire::daemon();
    run(&daemon, "web-1", "t1");
    until_served(1, "web-1");
    daemon
}

fn in_guest(program: &str) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", "g1", program]);
    command
}

fn swap(daemon: &Daemon) -> Child {
    let mut command = daemon.cli(&["swap", "vmm", "web-1", "--to", "next"]);
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("stillpoint")
}

fn state_of(daemon: &Daemon) -> Value {
    daemon.ask(&["events", "ls", "--all"]).good()[0]["state"].clone()
}

/// One of Debian's cluster agents, as a cluster runs it that asks every ten seconds: once.
fn monitor(ocf: &Path, agent: &str, guest: u32, attributes: &Path) {
    // Each time it is several requests, of five a second.
    std::thread::sleep(std::time::Duration::from_secs(1));
    // The cluster around it: shell scripts that keep attributes in files.
    let cluster = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/cluster");
    let path = format!("{cluster}:{}", std::env::var("PATH").unwrap_or_default());
    let as_node = format!("hostname node-{guest} && exec python3 \"$0\" monitor");
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &format!("g{guest}"), "unshare", "-u"]);
    command
        .args(["sh", "-c", &as_node])
        .arg(ocf.join("resource.d/heartbeat").join(agent));
    command
        .env("PATH", path)
        .env("ATTRIBUTES", attributes)
        .env("NODES", "node-1 node-2")
        .env("OCF_ROOT", ocf)
        .env("OCF_RESKEY_eventTypes", "Freeze");
    let output = command.output().expect("the agent");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

/// The cluster agent of Debian: it puts its node into standby, approves when nothing runs there any
/// more, and takes the node back when the event is gone.
#[test]
fn a_cluster_agent_from_debian() {
    let name = "a_cluster_agent_from_debian";
    let Some(ocf) = prepared(name, cluster_agents()) else {
        return;
    };
    if !is_inside(name) {
        return;
    }
    let daemon = scene();
    let attributes = daemon.path().join("cluster");
    std::fs::create_dir(&attributes).expect("a cluster");
    let monitor = || monitor(&ocf, "azure-events-az", 1, &attributes);
    let attribute = |key: &str| {
        let mut files = std::fs::read_dir(&attributes)
            .expect("attributes")
            .flatten();
        let file = files.find(|file| file.file_name().to_string_lossy().ends_with(key));
        file.map(|file| std::fs::read_to_string(file.path()).expect("an attribute"))
    };
    monitor();
    assert_eq!(attribute("curNodeState"), None, "nothing is to come");
    let child = swap(&daemon);
    until("the event is there", || state_of(&daemon) == "scheduled");
    until("its node goes into standby", || {
        monitor();
        attribute("health-azure").as_deref() == Some("-1000000")
    });
    assert_eq!(attribute("curNodeState").as_deref(), Some("STOPPING"));
    assert_eq!(
        state_of(&daemon),
        "scheduled",
        "not approved before its node is empty"
    );
    until("it approves", || {
        monitor();
        attribute("curNodeState").as_deref() == Some("IN_EVENT")
    });
    let output = child.wait_with_output().expect("stillpoint");
    assert!(output.status.success());
    let pause = &daemon.ask(&["events", "ls", "--all"]).good()[0];
    assert_eq!(
        pause["notices"][0]["approval"]["by"]["vm"], "web-1",
        "{pause}"
    );
    until("its node is back", || {
        monitor();
        attribute("curNodeState").as_deref() == Some("AVAILABLE")
    });
    assert_eq!(attribute("health-azure").as_deref(), Some("0"));
}

/// Debian's other cluster agent, on two nodes that are one availability set: the node that is to be paused
/// goes into standby, and the other one approves when nothing runs there any more.
#[test]
fn a_cluster_of_two_whose_nodes_approve_for_each_other() {
    let name = "a_cluster_of_two_whose_nodes_approve_for_each_other";
    let Some(ocf) = prepared(name, cluster_agents()) else {
        return;
    };
    if !is_inside(name) {
        return;
    }
    let daemon = wire::daemon();
    for number in [1, 2] {
        with_gateway(number);
        let (vm, net) = (format!("web-{number}"), format!("tap=t{number}"));
        daemon
            .run_with(&vm, "good", &["--net", &net, "--set", "web"])
            .good();
        until_served(number, &vm);
    }
    let attributes = daemon.path().join("cluster");
    std::fs::create_dir(&attributes).expect("a cluster");
    let monitor = |node: u32| monitor(&ocf, "azure-events", node, &attributes);
    let attribute = |node: u32, key: &str| {
        let file = attributes.join(format!("node-{node}-{key}"));
        std::fs::read_to_string(file).unwrap_or_default()
    };
    let state = "azure-events_curNodeState";
    monitor(1);
    monitor(2);
    let child = swap(&daemon);
    until("the event is there", || state_of(&daemon) == "scheduled");
    until("its node goes into standby", || {
        monitor(1);
        attribute(1, "standby") == "on"
    });
    assert_eq!(attribute(1, state), "STOPPING");
    assert_eq!(state_of(&daemon), "scheduled");
    until("the other node approves", || {
        monitor(2);
        attribute(1, state) == "IN_EVENT"
    });
    let output = child.wait_with_output().expect("stillpoint");
    assert!(output.status.success());
    let pause = &daemon.ask(&["events", "ls", "--all"]).good()[0];
    assert_eq!(
        pause["notices"][0]["approval"]["by"]["vm"], "web-2",
        "{pause}"
    );
    until("its node is back", || {
        monitor(1);
        attribute(1, state) == "AVAILABLE" && attribute(1, "standby") == "off"
    });
    monitor(2);
    assert_eq!(
        attribute(2, "standby"),
        "",
        "the other node was never touched"
    );
}

/// A worker of a Python cluster with the plugin that polls for events, and a program that finds out
/// in which cloud it is.
#[test]
fn a_worker_and_a_cloud_detector_from_pypi() {
    let name = "a_worker_and_a_cloud_detector_from_pypi";
    let Some(place) = prepared(name, packages()) else {
        return;
    };
    if !is_inside(name) {
        return;
    }
    let daemon = scene();
    let python = |script: &str| {
        let mut command = in_guest("python3");
        command
            .args(["-W", "ignore", "-c", script])
            .env("PYTHONPATH", &place);
        command.env("PLACE", &place).stdout(Stdio::piped());
        command
    };
    let detect = python("import cloud_detect; print(cloud_detect.provider(timeout=30))").output();
    let detected = String::from_utf8_lossy(&detect.expect("python").stdout)
        .trim()
        .to_owned();
    assert_eq!(detected, "azure");
    let script = include_str!("clients/worker.py");
    let listens = || wire::curl(1, EVENTS).is_some_and(|text| text.contains("\"Events\":[]"));
    until("the guest is served", listens);
    let child = swap(&daemon);
    until("the event is there", || state_of(&daemon) == "scheduled");
    let id = daemon.ask(&["events", "ls"]).good()[0]["notices"][0]["event"].clone();
    let mut worker = python(script).stdin(Stdio::null()).spawn().expect("python");
    let said = BufReader::new(worker.stdout.take().expect("its output"));
    let mut said = said.lines().map_while(Result::ok);
    let announced = said.next().unwrap_or_default();
    assert!(announced.starts_with("announced for 20"), "{announced}");
    assert_eq!(state_of(&daemon), "scheduled");
    // The plugin reads and never approves; an operator does.
    daemon
        .ask(&["events", "approve", id.as_str().expect("an id")])
        .good();
    assert!(
        child
            .wait_with_output()
            .expect("stillpoint")
            .status
            .success()
    );
    let rest: Vec<String> = said.collect();
    assert_eq!(rest, ["closed gracefully"]);
    assert!(worker.wait().expect("the worker").success());
}

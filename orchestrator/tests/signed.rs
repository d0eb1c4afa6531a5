//! Releases and their signatures, from `release manifest` and minisign to the start of a VMM.

mod daemon;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use daemon::Daemon;
use minisign::{KeyPair, PublicKey, SecretKey};
use serde_json::{Value, json};

/// Somebody who publishes releases.
struct Publisher {
    public: PublicKey,
    secret: SecretKey,
}

impl Publisher {
    fn new() -> Self {
        let KeyPair { pk, sk } = KeyPair::generate_unencrypted_keypair().expect("a key pair");
        Self {
            public: pk,
            secret: sk,
        }
    }

    /// Its public key, as a file.
    fn key(&self, dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        let text = self.public.to_box().expect("a box").into_string();
        std::fs::write(&path, text).expect("write");
        path.display().to_string()
    }

    /// Signs a file, as `minisign -S` does.
    fn sign(&self, path: &Path) {
        let bytes = std::fs::read(path).expect("read");
        let comment = Some("a release for tests");
        let signed = minisign::sign(None, &self.secret, &bytes[..], comment, None).expect("sign");
        std::fs::write(beside(path, ".minisig"), signed.into_string()).expect("write");
    }

    /// Publishes a toy: its manifest beside it, and the manifest's signature.
    fn publish(&self, daemon: &Daemon, version: &str) -> PathBuf {
        let toy = daemon.toy(version, &[1, 2], &[2, 1]);
        let said = daemon.ask(&["release", "manifest", utf8(&toy)]);
        let text = serde_json::to_string_pretty(&said.good()).expect("JSON");
        std::fs::write(beside(&toy, ".json"), text).expect("write");
        self.sign(&beside(&toy, ".json"));
        toy
    }
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    format!("{}{ending}", path.display()).into()
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A daemon that trusts this publisher.
fn daemon_that_trusts(publisher: &Publisher) -> Daemon {
    let mut daemon = Daemon::prepare();
    daemon.trust(&[publisher.key(daemon.path(), "publisher.pub")]);
    daemon.spawn();
    daemon
}

fn versions(daemon: &Daemon) -> Vec<Value> {
    let releases = daemon.ask(&["release", "ls"]).good();
    let each = releases.as_array().expect("a list").iter();
    each.map(|release| release["version"].clone()).collect()
}

/// What lies in the store, half-done things included.
fn in_store(daemon: &Daemon) -> Vec<String> {
    let entries = std::fs::read_dir(daemon.path().join("state/releases"));
    let names = entries.into_iter().flatten().flatten();
    let mut names: Vec<_> = names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn a_signed_release_is_added_shown_verified_and_run() {
    let publisher = Publisher::new();
    let daemon = daemon_that_trusts(&publisher);
    let toy = publisher.publish(&daemon, "0.2.0");
    let added = daemon.ask(&["release", "add", utf8(&toy)]).good();
    assert_eq!(added["version"], "0.2.0");
    assert_eq!(added["signed_by"]["comment"], "a release for tests");
    let releases = daemon.ask(&["release", "ls"]).good();
    assert_eq!(releases[0]["signed_by"], added["signed_by"]);
    // Once more changes nothing.
    assert_eq!(daemon.ask(&["release", "add", utf8(&toy)]).good(), added);
    let verified = daemon.ask(&["release", "verify"]).good();
    assert_eq!(verified[0]["good"], true, "{verified}");
    daemon.run("web", "0.2.0").good();
    // One that lies elsewhere, with its papers elsewhere.
    let next = publisher.publish(&daemon, "0.2.1");
    let papers = daemon.path().join("papers.json");
    std::fs::rename(beside(&next, ".json"), &papers).expect("rename");
    std::fs::rename(beside(&next, ".json.minisig"), daemon.path().join("sig")).expect("rename");
    let signature = daemon.path().join("sig");
    let add = ["release", "add", utf8(&next), "--manifest", utf8(&papers)];
    let add = [&add[..], &["--signature", utf8(&signature)]].concat();
    daemon.ask(&add).good();
    assert_eq!(daemon.swap("web", "0.2.1")["state"], "moved");
}

#[test]
fn what_is_not_signed_by_a_trusted_key_is_refused_and_nothing_is_added() {
    let (publisher, stranger) = (Publisher::new(), Publisher::new());
    let daemon = daemon_that_trusts(&publisher);
    let before = (versions(&daemon), in_store(&daemon));
    let refused = |toy: &Path, more: &[&str], code: &str, word: &str| {
        let add = [&["release", "add", utf8(toy)], more].concat();
        let (found, message) = daemon.ask(&add).bad();
        assert_eq!(found, code, "{message}");
        assert!(message.contains(word), "no {word:?} in: {message}");
        let after = (versions(&daemon), in_store(&daemon));
        assert_eq!(after, before, "something was added");
    };
    // No manifest, and no signature of it.
    let toy = daemon.toy("1.0.0", &[1], &[1]);
    refused(&toy, &[], "not_trusted", "--unsigned");
    let toy = publisher.publish(&daemon, "1.0.1");
    std::fs::remove_file(beside(&toy, ".json.minisig")).expect("remove");
    refused(&toy, &[], "not_trusted", ".minisig");
    // Another's key.
    let toy = stranger.publish(&daemon, "1.0.2");
    refused(&toy, &[], "not_trusted", "does not trust");
    // A manifest that was changed, a binary that was changed, and a manifest of another binary.
    let toy = publisher.publish(&daemon, "1.0.3");
    let manifest = beside(&toy, ".json");
    let text = std::fs::read_to_string(&manifest).expect("read");
    std::fs::write(&manifest, text.replace("1.0.3", "9.0.3")).expect("write");
    refused(&toy, &[], "not_trusted", "was changed after signing");
    let toy = publisher.publish(&daemon, "1.0.4");
    let mut bytes = std::fs::read(&toy).expect("read");
    bytes.push(b'!');
    std::fs::write(&toy, bytes).expect("write");
    refused(&toy, &[], "digest_mismatch", "another binary");
    // What is signed is neither renamed nor given other arguments.
    let toy = publisher.publish(&daemon, "1.0.5");
    refused(&toy, &["--as", "2.0.0"], "not_trusted", "--as");
    refused(&toy, &["--arg=--toy=hang"], "not_trusted", "--arg");
    // What is signed is not so.
    let manifest = beside(&toy, ".json");
    let mut said: Value =
        serde_json::from_slice(&std::fs::read(&manifest).expect("read")).expect("JSON");
    said["reads"] = json!([1, 2, 3]);
    std::fs::write(&manifest, said.to_string()).expect("write");
    publisher.sign(&manifest);
    refused(&toy, &[], "not_a_release", "[1, 2, 3]");
    std::fs::write(&manifest, "hello").expect("write");
    publisher.sign(&manifest);
    refused(&toy, &[], "not_trusted", "is no manifest");
    // And what is no signature.
    std::fs::write(beside(&toy, ".json.minisig"), "hello").expect("write");
    refused(&toy, &[], "not_trusted", "none of minisign's");
    // A directory in place of a file, and both ways at once.
    let elsewhere = utf8(daemon.path()).to_owned();
    refused(
        &toy,
        &["--manifest", &elsewhere],
        "not_trusted",
        "regular file",
    );
    let (code, _) = daemon
        .ask(&[
            "release",
            "add",
            utf8(&toy),
            "--unsigned",
            "--manifest",
            &elsewhere,
        ])
        .bad();
    assert_eq!(code, "bad_request");
}

#[test]
fn a_binary_of_nobody_we_trust_is_not_executed() {
    let (publisher, stranger) = (Publisher::new(), Publisher::new());
    let daemon = daemon_that_trusts(&publisher);
    let toy = stranger.publish(&daemon, "1.0.0");
    // It would leave a mark if it were run: the toy does so when it is asked what it is.
    let script = daemon.path().join("marks");
    let mark = daemon.path().join("was-run");
    std::fs::write(&script, format!("#!/bin/sh\ntouch {}\n", mark.display())).expect("write");
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    for path in [&toy, &script] {
        daemon.ask(&["release", "add", utf8(path)]).bad();
    }
    assert!(!mark.exists(), "it was run");
}

#[test]
fn without_keys_and_with_keys_that_ended_only_unsigned_ones_are_added() {
    let publisher = Publisher::new();
    let mut daemon = Daemon::prepare();
    daemon.spawn();
    let toy = publisher.publish(&daemon, "1.2.0");
    let (code, message) = daemon.ask(&["release", "add", utf8(&toy)]).bad();
    assert_eq!(code, "not_trusted", "{message}");
    assert!(message.contains("--trust"), "{message}");
    let added = daemon
        .ask(&["release", "add", utf8(&toy), "--unsigned"])
        .good();
    assert_eq!(added["signed_by"], Value::Null);
    assert_eq!(
        daemon.ask(&["release", "ls"]).good()[0]["signed_by"],
        Value::Null
    );
    daemon.run("web", "1.2.0").good();
    // A key that has come to its end adds nothing new.
    let key = publisher.key(daemon.path(), "publisher.pub");
    daemon.terminate();
    daemon.trust(&[format!("{key},until=2020-01-01")]);
    daemon.spawn();
    let next = publisher.publish(&daemon, "1.2.1");
    let (code, message) = daemon.ask(&["release", "add", utf8(&next)]).bad();
    assert_eq!(code, "not_trusted");
    assert!(message.contains("2020-01-01"), "{message}");
    // What is there unsigned is not quietly made a signed one.
    daemon.terminate();
    daemon.trust(&[key]);
    daemon.spawn();
    let (code, message) = daemon.ask(&["release", "add", utf8(&toy)]).bad();
    assert_eq!(code, "release_exists", "{message}");
    assert_eq!(daemon.show("web")["state"], "running");
}

#[test]
fn papers_changed_in_the_store_and_keys_taken_away_stop_every_start() {
    let publisher = Publisher::new();
    let mut daemon = daemon_that_trusts(&publisher);
    for version in ["0.2.0", "0.2.1"] {
        let toy = publisher.publish(&daemon, version);
        daemon.ask(&["release", "add", utf8(&toy)]).good();
    }
    daemon.run("web", "0.2.0").good();
    let pid = daemon.vmm_pid("web");
    let not_run = |daemon: &Daemon, word: &str| {
        let (code, message) = daemon.ask(&["swap", "vmm", "web", "--to", "0.2.1"]).bad();
        assert!(
            code == "not_trusted" && message.contains(word),
            "{code}: {message}"
        );
        let (code, message) = daemon.run("other", "0.2.1").bad();
        assert!(
            code == "start_failed" && message.contains(word),
            "{code}: {message}"
        );
        let verified = daemon.ask(&["release", "verify", "0.2.1"]);
        assert!(!verified.ok, "it exits 0");
        assert_eq!(verified.out[0]["good"], false);
        assert_eq!(verified.out[0]["problem"]["code"], "not_trusted");
        assert_eq!(daemon.vmm_pid("web"), pid);
    };
    // Another manifest that was signed, but is not the one that was added.
    let dir = daemon.path().join("state/releases/0.2.1");
    let kept = std::fs::read(dir.join("manifest.json")).expect("read");
    let mut text = kept.clone();
    text.push(b' ');
    std::fs::write(dir.join("manifest.json"), text).expect("write");
    not_run(&daemon, "was changed after signing");
    let other = daemon.path().join("state/releases/0.2.0");
    for name in ["manifest.json", "manifest.json.minisig"] {
        std::fs::copy(other.join(name), dir.join(name)).expect("copy");
    }
    not_run(&daemon, "not the one");
    // As it was; but the key is not trusted any more.
    std::fs::write(dir.join("manifest.json"), kept).expect("write");
    publisher.sign(&dir.join("manifest.json"));
    daemon.ask(&["release", "verify", "0.2.1"]).good();
    daemon.terminate();
    daemon.trust(&[Publisher::new().key(daemon.path(), "other.pub")]);
    daemon.spawn();
    not_run(&daemon, "does not trust");
    // A place in which others could change it.
    daemon.terminate();
    daemon.trust(&[daemon.path().join("publisher.pub").display().to_string()]);
    daemon.spawn();
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).expect("chmod");
    let (_, message) = daemon.ask(&["swap", "vmm", "web", "--to", "0.2.1"]).bad();
    assert!(message.contains("0777"), "{message}");
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).expect("chmod");
    assert_eq!(daemon.swap("web", "0.2.1")["state"], "moved");
}

#[test]
fn keys_that_can_not_be_trusted_keep_the_daemon_from_starting() {
    let mut daemon = Daemon::prepare();
    daemon.trust(&["/nowhere/minisign.pub".into()]);
    assert!(daemon.refused().contains("/nowhere/minisign.pub"));
    let key = daemon.path().join("bad.pub");
    std::fs::write(&key, "hello\n").expect("write");
    daemon.trust(&[key.display().to_string()]);
    assert!(daemon.refused().contains("no public key of minisign's"));
    assert!(
        !daemon.path().join("state/store.sqlite").exists(),
        "a store was made"
    );
}

#[test]
fn nothing_below_the_pin_is_run_unless_that_is_said() {
    let daemon = Daemon::start();
    for version in ["1.1.0", "1.2.0", "1.3.0"] {
        daemon.add(version, None);
    }
    daemon.run("web", "1.2.0").good();
    let pins = daemon.ask(&["release", "pin", "1.2.0"]).good();
    assert_eq!(pins[0]["minimum"], "1.2.0");
    let (code, message) = daemon.ask(&["swap", "vmm", "web", "--to", "1.1.0"]).bad();
    assert_eq!(code, "below_pin");
    assert!(
        message.contains("1.1.0") && message.contains("1.2.0"),
        "{message}"
    );
    let (code, _) = daemon.run("old", "1.1.0").bad();
    assert_eq!(code, "below_pin");
    assert!(!daemon.ask(&["show", "old"]).ok, "it was recorded");
    assert_eq!(daemon.swap("web", "1.3.0")["state"], "moved");
    let swap = ["swap", "vmm", "web", "--to", "1.1.0", "--allow-downgrade"];
    assert_eq!(daemon.ask(&swap).good()["state"], "moved");
    daemon
        .run_with("old", "1.1.0", &["--allow-downgrade"])
        .good();
    // It outlives the daemon, and what is none is refused.
    let (code, message) = daemon.ask(&["release", "pin", "good"]).bad();
    assert!(
        code == "bad_request" && message.contains("good"),
        "{message}"
    );
    assert_eq!(daemon.ask(&["release", "pin"]).good(), pins);
    daemon.ask(&["release", "pin", "--none"]).good();
    assert_eq!(daemon.ask(&["release", "pin"]).good(), json!([]));
    daemon.run("older", "1.1.0").good();
}

#[test]
fn a_release_that_runs_a_guest_is_not_removed() {
    let daemon = Daemon::start();
    daemon.add("1", None);
    daemon.add("2", None);
    daemon.run("web", "1").good();
    let (code, message) = daemon.ask(&["release", "rm", "1"]).bad();
    assert_eq!(code, "release_in_use");
    assert!(message.contains("web"), "{message}");
    assert!(versions(&daemon).contains(&"1".into()));
    daemon.ask(&["release", "rm", "2"]).good();
    assert!(!versions(&daemon).contains(&"2".into()));
    assert!(!in_store(&daemon).contains(&"2".to_owned()));
    let (code, _) = daemon.ask(&["release", "rm", "2"]).bad();
    assert_eq!(code, "not_found");
    // The version is free again, for another binary.
    daemon.add("2", None);
    assert_eq!(daemon.swap("web", "2")["state"], "moved");
    daemon.ask(&["release", "rm", "1"]).good();
    assert_eq!(daemon.show("web")["state"], "running");
}

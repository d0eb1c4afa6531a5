//! The door for other machines: real handshakes on loopback, and roles by certificate.

mod audited;
mod daemon;
mod papers;

use audited::is_audited;
use daemon::{Daemon, Said, until};
use papers::Papers;

/// A daemon with the door, a guest `web` on release `1`, and release `2`.
fn host(papers: &Papers) -> (Daemon, String) {
    let mut daemon = Daemon::prepare();
    let url = papers.open_door(&mut daemon, "h1");
    daemon.add("1", None);
    daemon.add("2", None);
    daemon.run("web", "1").good();
    (daemon, url)
}

/// `stillpoint --json --remote URL ARGS`, with somebody's certificate.
fn ask(papers: &Papers, url: &str, who: &str, args: &[&str]) -> Said {
    papers.ask(&papers.stillpoint(url, who), args)
}

#[test]
fn each_role_may_do_what_it_may_and_no_more_and_all_of_it_is_on_record() {
    let papers = Papers::new();
    for role in ["read", "operate", "admin"] {
        papers.client(role, role);
    }
    let (daemon, url) = host(&papers);
    let known = ask(&papers, &url, "operate", &["auth", "whoami"]).good();
    assert_eq!(
        (&known["who"], &known["role"]),
        (&"operate".into(), &"operate".into())
    );

    // Looks, and moves nothing.
    let seen = ask(&papers, &url, "read", &["ls"]).good();
    assert_eq!(seen[0]["name"], "web");
    let pid = daemon.vmm_pid("web");
    for args in [
        &["swap", "vmm", "web", "--to", "2"][..],
        &["stop", "web", "--now"],
        &["rollout", "start", "--detach", "--to", "2"],
        &["host", "cordon", "--reason", "x"],
    ] {
        let (code, message) = ask(&papers, &url, "read", args).bad();
        assert_eq!(code, "forbidden", "{args:?}: {message}");
        let says =
            message.contains("needs the role `operate`") && message.contains("read has `read`");
        assert!(
            says && message.contains("stillpoint auth client"),
            "{message}"
        );
    }
    assert_eq!(daemon.vmm_pid("web"), pid);
    assert!(
        daemon
            .ask(&["report"])
            .good()
            .as_array()
            .expect("swaps")
            .is_empty()
    );
    assert!(is_audited(
        &daemon,
        "read",
        "read",
        "/v1/vms/web/swaps",
        "denied"
    ));

    // Moves, and adds nothing.
    let kernel = daemon.path().join("kernel");
    let kernel = kernel.to_str().expect("UTF-8");
    for args in [
        &["run", "more", "--kernel", kernel, "--release", "1"][..],
        &["release", "rm", "2"],
        &["host", "forget", "h1"],
        &["audit", "ls"],
    ] {
        let (code, message) = ask(&papers, &url, "operate", args).bad();
        assert_eq!(code, "forbidden", "{args:?}: {message}");
        assert!(message.contains("needs the role `admin`"), "{message}");
    }
    ask(
        &papers,
        &url,
        "operate",
        &["swap", "vmm", "web", "--to", "2"],
    )
    .good();
    assert_eq!(daemon.show("web")["release"], "2");
    assert!(is_audited(
        &daemon,
        "operate",
        "operate",
        "/v1/vms/web/swaps",
        "done"
    ));

    ask(
        &papers,
        &url,
        "admin",
        &["run", "more", "--kernel", kernel, "--release", "1"],
    )
    .good();
    let lines = ask(&papers, &url, "admin", &["audit", "ls", "--who", "admin"]).good();
    let line = &lines[0];
    assert_eq!(
        (&line["path"], &line["outcome"]),
        (&"/v1/vms/more".into(), &"done".into())
    );
    assert!(
        line["body"]
            .as_str()
            .expect("a body")
            .contains("\"kernel\""),
        "{line}"
    );
    assert!(
        line["from"]
            .as_str()
            .expect("an address")
            .starts_with("127.0.0.1:"),
        "{line}"
    );
    // What is refused for another reason than the role is no denial.
    let (code, _) = ask(&papers, &url, "admin", &["swap", "vmm", "web", "--to", "9"]).bad();
    assert_eq!(code, "not_found");
    assert!(is_audited(
        &daemon,
        "admin",
        "admin",
        "/v1/vms/web/swaps",
        "refused"
    ));
    // The daemon's own user, by the socket, is there too.
    let own = format!("uid {}", rustix::process::geteuid().as_raw());
    assert!(is_audited(&daemon, &own, "admin", "/v1/vms/web", "done"));
    // What works on the host alone says so.
    let (_, message) = ask(&papers, &url, "admin", &["console", "web"]).bad();
    assert!(message.contains("on the host itself only"), "{message}");
}

#[test]
fn a_certificate_that_does_not_count_is_refused_with_the_reason_and_nothing_moves() {
    let papers = Papers::new();
    papers.client("alice", "operate");
    let short = papers
        .auth(&["client", "late", "--role", "admin", "--lifetime", "1s"])
        .good();
    let other = Papers::new();
    other.client("alice", "admin");
    let (daemon, url) = host(&papers);
    let swap = &["swap", "vmm", "web", "--to", "2"];
    let refused = |said: Said, why: &str| {
        let (code, message) = said.bad();
        assert_eq!(code, "forbidden", "{message}");
        assert!(message.contains(why), "{message}");
    };

    let until_s = short["until_unix_s"].as_u64().expect("a time");
    until("it is over", || {
        std::time::SystemTime::UNIX_EPOCH
            .elapsed()
            .expect("after 1970")
            .as_secs()
            > until_s
    });
    refused(ask(&papers, &url, "late", swap), "it has expired");
    until("the daemon's log says it too", || {
        daemon.log().to_lowercase().contains("expired")
    });

    // Of another CA: this side of it, and that.
    let mut command = papers.stillpoint(&url, "alice");
    command.env("STILLPOINT_REMOTE_CA", other.file("ca.pem"));
    refused(papers.ask(&command, swap), "is not of the CA in");
    let mut command = other.stillpoint(&url, "alice");
    command.env("STILLPOINT_REMOTE_CA", papers.file("ca.pem"));
    refused(
        papers.ask(&command, swap),
        "is not of the CA that the daemon trusts",
    );

    // By a name that its certificate has not: localhost is in, this is not.
    let named = url.replace("127.0.0.1", "127.0.0.2");
    let (_, message) = ask(&papers, &named, "alice", swap).bad();
    // Nobody listens there; the name is checked where somebody does.
    assert!(message.contains("no daemon answers"), "{message}");
    let mut wrong = Daemon::prepare();
    papers
        .auth(&["daemon", "elsewhere", "--dns", "elsewhere.example"])
        .good();
    let at = papers.open_door_with(&mut wrong, "elsewhere");
    refused(
        ask(&papers, &at, "alice", &["ls"]),
        "for other names than `127.0.0.1`",
    );
    assert_eq!(
        ask(
            &papers,
            &url.replace("127.0.0.1", "localhost"),
            "alice",
            &["ls"]
        )
        .good()[0]["name"],
        "web"
    );

    // A certificate of this CA without a role: the daemon's own.
    refused(ask(&papers, &url, "h1", swap), "h1 has no role here");
    refused(ask(&papers, &url, "h1", &["ls"]), "needs `read`");

    // None at all, and no certificate's key.
    let mut command = papers.stillpoint(&url, "nobody");
    command.env("STILLPOINT_REMOTE_CERT", "/nonexistent.pem");
    let (code, message) = papers.ask(&command, swap).bad();
    assert_eq!(code, "bad_request");
    assert!(message.contains("--remote-cert"), "{message}");
    let mut command = papers.stillpoint(&url, "alice");
    command.env("STILLPOINT_REMOTE_KEY", papers.file("issued/h1-key.pem"));
    let (code, message) = papers.ask(&command, swap).bad();
    assert_eq!(
        (code.as_str(), message.contains("used together")),
        ("bad_request", true),
        "{message}"
    );

    assert_eq!(daemon.show("web")["release"], "1");
    assert!(
        daemon
            .ask(&["report"])
            .good()
            .as_array()
            .expect("swaps")
            .is_empty()
    );
}

#[test]
fn what_is_revoked_or_renewed_counts_at_once_without_a_restart() {
    let papers = Papers::new();
    papers.client("alice", "admin");
    let (daemon, url) = host(&papers);
    ask(&papers, &url, "alice", &["ls"]).good();
    // On a connection that is open already, too.
    let mut line = papers.connect(&url, "alice");
    assert!(line.get("/v1/vms").contains("200 OK"));
    papers.auth(&["revoke", "alice"]).good();
    let (code, message) = ask(&papers, &url, "alice", &["swap", "vmm", "web", "--to", "2"]).bad();
    assert_eq!(code, "forbidden");
    assert!(message.contains("it was revoked"), "{message}");
    let answer = line.get("/v1/vms");
    assert!(
        answer.contains("403") && answer.contains("was revoked"),
        "{answer}"
    );
    assert_eq!(daemon.show("web")["release"], "1");

    // Another of that name, and the daemon's own issued anew.
    papers.client("alice", "read");
    ask(&papers, &url, "alice", &["ls"]).good();
    let serial = |line: &mut papers::Line| line.serial();
    let before = serial(&mut papers.connect(&url, "alice"));
    papers.auth(&["renew", "h1"]).good();
    let after = serial(&mut papers.connect(&url, "alice"));
    assert_ne!(before, after, "the daemon shows its new certificate");

    // Papers that can't be read let nobody in, and back again.
    let list = papers.file("revoked.pem");
    let good = std::fs::read(&list).expect("read");
    std::fs::write(&list, "no list").expect("write");
    ask(&papers, &url, "alice", &["ls"]).bad();
    assert!(
        daemon.log().contains("nobody is let in"),
        "{}",
        daemon.log()
    );
    std::fs::write(&list, good).expect("write");
    ask(&papers, &url, "alice", &["ls"]).good();
}

#[test]
fn a_daemon_whose_own_certificate_is_no_good_says_so() {
    let papers = Papers::new();
    papers.client("alice", "read");
    let mut daemon = Daemon::prepare();
    let issued = papers
        .auth(&["daemon", "h1", "--address", "127.0.0.1", "--lifetime", "1s"])
        .good();
    let until_s = issued["until_unix_s"].as_u64().expect("a time");
    until("it is over", || {
        std::time::SystemTime::UNIX_EPOCH
            .elapsed()
            .expect("after 1970")
            .as_secs()
            > until_s
    });
    // Its host is looked after all the same.
    let url = papers.open_door_with(&mut daemon, "h1");
    assert!(
        daemon.log().contains("certificate has expired"),
        "{}",
        daemon.log()
    );
    let (code, message) = ask(&papers, &url, "alice", &["ls"]).bad();
    assert_eq!(code, "forbidden");
    assert!(
        message.contains("the certificate of the daemon") && message.contains("has expired"),
        "{message}"
    );
    daemon.ask(&["ls"]).good();

    let file = |name: &str| papers.file(name).display().to_string();
    let (cert, ca) = (file("issued/h1.pem"), file("ca.pem"));
    let refused = |key: &str, why: &str| {
        let mut daemon = Daemon::prepare();
        daemon.more(&[
            "--listen",
            "127.0.0.1:0",
            "--tls-cert",
            &cert,
            "--tls-key",
            key,
            "--tls-ca",
            &ca,
        ]);
        let said = daemon.refused();
        assert!(said.contains(why), "{said}");
    };
    refused(&file("issued/alice-key.pem"), "can't be used");
    refused("/nonexistent.pem", "/nonexistent.pem");
    let open = file("open.pem");
    std::fs::copy(papers.file("issued/h1-key.pem"), &open).expect("copy");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(&open, mode).expect("chmod");
    refused(&open, "chmod 0600");
}

#[test]
fn a_browser_with_a_certificate_sees_pages_and_no_other_site_acts_by_it() {
    let papers = Papers::new();
    papers.client("alice", "operate");
    papers.client("bob", "read");
    let (daemon, url) = host(&papers);
    let args = ["swap", "vmm", "web", "--to", "2", "--notice", "10min"];
    let mut asked = daemon
        .cli(&args)
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("stillpoint");
    let mut event = String::new();
    until("it is announced", || {
        let all = daemon.ask(&["events", "ls"]).good();
        event = all[0]["notices"][0]["event"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        !event.is_empty()
    });
    let mut alice = papers.connect(&url, "alice");
    let page = alice.get("/events");
    let key = page.split_once("name=\"key\" value=\"").expect("a form").1;
    let key = key.split('"').next().expect("a key").to_owned();
    // Who only looks has no form to send, nor the right to.
    let mut bob = papers.connect(&url, "bob");
    let seen = bob.get("/events");
    assert!(
        seen.contains("web") && !seen.contains("name=\"key\""),
        "{seen}"
    );
    let approve = format!("/events/{event}/approve");
    let answer = bob.post(&approve, &format!("key={key}"), "");
    assert!(
        answer.contains("403") && answer.contains("operate"),
        "{answer}"
    );
    // Another site knows no key, and the API takes nothing from sites at all.
    let answer = alice.post(&approve, "key=0", "");
    assert!(answer.contains("403"), "{answer}");
    let api = format!("/v1/pauses/{event}/approve");
    let answer = alice.post(&api, "", "Origin: https://evil.example\r\n");
    assert!(
        answer.contains("403") && answer.contains("from programs only"),
        "{answer}"
    );
    let answer = alice.post(&approve, &format!("key={key}"), "");
    assert!(answer.contains("303"), "{answer}");
    assert!(asked.wait().expect("wait").success());
    assert_eq!(daemon.show("web")["release"], "2");
    assert!(is_audited(&daemon, "alice", "operate", &approve, "done"));
    assert!(is_audited(&daemon, "bob", "read", &approve, "denied"));
    let log = daemon.ask(&["audit", "ls"]).good().to_string();
    assert!(!log.contains(&key), "the key of a form is in the log");
}

#[test]
fn whether_a_certificate_was_revoked_is_told_by_its_ca_or_by_the_list_and_is_never_guessed() {
    let papers = Papers::new();
    papers.client("alice", "operate");
    papers.client("bob", "read");
    papers.auth(&["revoke", "alice"]).good();
    let standing = |args: &[&str]| papers.auth(args).good()["standing"].clone();
    let alice = standing(&["show", "alice"]);
    assert_eq!(alice["state"], "revoked");
    assert!(alice["revoked_at_unix_s"].as_u64().is_some(), "{alice}");
    assert_eq!(standing(&["show", "bob"])["state"], "good");
    // Where there is no register: the list knows, and without it nobody does.
    let file = |name: &str| papers.file(name).display().to_string();
    let elsewhere = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_stillpoint"));
        command
            .args(["--json", "auth", "--dir"])
            .arg(papers.file("none"));
        papers::said(command.args(args).output().expect("stillpoint"))
    };
    let (alice, list) = (file("issued/alice.pem"), file("revoked.pem"));
    let bob = file("issued/bob.pem");
    let unknown = elsewhere(&["show", &alice]).good();
    assert!(unknown["standing"]["state"].is_null(), "{unknown}");
    assert!(
        unknown["standing"]["by"].to_string().contains("no CA in"),
        "{unknown}"
    );
    for (certificate, state) in [(&alice, "revoked"), (&bob, "good")] {
        let said = elsewhere(&["show", certificate, "--revoked", &list]).good();
        assert_eq!(said["standing"]["state"], state, "{said}");
    }
    // Another CA's list says nothing of it.
    let other = Papers::new();
    let foreign = other.file("revoked.pem").display().to_string();
    let (code, message) = elsewhere(&["show", &alice, "--revoked", &foreign]).bad();
    assert_eq!(code, "bad_request");
    assert!(message.contains("it says nothing of it"), "{message}");
}

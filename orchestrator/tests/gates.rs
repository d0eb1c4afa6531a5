//! Gates of rollouts: real commands, and a server that speaks Prometheus' query API.

mod daemon;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use daemon::{Daemon, Said, until};

const QUICK: [&str; 14] = [
    "--bake",
    "0s",
    "--well-for",
    "50ms",
    "--deadline",
    "4s",
    "--retry-after",
    "50ms",
    "--notice",
    "0s",
    "--gate-timeout",
    "1s",
    "--set-budget",
    "50%",
];

/// A daemon with a gates' directory, guests `web-0` and `web-1` on `good`, and releases `good` and `next`.
fn host() -> (Daemon, PathBuf) {
    let mut daemon = Daemon::prepare();
    let gates = daemon.path().join("gates");
    std::fs::create_dir(&gates).expect("dir");
    std::fs::set_permissions(&gates, PermissionsExt::from_mode(0o755)).expect("chmod");
    daemon.more(&["--gate-dir", gates.to_str().expect("UTF-8")]);
    daemon.spawn();
    daemon.add("good", None);
    daemon.add("next", None);
    for name in ["web-0", "web-1"] {
        daemon.run(name, "good").good();
    }
    (daemon, gates)
}

/// Puts a command into the gates' directory.
fn command(gates: &std::path::Path, name: &str, script: &str) {
    let path = gates.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("write");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("chmod");
}

fn start(daemon: &Daemon, more: &[&str]) -> Said {
    let mut args = vec!["rollout", "start", "--detach", "--to", "next"];
    args.extend(QUICK);
    args.extend(more);
    daemon.ask(&args)
}

fn id(said: Said) -> String {
    said.good()["rollout"]["id"]
        .as_str()
        .expect("an id")
        .to_owned()
}

fn state(daemon: &Daemon, id: &str) -> String {
    let view = daemon.ask(&["rollout", "show", id]).good();
    view["rollout"]["state"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

fn explained(daemon: &Daemon, vm: &str) -> String {
    daemon.ask(&["rollout", "explain", vm]).good()["why"].to_string()
}

/// How many guests moved, and how many swaps there were.
fn swaps(daemon: &Daemon) -> (usize, usize) {
    let all = daemon.ask(&["report"]).good();
    let all = all.as_array().expect("swaps");
    (
        all.iter().filter(|swap| swap["state"] == "moved").count(),
        all.len(),
    )
}

#[test]
fn a_command_is_asked_before_and_after_each_step_and_nothing_begins_while_it_fails() {
    let (daemon, gates) = host();
    let (log, bad) = (daemon.path().join("asked"), daemon.path().join("bad"));
    let script = format!(
        "echo \"$1 $STILLPOINT_ROLLOUT $STILLPOINT_RELEASE\" >> {}\ntest ! -e {} || {{ echo too many errors; exit 3; }}",
        log.display(),
        bad.display()
    );
    command(&gates, "errors", &script);
    std::fs::write(&bad, "").expect("write");
    let id = id(start(&daemon, &["--gate-command", "errors --strict"]));
    until("it says which gate fails and why", || {
        let why = explained(&daemon, "web-0");
        why.contains("gate `errors` fails: exit code 3, and said: too many errors")
    });
    assert_eq!(swaps(&daemon), (0, 0));
    assert_eq!(state(&daemon, &id), "running");
    std::fs::remove_file(&bad).expect("remove");
    until("it goes on", || state(&daemon, &id) == "finished");
    assert_eq!(swaps(&daemon), (2, 2));
    let asked = std::fs::read_to_string(&log).expect("read");
    assert!(
        asked
            .lines()
            .all(|line| line == format!("--strict {id} next")),
        "{asked}"
    );
    // Once while it failed, and before and after each of two steps.
    assert!(asked.lines().count() >= 5, "{asked}");
    let history = daemon.ask(&["rollout", "history", &id]).good().to_string();
    assert!(
        history.contains("gate `errors` fails") && history.contains("gate `errors` passes"),
        "{history}"
    );
}

#[test]
fn a_gate_that_fails_after_a_step_stops_the_rollout_and_what_was_touched_is_put_back() {
    let (daemon, gates) = host();
    // It fails as soon as a guest runs the new release: what a bad release is like.
    let log = daemon.path().join("log");
    let script = format!("! grep -q 'runs on next' {}", log.display());
    command(&gates, "errors", &script);
    let id = id(start(&daemon, &["--gate-command", "errors"]));
    until("it is rolled back", || state(&daemon, &id) == "rolled_back");
    for name in ["web-0", "web-1"] {
        assert_eq!(daemon.show(name)["release"], "good");
    }
    // There and back, and the other never.
    assert_eq!(swaps(&daemon), (2, 2));
    let history = daemon.ask(&["rollout", "history", &id]).good().to_string();
    assert!(
        history.contains("a gate failed until it was too late"),
        "{history}"
    );
}

#[test]
fn a_gate_without_an_answer_holds_the_rollout_and_says_why() {
    let (daemon, gates) = host();
    let held = |gate: &str, why: &str| {
        let id = id(start(&daemon, &["--gate-command", gate]));
        until(&format!("{gate}: {why}"), || {
            let said = explained(&daemon, "web-0");
            said.contains("gives no answer") && said.contains(why)
        });
        daemon.ask(&["rollout", "abort", &id]).good();
        until("it is over", || state(&daemon, &id) == "aborted");
    };
    // It must not outlive its time, with whatever it started.
    let left = daemon.path().join("left");
    command(
        &gates,
        "hangs",
        &format!("(sleep 3; touch {}) & sleep 60", left.display()),
    );
    held("hangs", "no end of it in 1s");
    held("absent", "there is no gate");
    command(&gates, "dies", "kill -9 $$");
    held("dies", "ended by signal 9");
    command(&gates, "open", "true");
    std::fs::set_permissions(gates.join("open"), PermissionsExt::from_mode(0o777)).expect("chmod");
    held("open", "others can change");
    std::fs::write(gates.join("plain"), "no program").expect("write");
    held("plain", "can't be run");
    assert_eq!(swaps(&daemon), (0, 0));
    assert!(!left.exists(), "what it started outlived it");

    for (gate, why) in [("/bin/true", "no name of a gate"), ("", "--gate-command")] {
        let (code, message) = start(&daemon, &["--gate-command", gate]).bad();
        assert_eq!(code, "bad_request");
        assert!(message.contains(why), "{message}");
    }
}

/// Speaks Prometheus' query API; what it answers to queries can be changed.
struct Prometheus {
    at: String,
    answer: Arc<Mutex<(u16, String)>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Prometheus {
    fn start() -> Self {
        Self::start_with(None)
    }

    /// By TLS, if there is a certificate for it.
    fn start_with(tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let scheme = if tls.is_some() { "https" } else { "http" };
        let at = format!("{scheme}://{}", listener.local_addr().expect("address"));
        let answer = Arc::new(Mutex::new((200, String::new())));
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let (to_give, to_note) = (answer.clone(), asked.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                let answer = to_give.lock().expect("lock").clone();
                let first = match &tls {
                    None => serve_one(stream, answer),
                    Some(config) => {
                        let connection = rustls::ServerConnection::new(config.clone());
                        let connection = connection.expect("TLS");
                        serve_one(rustls::StreamOwned::new(connection, stream), answer)
                    }
                };
                to_note.lock().expect("lock").push(first);
            }
        });
        Self { at, answer, asked }
    }

    fn answers(&self, status: u16, body: &str) {
        *self.answer.lock().expect("lock") = (status, body.to_owned());
    }

    fn vector(&self, value: &str) {
        self.answers(
            200,
            &format!(
                r#"{{"status":"success","data":{{"resultType":"vector","result":[{{"metric":{{"job":"web"}},"value":[1435781451.781,"{value}"]}}]}}}}"#
            ),
        );
    }
}

/// Answers one request; its first line.
fn serve_one(mut stream: impl Read + Write, (status, body): (u16, String)) -> String {
    let mut lines = BufReader::new(&mut stream).lines();
    let first = lines.next().and_then(Result::ok).unwrap_or_default();
    while lines
        .next()
        .and_then(Result::ok)
        .is_some_and(|line| !line.is_empty())
    {}
    let length = body.len();
    let _ = write!(
        stream,
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    first
}

#[test]
fn a_prometheus_by_https_is_asked_if_the_machine_trusts_its_ca() {
    use orchestrator::auth::ca::{CA_LASTS, Ca, Kind, Wanted};
    use orchestrator::auth::certificate::{certificates, private_key};
    let dir = tempfile::tempdir().expect("dir");
    let issue = |called: &str| {
        let ca = Ca::at(dir.path().join(called));
        ca.init(called, CA_LASTS).expect("a CA");
        let wanted = Wanted {
            name: "prometheus".into(),
            kind: Kind::Daemon,
            role: None,
            dns: Vec::new(),
            addresses: vec!["127.0.0.1".parse().expect("an address")],
            lasts: std::time::Duration::from_secs(3600),
        };
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().expect("now");
        let issued = ca.issue(&wanted, now.as_secs()).expect("issued");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(
                certificates(&issued.certificate).expect("a certificate"),
                private_key(&issued.key).expect("a key"),
            );
        (issued.ca, Arc::new(config.expect("TLS")))
    };
    let ((trusted, good), (_, foreign)) = (issue("trusted"), issue("foreign"));
    let mut daemon = Daemon::prepare();
    daemon.env("SSL_CERT_FILE", trusted.to_str().expect("UTF-8"));
    daemon.env(
        "SSL_CERT_DIR",
        dir.path().join("none").to_str().expect("UTF-8"),
    );
    daemon.spawn();
    daemon.add("good", None);
    daemon.add("next", None);
    daemon.run("web", "good").good();
    let (good, foreign) = (
        Prometheus::start_with(Some(good)),
        Prometheus::start_with(Some(foreign)),
    );
    good.vector("1");
    foreign.vector("1");
    let gate = |prometheus: &Prometheus| format!("errors={} up", prometheus.at);
    let first = id(start(&daemon, &["--gate-query", &gate(&foreign)]));
    until("it says why it is not asked", || {
        let why = explained(&daemon, "web");
        why.contains("gives no answer") && why.contains("UnknownIssuer")
    });
    assert_eq!(swaps(&daemon), (0, 0));
    daemon.ask(&["rollout", "abort", &first]).good();
    until("it is over", || state(&daemon, &first) == "aborted");
    // Called by a name that its certificate is not for.
    let elsewhere = gate(&good).replace("127.0.0.1", "localhost");
    let second = id(start(&daemon, &["--gate-query", &elsewhere]));
    until("it says which name", || {
        explained(&daemon, "web").contains("not valid for name")
    });
    daemon.ask(&["rollout", "abort", &second]).good();
    until("it is over", || state(&daemon, &second) == "aborted");
    let third = id(start(&daemon, &["--gate-query", &gate(&good)]));
    until("it goes on", || state(&daemon, &third) == "finished");
    assert_eq!(swaps(&daemon), (1, 1));
    let asked = good.asked.lock().expect("lock").clone();
    let queries = asked
        .iter()
        .filter(|line| line.starts_with("GET /api/v1/query?query=up "));
    assert!(queries.count() >= 2, "{asked:?}");
}

#[test]
fn a_query_of_prometheus_is_a_gate() {
    let (daemon, _gates) = host();
    let prometheus = Prometheus::start();
    prometheus.vector("0");
    let gate = format!("errors={} sum(rate(errors[1m])) < bool 0.01", prometheus.at);
    let rollout = id(start(&daemon, &["--gate-query", &gate]));
    let says = |why: &str| until(why, || explained(&daemon, "web-0").contains(why));
    says("gate `errors` fails: the query's answer is 0");
    let asked = prometheus.asked.lock().expect("lock")[0].clone();
    let path =
        "GET /api/v1/query?query=sum%28rate%28errors%5B1m%5D%29%29%20%3C%20bool%200.01 HTTP/1.1";
    assert_eq!(asked, path);
    prometheus.answers(
        200,
        r#"{"status":"success","data":{"resultType":"vector","result":[]}}"#,
    );
    says("gives no answer: the query has no answer; compare with `bool`");
    prometheus.answers(
        400,
        r#"{"status":"error","errorType":"bad_data","error":"parse error: x"}"#,
    );
    says("Prometheus can't answer: parse error: x");
    prometheus.answers(502, "<html>");
    says("answers 502 Bad Gateway, and not as Prometheus does");
    assert_eq!(swaps(&daemon), (0, 0));
    prometheus.vector("1");
    until("it goes on", || state(&daemon, &rollout) == "finished");
    assert_eq!(swaps(&daemon), (2, 2));

    // One that nobody answers.
    daemon.add("third", None);
    let closed = TcpListener::bind("127.0.0.1:0")
        .expect("bind")
        .local_addr()
        .expect("address");
    let gate = format!("gone=http://{closed} up");
    let mut args = vec!["rollout", "start", "--detach", "--to", "third"];
    args.extend(QUICK);
    args.extend(["--gate-query", &gate]);
    daemon.ask(&args).good();
    says("does not answer: Connection refused");
    let (code, message) = start(&daemon, &["--gate-query", "x=ftp://h up"]).bad();
    assert_eq!(code, "bad_request");
    assert!(message.contains("http://HOST:PORT"), "{message}");
    assert_eq!(swaps(&daemon), (2, 2));
}

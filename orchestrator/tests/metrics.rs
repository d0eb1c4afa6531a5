//! What Prometheus is told by a real daemon; and that what we ship for it asks for nothing else.

mod daemon;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Stdio;

use daemon::{Daemon, until};

/// Starts the daemon with scrapes on a free port; gives the address.
fn spawn(daemon: &mut Daemon) -> String {
    let log = daemon.path().join("scraped.log");
    let file = std::fs::File::create(&log).expect("log");
    let mut command = daemon.command();
    command
        .args(["--metrics", "127.0.0.1:0"])
        .stdin(Stdio::null());
    let child = command.stderr(file).spawn().expect("stillpointd");
    daemon.adopt(child);
    let mut at = None;
    until("it says where it is scraped", || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let line = text.lines().find(|line| line.contains("serving /metrics"));
        at = line.and_then(|line| Some(line.rsplit_once("at=")?.1.trim().to_owned()));
        at.is_some()
    });
    at.expect("an address")
}

/// Status line and body.
fn get(at: &str, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(at).expect("connect");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    (head.to_owned(), body.to_owned())
}

const MOVED: &str = "stillpoint_swaps_total{component=\"vmm\",outcome=\"moved\"}";

fn value<'t>(text: &'t str, sample: &str) -> Option<&'t str> {
    let line = text.lines().find(|line| {
        line.strip_prefix(sample)
            .is_some_and(|rest| rest.starts_with(' '))
    })?;
    line.rsplit_once(' ').map(|(_, value)| value)
}

#[test]
fn a_scrape_tells_what_is_on_record_also_after_a_death() {
    let mut daemon = Daemon::prepare();
    let at = spawn(&mut daemon);
    daemon.add("1.0.0", None);
    daemon.add("1.1.0", None);
    daemon.run("web-1", "1.0.0").good();
    let (_, before) = get(&at, "/metrics");
    assert_eq!(
        value(&before, "stillpoint_vms{state=\"running\"}"),
        Some("1"),
        "{before}"
    );
    // A sample is there before it counts, or its first increase would go unseen.
    assert_eq!(value(&before, MOVED), Some("0"), "{before}");
    daemon.swap("web-1", "1.1.0");
    let told = |text: &str| {
        assert_eq!(value(text, MOVED), Some("1"), "{text}");
        let count = "stillpoint_blackout_seconds_count{component=\"vmm\"}";
        assert_eq!(value(text, count), Some("1"), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    };
    let (head, text) = get(&at, "/metrics");
    assert!(
        head.starts_with("HTTP/1.1 200") && head.contains("openmetrics-text"),
        "{head}"
    );
    told(&text);
    daemon.kill();
    let at = spawn(&mut daemon);
    told(&get(&at, "/metrics").1);
    // Nothing else is answered there.
    assert!(get(&at, "/v1/vms").0.starts_with("HTTP/1.1 404"));
}

/// Every metric that the dashboard and the rules ask for is one that there is.
#[test]
fn what_is_shipped_asks_for_metrics_that_are_told() {
    let told = orchestrator::metrics::render(&orchestrator::metrics::Records::default());
    let mut names: Vec<String> = Vec::new();
    for line in told.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            let suffixes: &[&str] = match kind {
                "counter" => &["_total"],
                "histogram" => &["_bucket", "_count", "_sum"],
                "info" => &["_info"],
                _ => &[""],
            };
            names.extend(suffixes.iter().map(|suffix| format!("{name}{suffix}")));
        }
    }
    assert!(names.len() > 15, "{told}");
    for file in ["alerts.yml", "dashboard.json"] {
        let path = format!("{}/observability/{file}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(&path).expect("the file");
        let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let asked: Vec<&str> = text
            .split(|c| !is_of_name(c))
            .filter(|word| word.starts_with("stillpoint_"))
            .collect();
        assert!(asked.len() > 4, "{file} asks for {asked:?}");
        for name in asked {
            assert!(
                names.iter().any(|known| known == name),
                "{file} asks for {name}: {names:?}"
            );
        }
    }
    let dashboard = format!(
        "{}/observability/dashboard.json",
        env!("CARGO_MANIFEST_DIR")
    );
    let text = std::fs::read_to_string(dashboard).expect("the file");
    let read: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert!(
        read["panels"]
            .as_array()
            .is_some_and(|panels| panels.len() >= 8)
    );
}

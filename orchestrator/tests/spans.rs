//! Spans of real swaps, as a collector of OpenTelemetry gets them; and collectors that are away.

mod daemon;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use daemon::{Daemon, until};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use prost::Message;

/// Takes what is posted to `/v1/traces`, as a collector does.
struct Collector {
    at: SocketAddr,
    spans: Arc<Mutex<Vec<Span>>>,
    /// Answers that it is busy, so often.
    busy: Arc<Mutex<u32>>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let at = listener.local_addr().expect("address");
        let (spans, busy): (Arc<Mutex<Vec<Span>>>, Arc<Mutex<u32>>) = Default::default();
        let (taken, still_busy) = (spans.clone(), busy.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let posted = read_post(&stream);
                let mut busy = still_busy.lock().expect("lock");
                let status = match *busy {
                    0 => "200 OK",
                    _ => "503 Service Unavailable",
                };
                *busy = busy.saturating_sub(1);
                if status == "200 OK" {
                    taken.lock().expect("lock").extend(posted);
                }
                let _ = write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
            }
        });
        Self { at, spans, busy }
    }

    fn url(&self) -> String {
        format!("http://{}", self.at)
    }

    fn spans(&self) -> Vec<Span> {
        self.spans.lock().expect("lock").clone()
    }

    /// The spans of that name, once there are so many.
    fn wait(&self, name: &str, many: usize) -> Vec<Span> {
        let named = || -> Vec<Span> {
            let spans = self.spans().into_iter();
            spans.filter(|span| span.name == name).collect()
        };
        until(&format!("{many} spans `{name}`"), || named().len() >= many);
        let named = named();
        assert_eq!(named.len(), many, "{name}: {named:#?}");
        named
    }
}

fn read_post(stream: &TcpStream) -> Vec<Span> {
    let mut reader = BufReader::new(stream);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a line");
        if line.trim().is_empty() {
            break;
        }
        head.push(line.trim().to_ascii_lowercase());
    }
    assert_eq!(head[0], "post /v1/traces http/1.1");
    assert!(
        head.contains(&"content-type: application/x-protobuf".to_owned()),
        "{head:?}"
    );
    let length = head
        .iter()
        .find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.expect("a length").parse().expect("a number")];
    reader.read_exact(&mut body).expect("the body");
    let request = ExportTraceServiceRequest::decode(&*body).expect("protobuf");
    let mut spans = Vec::new();
    for of_one in request.resource_spans {
        let resource = of_one.resource.expect("a resource");
        assert_eq!(text(&resource.attributes, "service.name"), "stillpointd");
        assert_eq!(text(&resource.attributes, "host.name"), "h1");
        spans.extend(of_one.scope_spans.into_iter().flat_map(|scope| scope.spans));
    }
    spans
}

fn value(attributes: &[KeyValue], key: &str) -> Option<Value> {
    let found = attributes.iter().find(|attribute| attribute.key == key);
    found?.value.clone()?.value
}

fn text(attributes: &[KeyValue], key: &str) -> String {
    match value(attributes, key) {
        Some(Value::StringValue(text)) => text,
        other => panic!("{key} is {other:?} in {attributes:?}"),
    }
}

fn number(span: &Span, key: &str) -> i64 {
    match value(&span.attributes, key) {
        Some(Value::IntValue(number)) => number,
        other => panic!("{key} is {other:?} in {span:?}"),
    }
}

fn host(collector: &str) -> Daemon {
    let daemon = Daemon::start_with(&["--host-name", "h1", "--otlp-endpoint", collector]);
    daemon.add("good", None);
    daemon.add("next", None);
    daemon
}

/// Spans that were sent and dropped, by the daemon's own figures.
fn figures(daemon: &Daemon) -> (u64, u64) {
    let mut stream = std::os::unix::net::UnixStream::connect(daemon.path().join("run/api.sock"))
        .expect("the daemon");
    let request = "GET /metrics HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).expect("ask");
    let mut page = String::new();
    stream.read_to_string(&mut page).expect("figures");
    let count = |became: &str| {
        let name = format!("stillpoint_spans_total{{became=\"{became}\"}} ");
        let line = page.lines().find_map(|line| line.strip_prefix(&name));
        line.expect("it is told").parse().expect("a number")
    };
    (count("sent"), count("dropped"))
}

#[test]
fn a_swap_and_its_phases_reach_the_collector() {
    let collector = Collector::start();
    // A collector that is busy for a moment gets them all the same.
    *collector.busy.lock().expect("lock") = 2;
    let daemon = host(&collector.url());
    daemon.run("web", "good").good();
    let record = daemon.swap("web", "next");
    assert_eq!(record["state"], "moved", "{record}");
    let swap = collector.wait("swap vmm", 1).remove(0);
    let id = record["id"].as_str().expect("an id");
    for (key, expected) in [
        ("vm", "web"),
        ("swap", id),
        ("component", "vmm"),
        ("release.from", "good"),
        ("release.to", "next"),
        ("outcome", "moved"),
    ] {
        assert_eq!(
            text(&swap.attributes, &format!("stillpoint.{key}")),
            expected
        );
    }
    let pause = record["report"]["blackout"]["host_ns"].as_i64();
    assert_eq!(Some(number(&swap, "stillpoint.pause_ns")), pause);
    assert_eq!(number(&swap, "stillpoint.pause_guest_ns"), 11_000);
    assert!(
        swap.parent_span_id.is_empty() && swap.status.is_none(),
        "{swap:?}"
    );
    let (asked, ended) = (
        record["asked_at_unix_ns"].as_u64(),
        record["ended_at_unix_ns"].as_u64(),
    );
    assert_eq!(
        (
            Some(swap.start_time_unix_nano),
            Some(swap.end_time_unix_nano)
        ),
        (asked, ended)
    );
    // Its parts: the wait, and every phase of its report, in order and as long as they were.
    let phases = record["report"]["phases"]
        .as_array()
        .expect("phases")
        .clone();
    let mut at = 0;
    for (name, took) in
        std::iter::once(("wait".to_owned(), None)).chain(phases.iter().map(|phase| {
            let name = phase["name"].as_str().expect("a name").to_owned();
            (name, phase["duration_ns"].as_u64())
        }))
    {
        let part = collector.wait(&name, 1).remove(0);
        assert_eq!(part.trace_id, swap.trace_id);
        assert_eq!(part.parent_span_id, swap.span_id);
        let lasted = part.end_time_unix_nano - part.start_time_unix_nano;
        assert_eq!(took.unwrap_or(lasted), lasted, "{name}");
        assert!(part.start_time_unix_nano >= at, "{name} is before its time");
        at = part.end_time_unix_nano;
        assert!(
            swap.start_time_unix_nano <= part.start_time_unix_nano && at <= swap.end_time_unix_nano,
            "{name}"
        );
    }
    assert!(phases.len() >= 2, "{phases:?}");
    // A toy gives no signs of life, which ends the watch after the swap.
    let watch = collector.wait("watch", 1).remove(0);
    assert_eq!(watch.parent_span_id, swap.span_id);
    assert_eq!(
        text(&watch.attributes, "stillpoint.health"),
        "no longer watched"
    );
    // One that is refused says why.
    daemon.add("bad", Some("crash-before-ready"));
    let record = daemon.swap("web", "bad");
    assert_eq!(record["state"], "kept", "{record}");
    let kept = collector.wait("swap vmm", 2).pop().expect("two");
    let status = kept.status.expect("a status");
    assert_eq!(status.code, i32::from(StatusCode::Error));
    assert_eq!(Some(status.message.as_str()), record["reason"].as_str());
    assert_ne!(kept.trace_id, swap.trace_id);
    let (sent, dropped) = figures(&daemon);
    assert_eq!(
        (sent, dropped),
        (u64::try_from(collector.spans().len()).expect("few"), 0)
    );
}

#[test]
fn a_rollout_is_one_trace_and_each_swap_a_part_of_its_step() {
    let collector = Collector::start();
    let daemon = host(&collector.url());
    for name in ["web-0", "web-1"] {
        daemon.run_with(name, "good", &["--set", "web"]).good();
    }
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
        "--set-budget",
        "50%",
    ]);
    let started = started.good();
    let id = started["rollout"]["id"].as_str().expect("an id");
    let rollout = collector.wait("rollout", 1).remove(0);
    assert_eq!(text(&rollout.attributes, "stillpoint.rollout"), id);
    assert_eq!(text(&rollout.attributes, "stillpoint.outcome"), "finished");
    assert_eq!(number(&rollout, "stillpoint.units.done"), 2);
    let steps = collector.wait("step", 2);
    let swaps = collector.wait("swap vmm", 2);
    for swap in &swaps {
        assert_eq!(swap.trace_id, rollout.trace_id);
        assert_eq!(text(&swap.attributes, "stillpoint.rollout"), id);
        let step = steps
            .iter()
            .find(|step| step.span_id == swap.parent_span_id);
        let step = step.expect("the step it is a part of");
        assert_eq!(step.parent_span_id, rollout.span_id);
        assert_eq!(step.trace_id, rollout.trace_id);
        assert_eq!(text(&step.attributes, "stillpoint.set"), "web");
        assert_eq!(
            text(&step.attributes, "stillpoint.vm"),
            text(&swap.attributes, "stillpoint.vm")
        );
    }
    for settled in collector.wait("settle", 2) {
        assert_eq!(settled.parent_span_id, rollout.span_id);
        assert_eq!(text(&settled.attributes, "stillpoint.outcome"), "done");
    }
}

#[test]
fn a_collector_that_is_away_or_says_nothing_changes_no_swap() {
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        listener.local_addr().expect("address")
    };
    // Takes connections, and says nothing.
    let mute = TcpListener::bind("127.0.0.1:0").expect("bind");
    for at in [closed, mute.local_addr().expect("address")] {
        let mut daemon = host(&format!("http://{at}"));
        daemon.run("web", "good").good();
        for to in ["next", "good", "next"] {
            let began = Instant::now();
            assert_eq!(daemon.swap("web", to)["state"], "moved");
            assert!(began.elapsed() < Duration::from_secs(5), "it waited");
        }
        if at == closed {
            until("they are given up, and counted", || figures(&daemon).1 > 0);
            let log = daemon.log();
            assert!(log.contains("takes no spans: Connection refused"), "{log}");
        }
        assert_eq!(figures(&daemon).0, 0);
        let began = Instant::now();
        daemon.ask(&["stop", "web"]).good();
        assert!(daemon.terminate().success());
        assert!(began.elapsed() < Duration::from_secs(10), "its end waited");
    }
}

#[test]
fn what_is_no_address_of_a_collector_is_refused() {
    let mut daemon = Daemon::prepare();
    daemon.more(&["--otlp-endpoint", "collector:4317"]);
    let said = daemon.refused();
    assert!(
        said.contains("`collector:4317` is no address of a server"),
        "{said}"
    );
    assert!(said.contains("http://127.0.0.1:4318"), "{said}");
    // Empty is as good as absent.
    daemon.more(&[]);
    daemon.env("OTEL_EXPORTER_OTLP_ENDPOINT", "");
    daemon.spawn();
}

//! What guests read and write, byte for byte, over a connection.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;
use crate::metadata::board::Announcement;
use crate::model::{PauseId, Profile, SwapId, VmName, VmRecord, VmState, Wanted};
use crate::store::Store;

struct Scene {
    service: Arc<Service>,
    notices: Notices,
    _dir: tempfile::TempDir,
}

const ID: &str = "602d9444-d2cd-49c7-8624-8643e7171297";
const EVENTS: &str = "/metadata/scheduledevents?api-version=2020-07-01";

fn record() -> VmRecord {
    let spec = serde_json::json!({
        "name": "web-1", "kernel": { "path": "/k" },
        "nets": [{ "tap": "t0", "mac": "52:54:00:12:34:56" }],
    });
    VmRecord {
        name: VmName::try_from("web-1".to_owned()).unwrap(),
        spec: stillpoint_control::spec::MachineSpec::from_json(&spec.to_string()).unwrap(),
        profile: Profile {
            availability_set: Some("web".into()),
            update_domain: 3,
            tags: [("team".into(), "blue".into()), ("tier".into(), "1".into())].into(),
            ..Profile::default()
        },
        release: "1".into(),
        wanted: Wanted::Running,
        state: VmState::Running,
        reason: None,
        process: None,
        secret: stillpoint_control::secret::Secret::random().unwrap(),
        swaps: 0,
        created_at_unix_ns: 1,
        changed_at_unix_ns: 1,
    }
}

async fn scene() -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    let events = tokio::sync::broadcast::channel(16).0;
    let notices = Notices::open(&store, events).await.unwrap();
    let service = Service::new(Facts::of(&record()), notices.clone());
    Scene {
        service,
        notices,
        _dir: dir,
    }
}

impl Scene {
    fn connect(&self) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        tokio::spawn(self.service.clone().connection(theirs));
        ours
    }

    /// What comes back for these bytes; the rate does not count.
    async fn raw(&self, request: &str) -> String {
        *self.service.rate.lock().await = Rate::default();
        let mut stream = self.connect();
        // One that is refused early may not be read to its end.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Status and body.
    async fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String) {
        let length = body.len();
        let answer = self
            .raw(&format!(
                "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}Content-Length: \
                 {length}\r\n\r\n{body}"
            ))
            .await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
        (status.unwrap_or(0), body.to_owned())
    }

    async fn get(&self, path: &str) -> (u16, String) {
        self.ask("GET", path, "Metadata: true\r\n", "").await
    }

    async fn announce(&self) {
        let group = Facts::of(&record()).group;
        let new = Announcement {
            id: PauseId("p".into()),
            swap: SwapId("s".into()),
            description: String::new(),
            notices: vec![(EventId(ID.to_uppercase()), group, vec![record().name])],
            notice_ns: 900_000_000_000,
            expected_ns: 1,
            no_notice: None,
        };
        self.notices
            .change(|board, now| board.announce(new, now))
            .await
            .unwrap();
    }

    async fn is_approved(&self) -> bool {
        self.notices
            .read(|board| board.all()[0].is_approved())
            .await
    }
}

#[tokio::test]
async fn an_answer_to_the_byte() {
    let scene = scene().await;
    let answer = scene
        .raw(&format!(
            "GET {EVENTS} HTTP/1.1\r\nMetadata: true\r\nConnection: close\r\n\r\n"
        ))
        .await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert_eq!(body, "{\"DocumentIncarnation\":1,\"Events\":[]}");
    let lines: Vec<&str> = head.split("\r\n").collect();
    assert_eq!(lines[0], "HTTP/1.1 200 OK");
    assert!(
        lines.contains(&"content-type: application/json; charset=utf-8"),
        "{head}"
    );
    assert!(lines.contains(&"etag: \"1\""), "{head}");
    assert!(
        lines.iter().any(|line| line.starts_with("server: IMDS/")),
        "{head}"
    );
}

#[tokio::test]
async fn headers_methods_paths_and_versions() {
    let scene = scene().await;
    let (status, body) = scene.ask("GET", EVENTS, "", "").await;
    let missing = "{\"error\":\"Bad request. Required metadata header not specified\"}";
    assert_eq!((status, body.as_str()), (400, missing));
    assert_eq!(
        scene.ask("GET", EVENTS, "Metadata: false\r\n", "").await.0,
        400
    );
    assert_eq!(
        scene.ask("GET", EVENTS, "metadata: True\r\n", "").await.0,
        200
    );
    let forwarded = "Metadata: true\r\nX-Forwarded-For: 10.0.0.1\r\n";
    assert_eq!(scene.ask("GET", EVENTS, forwarded, "").await.0, 400);
    for method in ["PUT", "DELETE", "HEAD", "PATCH"] {
        assert_eq!(
            scene.ask(method, EVENTS, "Metadata: true\r\n", "").await.0,
            405,
            "{method}"
        );
    }
    let instance = "/metadata/instance?api-version=2021-12-13";
    assert_eq!(
        scene
            .ask("POST", instance, "Metadata: true\r\n", "{}")
            .await
            .0,
        405
    );
    assert_eq!(
        scene
            .get("/metadata/scheduledEvents/?api-version=2019-08-01")
            .await
            .0,
        200
    );
    for path in [
        "/metadata/attested?api-version=2020-07-01",
        "/",
        "/metadata",
        "/latest/meta-data",
    ] {
        assert_eq!(scene.get(path).await.0, 404, "{path}");
    }
    for query in [
        "",
        "?api-version=latest",
        "?api-version=2020-07-15",
        "?api-version",
    ] {
        let (status, body) = scene
            .get(&format!("/metadata/scheduledevents{query}"))
            .await;
        assert_eq!(status, 400, "{query}");
        let newest = "\"newest-versions\":[\"2020-07-01\",\"2019-08-01\",\"2019-04-01\"]}";
        assert!(
            body.starts_with("{\"error\":\"Bad request. api-version"),
            "{body}"
        );
        assert!(body.ends_with(newest), "{body}");
    }
    let twice = format!("{EVENTS}&API-version=2020-07-01");
    assert_eq!(scene.get(&twice).await.0, 400);
    let (status, body) = scene.get("/metadata/instance?api-version=2020-07-01").await;
    assert_eq!(status, 400, "the lists of versions differ");
    assert!(
        body.contains("[\"2025-04-07\",\"2024-07-17\",\"2024-03-15\"]"),
        "{body}"
    );
}

#[tokio::test]
async fn approvals_as_clients_send_them() {
    let scene = scene().await;
    let good = format!("{{\"StartRequests\":[{{\"EventId\":\"{ID}\"}}]}}");
    let header = "Metadata: true\r\n";
    assert_eq!(
        scene.ask("POST", EVENTS, header, &good).await.0,
        400,
        "never issued"
    );
    scene.announce().await;
    let bad = [
        "".to_owned(),
        "{".into(),
        "[]".into(),
        "{\"StartRequests\":[]}".into(),
        "{\"StartRequests\":{}}".into(),
        "{\"Events\":[]}".into(),
        format!("{{\"StartRequests\":[\"{ID}\"]}}"),
        format!("{{\"StartRequests\":[{{\"EventId\":\"{ID}\"}},{{\"EventId\":\"x\"}}]}}"),
        "{\"StartRequests\":[{\"EventId\":7}]}".into(),
    ];
    for body in bad {
        let (status, answer) = scene.ask("POST", EVENTS, header, &body).await;
        assert_eq!(status, 400, "{body}");
        assert!(answer.starts_with("{\"error\":\"Bad request"), "{answer}");
        assert!(!scene.is_approved().await, "{body}");
    }
    assert_eq!(scene.ask("POST", EVENTS, "", &good).await.0, 400);
    assert!(!scene.is_approved().await);
    let extra = format!(
        "{{\"DocumentIncarnation\":\"2\",\"StartRequests\":[{{\"EventId\":\"{ID}\",\"a\":1}}]}}"
    );
    let kinds = [
        "",
        "Content-Type: application/json\r\n",
        "Content-Type: application/x-www-form-urlencoded\r\n",
    ];
    for kind in kinds {
        for body in [&good, &extra] {
            let path = "/metadata/scheduledevents?api-version=2019-08-01";
            let answer = scene
                .ask("POST", path, &format!("{header}{kind}"), body)
                .await;
            assert_eq!(answer, (200, String::new()), "{kind} {body}");
            assert!(scene.is_approved().await);
        }
    }
}

#[tokio::test]
async fn what_a_guest_has_already_is_not_sent_again() {
    let scene = scene().await;
    let with = |tag: &str| format!("Metadata: true\r\nIf-None-Match: {tag}\r\n");
    assert_eq!(scene.ask("GET", EVENTS, &with("0"), "").await.0, 200);
    for tag in ["\"1\"", "1", "W/\"1\"", "\"7\", \"1\""] {
        let answer = scene.ask("GET", EVENTS, &with(tag), "").await;
        assert_eq!(answer, (304, String::new()), "{tag}");
    }
    scene.announce().await;
    assert_eq!(scene.ask("GET", EVENTS, &with("\"1\""), "").await.0, 200);
}

#[tokio::test]
async fn the_sixth_request_in_a_second_is_too_many() {
    let scene = scene().await;
    let one = format!("GET {EVENTS} HTTP/1.1\r\nMetadata: true\r\n\r\n");
    let answer = scene.raw(&one.repeat(8)).await;
    assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 5, "{answer}");
    assert_eq!(
        answer.matches("HTTP/1.1 429").count(),
        1,
        "and the connection is closed"
    );
    assert!(answer.contains("retry-after: 1"), "{answer}");
}

#[tokio::test]
async fn a_long_poll_ends_with_a_change_or_its_time() {
    let scene = scene().await;
    let path = format!("{EVENTS}&wait_for_change=true&last_etag=1");
    let (status, body) = scene.get(&format!("{path}&timeout_sec=0")).await;
    assert_eq!(
        (status, body.as_str()),
        (200, "{\"DocumentIncarnation\":1,\"Events\":[]}")
    );
    let (answer, ()) = tokio::join!(scene.get(&path), scene.announce());
    assert!(
        answer.1.contains("\"DocumentIncarnation\":2"),
        "{}",
        answer.1
    );
    for bad in [
        "&wait_for_change=true&last_etag=x",
        "&wait_for_change=true&timeout_sec=-1",
    ] {
        assert_eq!(scene.get(&format!("{EVENTS}{bad}")).await.0, 400, "{bad}");
    }
    let quoted = format!("{EVENTS}&wait_for_change=true&last_etag=%221%22");
    assert_eq!(scene.get(&quoted).await.0, 200);
}

#[tokio::test]
async fn the_instance_as_json_and_text() {
    let scene = scene().await;
    let base = "/metadata/instance";
    let (status, body) = scene
        .get(&format!("{base}?api-version=2021-12-13&extended=true"))
        .await;
    assert_eq!(status, 200);
    let document: serde_json::Value = serde_json::from_str(&body).unwrap();
    let compute = &document["compute"];
    assert_eq!(compute["name"], "web-1");
    assert_eq!(compute["platformUpdateDomain"], "3");
    assert_eq!(compute["placementGroupId"], "web");
    assert_eq!(compute["tags"], "team:blue;tier:1");
    assert_eq!(compute["tagsList"][1]["name"], "tier");
    assert_eq!(
        document["network"]["interface"][0]["macAddress"],
        "525400123456"
    );
    assert_eq!(compute["vmId"].as_str().map(str::len), Some(36));
    let strings = compute.as_object().unwrap().values();
    assert!(
        strings
            .clone()
            .all(|v| v.is_string() || v.is_array() || v.is_object())
    );
    let at = |path: &str, query: &str| format!("{base}/{path}?api-version={query}");
    let (_, old) = scene.get(&at("compute", "2017-04-02")).await;
    assert!(
        old.contains("\"name\"") && !old.contains("tagsList") && !old.contains("zone"),
        "{old}"
    );
    assert_eq!(scene.get(&at("compute/name", "2021-12-13")).await.0, 400);
    let text = scene
        .get(&at("Compute/Name", "2021-12-13&format=text"))
        .await;
    assert_eq!(text, (200, "web-1".into()));
    let mac = scene
        .get(&at(
            "network/interface/0/macAddress",
            "2021-12-13&format=text",
        ))
        .await;
    assert_eq!(mac, (200, "525400123456".into()));
    let listing = scene.get(&at("network", "2021-12-13&format=text")).await;
    assert_eq!(listing, (200, "interface/".into()));
    for gone in [
        "compute/nothing",
        "network/interface/1",
        "network/interface/x",
        "compute/name/x",
    ] {
        assert_eq!(
            scene.get(&at(gone, "2021-12-13&format=text")).await.0,
            404,
            "{gone}"
        );
    }
    let (status, versions) = scene.get("/metadata/versions").await;
    assert!(
        status == 200 && versions.contains("2021-12-13"),
        "{versions}"
    );
}

#[tokio::test]
async fn what_is_no_http_or_too_much_of_it_ends_the_connection() {
    let scene = scene().await;
    let head = "GET / HTTP/1.1\r\nMetadata: true\r\n";
    let long = format!("{head}X: {}\r\n\r\n", "x".repeat(40_000));
    let many = format!("{head}{}\r\n", "X: y\r\n".repeat(2000));
    for request in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        "\r\n\r\n\r\nnonsense\r\n\r\n",
        &long,
        &many,
    ] {
        let answer = scene.raw(request).await;
        let ok = answer.is_empty() || answer.starts_with("HTTP/1.1 4");
        assert!(ok, "{answer}");
    }
    let body = "x".repeat(100_000);
    let (status, _) = scene.ask("POST", EVENTS, "Metadata: true\r\n", &body).await;
    assert_eq!(status, 400);
}

#[tokio::test(start_paused = true)]
async fn what_comes_too_slowly_is_not_waited_for() {
    let scene = scene().await;
    for start in [
        "GET / HT",
        "POST /metadata/scheduledevents?api-version=2020-07-01 HTTP/1.1\r\nMetadata: true\r\nContent-Length: 5\r\n\r\n{",
    ] {
        let mut stream = scene.connect();
        stream.write_all(start.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut answer));
        end.await.expect("closed by the service").unwrap();
        // Time was the test's own; what the store did took none of it.
    }
    assert_eq!(scene.service.connections.available_permits(), CONNECTIONS);
}

/// Bytes that are no requests, and requests bent in one place: an answer or an end, never a panic.
#[tokio::test]
async fn bent_requests() {
    let scene = scene().await;
    scene.announce().await;
    let body = format!("{{\"StartRequests\":[{{\"EventId\":\"{ID}\"}}]}}");
    let whole = format!(
        "POST {EVENTS}&wait_for_change=true&last_etag=%221%22&timeout_sec=0 HTTP/1.1\r\nMetadata: \
         true\r\nIf-None-Match: W/\"1\"\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).unwrap() % below
    };
    let judged = |bytes: &[u8]| {
        // Past the HTTP library: what it lets through is judged without a panic.
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let mut words = head.split_whitespace();
        let (method, uri) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .header("metadata", "true")
            .body(());
        if let Ok(request) = request {
            let (parts, ()) = request.into_parts();
            let _ = asked::judge(&parts, body.as_bytes());
        }
    };
    for _ in 0..20_000 {
        let mut bytes = whole.clone().into_bytes();
        for _ in 0..=random(3) {
            let at = random(bytes.len().max(1));
            match random(3) {
                _ if bytes.is_empty() => {}
                0 => bytes[at] = u8::try_from(random(256)).unwrap(),
                1 => drop(bytes.remove(at)),
                _ => bytes.truncate(at.max(1)),
            }
        }
        judged(&bytes);
    }
    for _ in 0..300 {
        let mut bytes = whole.clone().into_bytes();
        let at = random(bytes.len());
        bytes[at] = u8::try_from(random(256)).unwrap();
        let mut stream = scene.connect();
        stream.write_all(&bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
    }
    let (status, _) = scene.get(EVENTS).await;
    assert_eq!(status, 200, "and it goes on");
}

//! Hooks around a pause, against a service of the test's own.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::sync::mpsc;

use super::*;

fn document(incarnation: u64, events: &[(&str, &str, &str)]) -> String {
    let events: Vec<_> = events
        .iter()
        .map(|(id, status, vm)| {
            serde_json::json!({
                "EventId": id, "EventStatus": status, "EventType": "Freeze",
                "Resources": [vm], "NotBefore": "",
            })
        })
        .collect();
    serde_json::json!({ "DocumentIncarnation": incarnation, "Events": events }).to_string()
}

#[test]
fn an_event_is_prepared_once_and_ends_once() {
    let mut watch = Watch {
        name: Some("web".into()),
        ..Watch::default()
    };
    let mut see = |events: &[(&str, &str, &str)]| {
        let document = serde_json::from_str(&document(1, events)).unwrap();
        watch.see(&document)
    };
    let (prepare, resume) = (Act::Prepare("a".into()), Act::Resume("a".into()));
    assert_eq!(see(&[("a", "Scheduled", "other")]), [], "another's");
    assert_eq!(see(&[("a", "Scheduled", "web")]), [prepare]);
    assert_eq!(see(&[("a", "Scheduled", "web")]), []);
    assert_eq!(see(&[("a", "Started", "web")]), []);
    assert_eq!(see(&[]), [resume]);
    assert_eq!(see(&[]), []);
    // One that nobody announced: too late to prepare for, but it ends.
    assert_eq!(see(&[("b", "Started", "web")]), []);
    assert_eq!(see(&[]), [Act::Resume("b".into())]);
}

struct Scene {
    dir: tempfile::TempDir,
    settings: Settings,
    /// Requests as they come: the first line and the body.
    asked: mpsc::Receiver<(String, String)>,
    documents: mpsc::Sender<String>,
}

/// A service that gives each document once, and knows its guest as `web`.
fn scene(deadline: Duration) -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("service");
    let listener = UnixListener::bind(&path).unwrap();
    let (requests, asked) = mpsc::channel();
    let (documents, given) = mpsc::channel::<String>();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut first = String::new();
            reader.read_line(&mut first).unwrap();
            let mut length = 0;
            let mut line = String::new();
            while line != "\r\n" {
                line.clear();
                reader.read_line(&mut line).unwrap();
                if let Some(value) = line.strip_prefix("Content-Length: ") {
                    length = value.trim().parse().unwrap();
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let answer = if first.contains("/compute/name") {
                "web".to_owned()
            } else if first.starts_with("GET") {
                let Ok(document) = given.recv() else { return };
                document
            } else {
                String::new()
            };
            let _ = requests.send((first, String::from_utf8(body).unwrap()));
            let _ = write!(stream, "HTTP/1.1 200 OK\r\n\r\n{answer}");
        }
    });
    let settings = Settings {
        host: Host::Unix(path),
        deadline,
    };
    Scene {
        dir,
        settings,
        asked,
        documents,
    }
}

impl Scene {
    fn hook(&self, when: &str, script: &str) {
        let dir = self.dir.path().join(when);
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("10-hook");
        let log = self.dir.path().join("log");
        let text = format!("#!/bin/sh\necho {when} >> {}\n{script}\n", log.display());
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// One turn with this document.
    fn turn(&self, watch: &mut Watch, document: String) {
        self.documents.send(document).unwrap();
        turn(&self.settings, self.dir.path(), watch, 0).unwrap();
    }

    fn approvals(&self) -> Vec<String> {
        let posts = self
            .asked
            .try_iter()
            .filter(|(first, _)| first.starts_with("POST"));
        posts.map(|(_, body)| body).collect()
    }
}

#[test]
fn hooks_run_before_the_approval_and_after_the_end() {
    let scene = scene(Duration::from_secs(60));
    scene.hook("before", "");
    scene.hook("after", "");
    let mut watch = Watch::default();
    scene.turn(&mut watch, document(2, &[("a", "Scheduled", "web")]));
    assert_eq!(scene.log(), "before\n");
    assert_eq!(
        scene.approvals(),
        ["{\"StartRequests\":[{\"EventId\":\"a\"}]}"]
    );
    scene.turn(&mut watch, document(3, &[("a", "Started", "web")]));
    scene.turn(&mut watch, document(4, &[]));
    assert_eq!(scene.log(), "before\nafter\n");
    assert!(scene.approvals().is_empty());
}

#[test]
fn who_is_not_ready_does_not_approve() {
    for script in ["exit 1", "exec sleep 1000"] {
        // Long enough for it to begin, however busy the machine is.
        let scene = scene(Duration::from_secs(3));
        scene.hook("before", script);
        let mut watch = Watch::default();
        scene.turn(&mut watch, document(2, &[("a", "Scheduled", "web")]));
        assert_eq!(scene.log(), "before\n", "{script}");
        assert!(scene.approvals().is_empty(), "{script}");
    }
}

/// The daemon was away when the hooks had ended: the guest says that it is ready when it is back.
#[test]
fn what_was_not_heard_is_said_again() {
    let scene = scene(Duration::from_secs(60));
    scene.hook("before", "cd \"$(dirname \"$0\")/..\" && mv service away");
    let mut watch = Watch::default();
    let scheduled = document(2, &[("a", "Scheduled", "web")]);
    scene.documents.send(scheduled.clone()).unwrap();
    turn(&scene.settings, scene.dir.path(), &mut watch, 0).unwrap_err();
    assert!(scene.approvals().is_empty());
    let place = |name: &str| scene.dir.path().join(name);
    std::fs::rename(place("away"), place("service")).unwrap();
    scene.turn(&mut watch, scheduled.clone());
    assert_eq!(scene.approvals().len(), 1);
    scene.turn(&mut watch, scheduled);
    assert!(scene.approvals().is_empty(), "it is said once");
    assert_eq!(scene.log(), "before\n", "its hooks ran once");
}

//! A real browser, without a window: Chromium, spoken to through two pipes by its own protocol
//! (Chrome DevTools Protocol, `--remote-debugging-pipe`: JSON objects, each ended by a zero byte).

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);
/// How long a browser may live: one that hangs would have its test wait for ever.
const LIFE: Duration = Duration::from_secs(240);

/// Why there is no browser here; `None` if there is.
pub(crate) fn missing() -> Option<String> {
    let found = Command::new("chromium")
        .arg("--version")
        .stderr(Stdio::null())
        .output();
    let works = found.is_ok_and(|output| output.status.success());
    (!works).then(|| "chromium is not installed (`make deps-browser` does it)".into())
}

/// The browser, with one page open.
pub(crate) struct Browser {
    child: Child,
    to: File,
    from: BufReader<File>,
    session: String,
    said: u64,
    over: Arc<AtomicBool>,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts one.
    pub(crate) fn start() -> Self {
        let profile = tempfile::tempdir().expect("temp dir");
        let (in_theirs, to) = pipe();
        let (from, out_theirs) = pipe();
        // 3 and 4 are where it looks for them.
        let redirect = format!(
            "exec chromium \"$@\" 3</proc/self/fd/{} 4>/proc/self/fd/{}",
            in_theirs.as_raw_fd(),
            out_theirs.as_raw_fd()
        );
        let child = Command::new("sh")
            .args(["-c", &redirect, "sh"])
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
            ])
            .args(["--remote-debugging-pipe", "--window-size=1280,800"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromium");
        let mut browser = Self {
            child,
            to: to.into(),
            from: BufReader::new(from.into()),
            session: String::new(),
            said: 0,
            over: Arc::new(AtomicBool::new(false)),
            _profile: profile,
        };
        browser.end_in_time();
        drop((in_theirs, out_theirs));
        let made = browser.ask("Target.createTarget", json!({"url": "about:blank"}));
        let attach = json!({"targetId": made["targetId"], "flatten": true});
        let attached = browser.ask("Target.attachToTarget", attach);
        browser.session = attached["sessionId"].as_str().expect("a session").into();
        browser
    }

    fn end_in_time(&self) {
        let (pid, over) = (
            rustix::process::Pid::from_child(&self.child),
            Arc::clone(&self.over),
        );
        std::thread::spawn(move || {
            let end = Instant::now() + LIFE;
            while Instant::now() < end && !over.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(200));
            }
            if !over.load(Ordering::SeqCst) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        });
    }

    /// Asks, and waits for the answer; what else it says meanwhile is passed over.
    fn ask(&mut self, method: &str, params: Value) -> Value {
        self.said += 1;
        let mut request = json!({"id": self.said, "method": method, "params": params});
        if !self.session.is_empty() {
            request["sessionId"] = self.session.clone().into();
        }
        let mut bytes = serde_json::to_vec(&request).expect("json");
        bytes.push(0);
        self.to.write_all(&bytes).expect("say");
        loop {
            let mut bytes = Vec::new();
            self.from.read_until(0, &mut bytes).expect("hear");
            bytes.pop();
            let heard: Value = serde_json::from_slice(&bytes).expect("an object");
            if heard["id"] == self.said {
                assert!(heard["error"].is_null(), "{method}: {heard}");
                return heard["result"].clone();
            }
        }
    }

    /// What an expression in the page comes to.
    pub(crate) fn evaluate(&mut self, expression: &str) -> Value {
        let params = json!({"expression": expression, "returnByValue": true});
        self.ask("Runtime.evaluate", params)["result"]["value"].clone()
    }

    /// Goes there, and waits until the page is.
    pub(crate) fn go(&mut self, url: &str) {
        self.ask("Page.navigate", json!({"url": url}));
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'");
    }

    /// Waits until an expression in the page is true.
    pub(crate) fn until(&mut self, expression: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.evaluate(expression) != true {
            let text = "document.body ? document.body.innerText : ''";
            assert!(
                Instant::now() < deadline,
                "{expression} is not so: {}",
                self.evaluate(text)
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What a reader sees.
    pub(crate) fn text(&mut self) -> String {
        let text = self.evaluate("document.body.innerText");
        text.as_str().unwrap_or_default().to_owned()
    }

    /// Clicks with the mouse in the middle of what a selector finds.
    pub(crate) fn click(&mut self, selector: &str) {
        let place = format!(
            "(() => {{ const r = document.querySelector({selector:?}).getBoundingClientRect(); \
             return [r.x + r.width / 2, r.y + r.height / 2]; }})()"
        );
        let place = self.evaluate(&place);
        for kind in ["mousePressed", "mouseReleased"] {
            let params = json!({
                "type": kind, "x": place[0], "y": place[1], "button": "left", "clickCount": 1
            });
            self.ask("Input.dispatchMouseEvent", params);
        }
    }

    /// Presses and releases a key.
    pub(crate) fn press(&mut self, key: &str, code: u32) {
        for kind in ["keyDown", "keyUp"] {
            let text = if key == "Enter" && kind == "keyDown" {
                "\r"
            } else {
                ""
            };
            let params = json!({
                "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text
            });
            self.ask("Input.dispatchKeyEvent", params);
        }
    }

    /// As a reader who wants it dark, or light, sees it.
    pub(crate) fn scheme(&mut self, scheme: &str) {
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.ask("Emulation.setEmulatedMedia", json!({"features": features}));
    }

    /// Without scripts from now on, or with them.
    pub(crate) fn scripts(&mut self, on: bool) {
        self.ask(
            "Emulation.setScriptExecutionDisabled",
            json!({"value": !on}),
        );
    }

    /// A picture of all of the page.
    pub(crate) fn picture(&mut self, dir: &Path, name: &str) -> PathBuf {
        let size = self.ask("Page.getLayoutMetrics", json!({}))["cssContentSize"].clone();
        let height = size["height"]
            .as_f64()
            .unwrap_or(800.0)
            .clamp(300.0, 2400.0);
        let clip = json!({"x": 0, "y": 0, "width": 1280, "height": height, "scale": 1});
        let params = json!({"captureBeyondViewport": true, "clip": clip});
        let shot = self.ask("Page.captureScreenshot", params);
        let bytes = shot["data"].as_str().expect("a picture");
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(bytes)
            .expect("base64");
        std::fs::create_dir_all(dir).expect("folder");
        let path = dir.join(format!("{name}.png"));
        std::fs::write(&path, bytes).expect("write");
        path
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Before it is waited for: from then on its pid may be another's.
        self.over.store(true, Ordering::SeqCst);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is read from, and what is written to; both are open over an exec.
fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe().expect("a pipe")
}

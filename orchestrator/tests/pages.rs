//! The pages, in a real browser that clicks and types; and without one, as a reader without scripts.

mod browser;
mod daemon;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Stdio;

use browser::Browser;
use daemon::{Daemon, until};

/// Starts the daemon with pages on a free port; gives where they are, and the key.
fn spawn(daemon: &mut Daemon) -> (String, String) {
    let mut command = daemon.command();
    let log = std::fs::File::create(daemon.path().join("log")).expect("log");
    command.args(["--web", "127.0.0.1:0"]).stdin(Stdio::null());
    let child = command.stderr(log).spawn().expect("stillpointd");
    daemon.adopt(child);
    let said = daemon.ask(&["page"]).good();
    let url = said["url"].as_str().expect("an address").to_owned();
    let (site, key) = url.split_once("/?key=").expect("a key");
    (site.to_owned(), key.to_owned())
}

/// Head and body of what is answered to these lines.
fn get(site: &str, path: &str, more: &str) -> (String, String) {
    let at = site.strip_prefix("http://").expect("http");
    let mut stream = TcpStream::connect(at).expect("connect");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n{more}\r\n");
    stream.write_all(request.as_bytes()).expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    (head.to_owned(), body.to_owned())
}

/// The same of a form that is sent with the cookie.
fn post(site: &str, path: &str, key: &str, form: &str) -> (String, String) {
    let at = site.strip_prefix("http://").expect("http");
    let mut stream = TcpStream::connect(at).expect("connect");
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\nCookie: stillpoint={key}\r\n\
         Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n{form}",
        form.len()
    );
    stream.write_all(request.as_bytes()).expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    (head.to_owned(), body.to_owned())
}

/// A host with two guests, of which one has been swapped, and one waits for a word.
fn host() -> (Daemon, String, String) {
    let mut daemon = Daemon::prepare();
    let (site, key) = spawn(&mut daemon);
    daemon.add("1.0.0", None);
    daemon.add("1.1.0", None);
    daemon.run("web-1", "1.0.0").good();
    daemon.run("web-2", "1.0.0").good();
    daemon.swap("web-1", "1.1.0");
    (daemon, site, key)
}

/// Asks for a swap of this guest that waits ten minutes, unless somebody says "go".
fn announce(daemon: &Daemon, guest: &str) -> std::process::Child {
    let args = ["swap", "vmm", guest, "--to", "1.1.0", "--notice", "10min"];
    let asked = daemon
        .cli(&args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let asked = asked.expect("stillpoint");
    until("it is announced", || {
        daemon
            .ask(&["events", "ls"])
            .good()
            .as_array()
            .is_some_and(|all| !all.is_empty())
    });
    asked
}

#[test]
fn who_does_not_know_the_key_sees_nothing_and_does_nothing() {
    let (daemon, site, key) = host();
    let mut asked = announce(&daemon, "web-2");
    let cookie = format!("Cookie: stillpoint={key}\r\n");
    for path in [
        "/",
        "/guests/web-1",
        "/events",
        "/host",
        "/live",
        "/nonesuch",
    ] {
        let (head, body) = get(&site, path, "");
        assert!(head.starts_with("HTTP/1.1 403"), "{path}: {head}");
        assert!(
            !body.contains("web-1") && !body.contains(&key),
            "{path}: {body}"
        );
        let (head, _) = get(&site, path, "Cookie: stillpoint=0123\r\n");
        assert!(head.starts_with("HTTP/1.1 403"), "{path}: {head}");
    }
    // The address with the key gives the cookie, and the key is not in the address any more.
    let (head, _) = get(&site, &format!("/events?key={key}"), "");
    assert!(
        head.starts_with("HTTP/1.1 303") && head.contains("location: /events\r\n"),
        "{head}"
    );
    assert!(
        head.contains("SameSite=Strict") && head.contains("HttpOnly"),
        "{head}"
    );
    let (_, events) = get(&site, "/events", &cookie);
    let action = events
        .split("action=\"")
        .nth(1)
        .and_then(|rest| rest.split('"').next());
    let action = action.expect("a form").to_owned();
    // Another site's form has the cookie at most.
    let (answer, _) = post(&site, &action, &key, "key=0123&reason=");
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    let event = &daemon.ask(&["events", "ls"]).good()[0];
    assert!(event["notices"][0]["approval"].is_null(), "{event}");
    let _ = asked.kill();
    let _ = asked.wait();
}

#[test]
fn a_reader_without_scripts_has_all_the_facts() {
    let (_daemon, site, key) = host();
    let cookie = format!("Cookie: stillpoint={key}\r\n");
    let page = |path: &str| get(&site, path, &cookie).1;
    let guests = page("/");
    for fact in [
        "web-1",
        "web-2",
        "running",
        "1.1.0",
        "moved",
        "How long guests stood still",
    ] {
        assert!(guests.contains(fact), "{fact}: {guests}");
    }
    let guest = page("/guests/web-1");
    for fact in ["vmm 1.0.0 → 1.1.0", "phases", "Budget"] {
        assert!(guest.contains(fact), "{fact}: {guest}");
    }
    let (head, body) = get(&site, "/guests/nobody", &cookie);
    assert!(
        head.starts_with("HTTP/1.1 404") && body.contains("no guest `nobody`"),
        "{body}"
    );
    let host = page("/host");
    assert!(
        host.contains("1.0.0") && host.contains("What it can do"),
        "{host}"
    );
    assert!(page("/events").contains("No pause is to come"));
}

#[test]
fn a_person_clicks_approve_and_the_page_goes_on_by_itself() {
    if let Some(why) = browser::missing() {
        println!("SKIPPED a_person_clicks_approve_and_the_page_goes_on_by_itself: {why}");
        return;
    }
    let (daemon, site, key) = host();
    let pictures = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("../pages");
    let mut browser = Browser::start();
    browser.go(&format!("{site}/?key={key}"));
    browser.until("document.getElementById('live').textContent === 'live'");
    assert!(browser.text().contains("web-1"), "{}", browser.text());
    assert_eq!(
        browser.evaluate("location.search"),
        "",
        "the key is not in the address"
    );
    // It changes while it is looked at.
    let mut asked = announce(&daemon, "web-2");
    browser.until("document.body.innerText.includes('scheduled')");
    browser.picture(&pictures, "guests");
    browser.scheme("dark");
    browser.picture(&pictures, "guests-dark");
    browser.scheme("light");
    browser.click("nav a[href='/events']");
    browser.until("document.querySelector('button.go') !== null");
    browser.picture(&pictures, "events");
    browser.click("button.go");
    browser.until("document.body.innerText.includes('No pause is to come')");
    assert!(
        asked.wait().expect("wait").success(),
        "the swap that was approved"
    );
    assert_eq!(daemon.show("web-2")["release"], "1.1.0");
    browser.go(&format!("{site}/guests/web-2"));
    browser.picture(&pictures, "guest");
    browser.go(&format!("{site}/host"));
    browser.picture(&pictures, "host");
    browser.click("nav a[href='/fleet']");
    browser.until("document.body.innerText.includes('Guests by update domain')");
    browser.picture(&pictures, "fleet");
    // A rollout, with what it measured against its limit.
    let started = daemon.ask(&[
        "rollout",
        "start",
        "--detach",
        "--to",
        "1.0.0",
        "--vm",
        "web-1",
        "--bake",
        "0s",
        "--well-for",
        "50ms",
        "--notice",
        "0s",
        "--max-blackout",
        "50ms",
    ]);
    let id = started.good()["rollout"]["id"].clone();
    browser.until("document.body.innerText.includes('1 of 1')");
    let id = id.as_str().expect("an id");
    assert!(browser.text().contains(id), "{}", browser.text());
    browser.go(&format!("{site}/rollouts/{id}"));
    browser.until("document.body.innerText.includes('VM web-1 is done')");
    browser.picture(&pictures, "rollout");
}

#[test]
fn a_person_without_a_mouse_cancels_with_a_reason() {
    if let Some(why) = browser::missing() {
        println!("SKIPPED a_person_without_a_mouse_cancels_with_a_reason: {why}");
        return;
    }
    let (daemon, site, key) = host();
    let mut asked = announce(&daemon, "web-2");
    let mut browser = Browser::start();
    browser.go(&format!("{site}/events?key={key}"));
    let here = "document.activeElement.id || document.activeElement.name || \
                document.activeElement.textContent";
    // Every stop is one that can be seen, in the order of the page.
    let mut stops = Vec::new();
    while !stops
        .last()
        .is_some_and(|stop: &String| stop.starts_with("cancel-"))
    {
        browser.press("Tab", 9);
        stops.push(
            browser
                .evaluate(here)
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        );
        assert!(stops.len() < 20, "{stops:?}");
    }
    assert_eq!(stops[0], "To the page", "{stops:?}");
    assert!(
        stops.iter().any(|stop| stop.starts_with("approve-")),
        "{stops:?}"
    );
    assert!(stops.contains(&"reason".to_owned()), "{stops:?}");
    browser.press("Enter", 13);
    browser.until("document.body.innerText.includes('No pause is to come')");
    assert!(
        !asked.wait().expect("wait").success(),
        "the swap that was withdrawn"
    );
    assert_eq!(daemon.show("web-2")["release"], "1.0.0");
    // And without scripts the page is as whole.
    browser.scripts(false);
    browser.go(&format!("{site}/"));
    assert!(browser.text().contains("web-1"), "{}", browser.text());
}

#[test]
fn a_person_pauses_a_rollout_on_its_page_and_resumes_it() {
    if let Some(why) = browser::missing() {
        println!("SKIPPED a_person_pauses_a_rollout_on_its_page_and_resumes_it: {why}");
        return;
    }
    let (daemon, site, key) = host();
    // Nothing begins while the host is cordoned, so that there is time to click.
    daemon.ask(&["host", "cordon", "--reason", "wait"]).good();
    let started = daemon.ask(&[
        "rollout",
        "start",
        "--detach",
        "--to",
        "1.1.0",
        "--vm",
        "web-2",
        "--bake",
        "0s",
        "--well-for",
        "50ms",
        "--notice",
        "0s",
    ]);
    let id = started.good()["rollout"]["id"].clone();
    let id = id.as_str().expect("an id");
    let state = || daemon.ask(&["rollout", "show", id]).good()["rollout"]["state"].clone();
    let mut browser = Browser::start();
    browser.go(&format!("{site}/fleet?key={key}"));
    browser.click(&format!("a[href='/rollouts/{id}']"));
    browser.until("document.querySelector('button#pause') !== null");
    // Another site's form has the cookie at most.
    let (head, _) = post(&site, &format!("/rollouts/{id}/pause"), &key, "key=0123");
    assert!(head.starts_with("HTTP/1.1 403"), "{head}");
    assert_eq!(state(), "running");
    browser.click("button#pause");
    browser.until("document.querySelector('button#resume') !== null");
    assert_eq!(state(), "paused");
    daemon.ask(&["host", "uncordon"]).good();
    browser.until("document.body.innerText.includes('the rollout is paused')");
    // By the keyboard alone.
    browser.evaluate("document.querySelector('button#resume').focus()");
    browser.press("Enter", 13);
    browser.until("document.body.innerText.includes('VM web-2 is done')");
    assert_eq!(state(), "finished");
    browser.until("document.querySelector('main button') === null");
    let history = daemon.ask(&["rollout", "history", id]).good().to_string();
    assert!(
        history.contains("\"paused\"") && history.contains("\"resumed\""),
        "{history}"
    );
}

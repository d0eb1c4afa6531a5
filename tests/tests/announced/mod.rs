//! Scheduled Events as a stock Debian guest sees them that has nothing but curl: it reads, approves, is paused,
//! and reads again; over a swap, and over a daemon that starts anew in the middle. Beside it a guest that takes
//! its addresses.

use std::process::{Child, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_agent::protocol::Program;
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::ground::no_fast_kvm;
use stillpoint_tests::linux::images::{Form, Kernel};
use stillpoint_tests::linux::network::{no_network_namespace, tap};
use stillpoint_tests::linux::{Linux, Recipe};
use stillpoint_tests::needs;
use stillpoint_tests::patience::wait_for;

use super::{BOOT, host};

const AT: &str = "http://169.254.169.254";
const EVENTS: &str = "http://169.254.169.254/metadata/scheduledevents?api-version=2020-07-01";
const WEB: (&str, &str, &str) = ("web", "10.77.0.2", "52:54:00:00:77:02");
const DB: (&str, &str, &str) = ("db", "10.77.1.2", "52:54:00:00:77:03");

#[test]
fn a_guest_with_curl_hears_of_its_pause_and_says_when() -> anyhow::Result<()> {
    needs!(no_fast_kvm, no_network_namespace);
    let (_dir, mut daemon) = host()?;
    for (number, (name, address, mac)) in [WEB, DB].into_iter().enumerate() {
        let (link, gateway) = (format!("sp-tap{number}"), format!("10.77.{number}.1"));
        tap(&daemon, &link, &format!("{gateway}/24"))?;
        let recipe = Recipe::new(Kernel::Bookworm, Form::Vmlinux, 1)
            .archive("curl")
            .net(&format!("{link},mac={mac}"), &format!("{address}/24"))
            .gateway(&gateway);
        Linux::start(&daemon, name, &recipe)?;
    }
    {
        let (web, db) = (Linux::of(&daemon, WEB.0), Linux::of(&daemon, DB.0));
        for guest in [&web, &db] {
            guest.wait_up()?;
            is_known_as(guest, &guest.name)?;
            ensure!(
                events(guest)?["Events"] == Value::Array(vec![]),
                "an event already"
            );
        }
        let watch = Watch::start(&web, 1)?;
        let (swap, event) = announced(&daemon, &web)?;
        takes_the_addresses_of(&db, WEB)?;
        sees_nothing_of(&db, &event)?;
        paused_when_it_says(&daemon, &web, swap, &event)?;
        is_over(&web, 4)?;
        // The event was `Started` until this one had seen it.
        watch.heard_all_by_one_connection(&event)?;
    }
    let (swap, event) = announced(&daemon, &Linux::of(&daemon, WEB.0))?;
    let before = events(&Linux::of(&daemon, WEB.0))?;
    daemon.kill()?;
    daemon.restart()?;
    let (web, db) = (Linux::of(&daemon, WEB.0), Linux::of(&daemon, DB.0));
    ensure!(events(&web)? == before, "another event: {before:#}");
    is_known_as(&db, DB.0)?;
    sees_nothing_of(&db, &event)?;
    paused_when_it_says(&daemon, &web, swap, &event)?;
    // Nobody else has seen it since the pause.
    let started = events(&web)?;
    ensure!(
        started["Events"][0]["EventStatus"] == "Started"
            && started["Events"][0]["EventId"] == event["EventId"]
            && started["Events"][0]["NotBefore"] == "",
        "{started:#}"
    );
    is_over(&web, 7)?;
    hears_by_vsock_alone(&daemon, &db)?;
    web.dmesg_is_clean()
}

/// Without its network the guest has the service all the same, by the agent's relay; and the agent that
/// watches by vsock runs the guest's hooks, and says when they are done.
fn hears_by_vsock_alone(daemon: &Daemon, db: &Linux<'_>) -> anyhow::Result<()> {
    let agent = "cp /init /bin/stillpoint-agent; mkdir -p /hooks/before /hooks/after; \
         printf '#!/bin/sh\\nsleep 2; echo before >>/hooks/log\\n' >/hooks/before/10; \
         printf '#!/bin/sh\\necho after >>/hooks/log\\n' >/hooks/after/10; chmod +x /hooks/*/10; \
         ip link set eth0 down; ip addr add 169.254.169.254/32 dev lo; \
         setsid stillpoint-agent --relay 169.254.169.254:80 >/hooks/relay 2>&1 </dev/null & \
         setsid stillpoint-agent --events vsock --hooks /hooks --deadline 60 >/hooks/events 2>&1 </dev/null &";
    db.must_run("sh", &["-c", agent])?;
    is_known_as(db, DB.0)?;
    wait_for("the agent to listen", BOOT, || {
        let said = db.must_run("cat", &["/hooks/events"])?;
        Ok(said.contains("watching").then_some(()))
    })?;
    let to = db.show()?["release"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let swap = [
        "swap", "vmm", DB.0, "--to", &to, "--budget", "20s", "--notice", "1h",
    ];
    let swap = daemon.must(&swap)?;
    ensure!(swap["state"] == "moved", "{swap:#}\n{}", db.logs());
    let log = wait_for("the hooks after the pause", BOOT, || {
        let log = db.must_run("cat", &["/hooks/log"])?;
        Ok(log.contains("after").then_some(log))
    })?;
    ensure!(log == "before\nafter\n", "{log:?}");
    is_known_as(db, DB.0)
}

/// What curl prints in the guest, asked until it is answered. A guest has five answers in a second, whoever
/// in it asks: it asks no oftener than this, so that there is always one for the watch beside it.
fn curl(guest: &Linux<'_>, args: &[&str]) -> anyhow::Result<String> {
    const BREATH: Duration = Duration::from_millis(500);
    let all = [&["-sSf", "-m", "20", "-H", "Metadata:true"], args].concat();
    let mut last = String::new();
    wait_for("an answer to curl in the guest", BOOT, || {
        std::thread::sleep(BREATH);
        match guest.must_run("curl", &all) {
            Ok(said) => Ok(Some(said)),
            Err(error) => {
                last = format!("{error:#}");
                Ok(None)
            }
        }
    })
    .with_context(|| format!("{last}\n{}", guest.logs()))
}

fn events(guest: &Linux<'_>) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&curl(guest, &[EVENTS])?)?)
}

fn is_known_as(guest: &Linux<'_>, name: &str) -> anyhow::Result<()> {
    let path = "/metadata/instance/compute/name?api-version=2021-12-13&format=text";
    let known = curl(guest, &[&format!("{AT}{path}")])?;
    ensure!(known == name, "{known:?} is not {name:?}");
    Ok(())
}

/// Asks for a swap, and waits until the guest sees that it is scheduled.
fn announced(daemon: &Daemon, web: &Linux<'_>) -> anyhow::Result<(Child, Value)> {
    let to = web.show()?["release"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let pid = daemon.vmm_pid(WEB.0)?;
    let swap = daemon
        .command(&[
            "swap", "vmm", WEB.0, "--to", &to, "--budget", "20s", "--json",
        ])
        .stdout(Stdio::piped())
        .spawn()?;
    let event = wait_for("the guest's event", BOOT, || {
        let event = events(web)?["Events"][0].clone();
        Ok((event["EventStatus"] == "Scheduled").then_some(event))
    })?;
    ensure!(
        event["Resources"] == serde_json::json!([WEB.0]),
        "{event:#}"
    );
    let pauses = daemon.must(&["events", "ls"])?;
    let at = pauses[0]["not_before_unix_s"].as_u64().context("a time")?;
    let written = ["-u", "-d", &format!("@{at}"), "+%a, %d %b %Y %H:%M:%S GMT"];
    let written = web.must_run("date", &written)?;
    ensure!(event["NotBefore"] == written.trim(), "{event:#}: {written}");
    ensure!(daemon.vmm_pid(WEB.0)? == pid, "it was swapped at once");
    Ok((swap, event))
}

/// Takes the addresses of another guest, and the metadata service's way on the link.
fn takes_the_addresses_of(db: &Linux<'_>, of: (&str, &str, &str)) -> anyhow::Result<()> {
    let (_, address, mac) = of;
    let script = format!(
        "ip link set eth0 down && ip addr flush dev eth0 && ip link set eth0 address {mac} && \
         ip addr add {address}/24 dev eth0 && ip link set eth0 up && \
         ip route add 169.254.169.254 dev eth0"
    );
    db.must_run("sh", &["-c", &script]).map(drop)
}

/// The other guest, whatever its addresses, is who it is: it neither sees nor approves the event.
fn sees_nothing_of(db: &Linux<'_>, event: &Value) -> anyhow::Result<()> {
    is_known_as(db, DB.0)?;
    let seen = events(db)?;
    ensure!(seen["Events"] == Value::Array(vec![]), "{seen:#}");
    let approval = approval(event);
    let post = ["-sS", "-m", "20", "-H", "Metadata:true", "-d", &approval];
    let status = [
        &post[..],
        &["-o", "/dev/null", "-w", "%{http_code}", EVENTS],
    ]
    .concat();
    let refused = || Ok(Some(db.must_run("curl", &status)?).filter(|said| said != "429"));
    let refused = wait_for("an answer to the other's approval", BOOT, refused)?;
    ensure!(refused == "400", "{refused}");
    Ok(())
}

fn approval(event: &Value) -> String {
    serde_json::json!({ "StartRequests": [{ "EventId": event["EventId"] }] }).to_string()
}

/// The guest approves; it is paused then, long before the time.
fn paused_when_it_says(
    daemon: &Daemon,
    web: &Linux<'_>,
    swap: Child,
    event: &Value,
) -> anyhow::Result<()> {
    curl(web, &["-d", &approval(event), EVENTS])?;
    let ended = swap.wait_with_output()?;
    let swap: Value = serde_json::from_slice(&ended.stdout)?;
    ensure!(swap["state"] == "moved", "{swap:#}\n{}", web.logs());
    let pauses = daemon.must(&["events", "ls", "--all"])?;
    let pause = pauses.as_array().into_iter().flatten();
    let pause = pause
        .rev()
        .find(|pause| pause["notices"][0]["event"] == event["EventId"])
        .with_context(|| format!("{pauses:#}"))?;
    let approval = &pause["notices"][0]["approval"];
    ensure!(approval["by"]["vm"] == WEB.0, "{pause:#}");
    let ns = |value: &Value| value.as_u64().with_context(|| format!("{pause:#}"));
    let (said, begun) = (
        ns(&approval["at_unix_ns"])?,
        ns(&pause["started_at_unix_ns"])?,
    );
    let not_before = ns(&pause["not_before_unix_s"])?;
    ensure!(begun / 1_000_000_000 < not_before, "it waited: {pause:#}");
    println!(
        "started {} ms after its approval; swapped in {} ms",
        (begun - said) / 1_000_000,
        (ns(&swap["ended_at_unix_ns"])? - begun) / 1_000_000
    );
    Ok(())
}

fn is_over(web: &Linux<'_>, incarnation: u64) -> anyhow::Result<()> {
    let idle = serde_json::json!({ "DocumentIncarnation": incarnation, "Events": [] });
    wait_for("an empty list", BOOT, || {
        Ok((events(web)? == idle).then_some(()))
    })
}

/// A program in the guest that waits for three changes by one connection.
struct Watch(JoinHandle<anyhow::Result<String>>);

impl Watch {
    fn start(guest: &Linux<'_>, incarnation: u64) -> anyhow::Result<Self> {
        let mut agent = guest.agent()?;
        let mut args = ["-sSf", "-m", "600", "-w", "\n%{num_connects}\n"]
            .map(str::to_owned)
            .to_vec();
        args.extend(["-H", "Metadata:true"].map(str::to_owned));
        for last in incarnation..incarnation + 3 {
            args.push(format!(
                "{EVENTS}&wait_for_change=true&last_etag={last}&timeout_sec=300"
            ));
        }
        let program = Program {
            program: "curl".into(),
            args,
            ..Program::default()
        };
        let job = agent.start(program)?.job;
        Ok(Self(std::thread::spawn(move || {
            let (mut said, mut errors) = (String::new(), String::new());
            let exit = agent.follow(job, |part| {
                said += &part.stdout;
                errors += &part.stderr;
            })?;
            ensure!(exit.is_success(), "{exit:?}: {said}{errors}");
            Ok(said)
        })))
    }

    /// It was told of each change, and its connection lived through the swap.
    fn heard_all_by_one_connection(self, event: &Value) -> anyhow::Result<()> {
        let said = self.0.join().expect("it does not panic")?;
        let lines: Vec<Value> = said
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()?;
        let documents: Vec<_> = lines.iter().step_by(2).collect();
        let connects: Vec<_> = lines.iter().skip(1).step_by(2).collect();
        ensure!(connects == [1, 0, 0], "not one connection: {said}");
        let [scheduled, started, over] = documents[..] else {
            anyhow::bail!("not three documents: {said}");
        };
        for (document, status) in [(scheduled, "Scheduled"), (started, "Started")] {
            ensure!(
                document["Events"][0]["EventStatus"] == status
                    && document["Events"][0]["EventId"] == event["EventId"],
                "no {status}: {said}"
            );
        }
        ensure!(over["Events"] == Value::Array(vec![]), "{said}");
        Ok(())
    }
}

//! The guests, what they do, and what of them must be as it was.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stillpoint_agent::protocol::Program;
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::linux::images::{Form, Kernel};
use stillpoint_tests::linux::workload::verify_disk;
use stillpoint_tests::linux::{Linux, Recipe};
use stillpoint_tests::patience::{PATIENCE, wait_for};

use super::clock::{self, Off};
use super::wires;
use crate::stages;

const DISK_MIB: u64 = 48;
const MEMORY_MIB: u64 = 192;
/// Fills memory with what is random, and looks at it over and over.
const MEMORY: &str = "dd if=/dev/urandom of=/tmp/ram bs=1M count=16 2>/dev/null; md5sum /tmp/ram >/tmp/ram.md5; n=0; \
    while md5sum -c -s /tmp/ram.md5; do n=$((n+1)); echo $n >/tmp/ram.looks; sleep 0.2; done; exit 1";
/// Asks what is going to happen, writes it down, and approves of it.
const EVENTS: &str = r#"at='http://169.254.169.254/metadata/scheduledevents?api-version=2020-07-01'
    ask() { curl -sSf -m 8 -H Metadata:true "$@" "$at"; }
    while :; do
    said=$(ask) && echo "$said" >>/tmp/events
    id=$(echo "$said" | sed -n 's/.*"EventId":"\([^"]*\)","EventStatus":"Scheduled".*/\1/p')
    [ -n "$id" ] && ask -d "{\"StartRequests\":[{\"EventId\":\"$id\"}]}"
    sleep 1; done"#;

/// A guest of bare metal: two vCPUs that count, each looking after its RAM.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Pulse {
    name: String,
    counters: Vec<u64>,
}

impl Pulse {
    pub(super) fn new(number: usize) -> Self {
        Self {
            name: format!("pulse-{number}"),
            counters: Vec::new(),
        }
    }

    pub(super) fn begin(&self, daemon: &Daemon) -> anyhow::Result<()> {
        stages::run_pulse(daemon, &self.name, &[]).map(drop)
    }

    /// Notes where it is.
    pub(super) fn look(&mut self, daemon: &Daemon) -> anyhow::Result<()> {
        let seen = daemon.pulse(&self.name)?.look()?;
        self.counters = seen.vcpus.iter().map(|vcpu| vcpu.counter).collect();
        Ok(())
    }

    /// It counts on from there, its RAM holds what it should, and nobody ran it twice.
    pub(super) fn went_on(&mut self, daemon: &Daemon) -> anyhow::Result<()> {
        let pulse = daemon.pulse(&self.name)?;
        let found = pulse.look()?;
        for (vcpu, (was, now)) in self.counters.iter().zip(&found.vcpus).enumerate() {
            ensure!(
                now.counter >= *was,
                "{}: vCPU {vcpu} counts {}, and counted {was} before",
                self.name,
                now.counter
            );
        }
        let seen = pulse.wait_progress(&[0, 1], 20)?;
        ensure!(
            stages::faults(&seen).is_empty(),
            "{}: {:#?}",
            self.name,
            stages::faults(&seen)
        );
        pulse.ran_once()
    }

    pub(super) fn pause(&self, daemon: &Daemon) -> anyhow::Result<Value> {
        pause(daemon, &self.name)
    }
}

fn pause(daemon: &Daemon, name: &str) -> anyhow::Result<Value> {
    let report = daemon.must(&["report", name])?["report"].clone();
    let blackout = report["blackout"]["host_ns"].clone();
    ensure!(blackout.as_u64().is_some_and(|ns| ns > 0), "{report:#}");
    Ok(json!({"name": name, "blackout_ns": blackout, "phases": report["phases"]}))
}

/// A Debian guest at work.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Debian {
    number: usize,
    jobs: Vec<(String, u64)>,
    boot_id: String,
    looks: u64,
    lines: u64,
    events: u64,
    off: Off,
}

impl Debian {
    pub(super) fn new(number: usize) -> Self {
        Self {
            number,
            jobs: Vec::new(),
            boot_id: String::new(),
            looks: 0,
            lines: 0,
            events: 0,
            off: Off::default(),
        }
    }

    fn name(&self) -> String {
        format!("deb-{}", self.number)
    }

    pub(super) fn tap(&self) -> String {
        format!("sp-tap{}", self.number)
    }

    fn disk(&self) -> PathBuf {
        format!("/scratch/{}.img", self.name()).into()
    }

    fn guest<'d>(&self, daemon: &'d Daemon) -> Linux<'d> {
        Linux::of(daemon, &self.name())
    }

    /// The first has two vCPUs, and the newer kernel; the others one, and the older.
    fn recipe(&self) -> Recipe {
        let (kernel, cpus) = match self.number {
            1 => (Kernel::Backports, 2),
            _ => (Kernel::Bookworm, 1),
        };
        let mut recipe = Recipe::new(kernel, Form::Vmlinux, cpus)
            .disk(&self.disk())
            .net(&self.tap(), &format!("10.0.2.{}/24", 50 + self.number))
            .gateway("10.0.2.2");
        if self.number == 1 {
            recipe = recipe.archive("curl");
        }
        recipe.memory_mib = MEMORY_MIB;
        recipe.devices.extend(["--survive".into(), "kernel".into()]);
        recipe
    }

    /// Boots it, and has it begin to work.
    pub(super) fn begin(&mut self, daemon: &Daemon) -> anyhow::Result<()> {
        std::fs::File::create(self.disk())?.set_len(DISK_MIB << 20)?;
        let guest = Linux::boot(daemon, &self.name(), &self.recipe())?;
        let echo = wires::outside()?.echo;
        let mut work = vec![
            (
                "disk",
                "exec /bin/load disk --device /dev/vda --duration 3600 --threads 1".to_owned(),
            ),
            (
                "echo",
                format!(
                    "exec /bin/load echo --addr {echo} --seconds 3600 --interval-ms 20 --stall-limit 300"
                ),
            ),
            ("memory", MEMORY.to_owned()),
        ];
        if self.number == 1 {
            work.push(("cpu", "exec /bin/load cpu --seconds 3600".to_owned()));
            work.push(("events", EVENTS.to_owned()));
        }
        for (name, script) in work {
            let program = Program {
                program: "/bin/sh".into(),
                args: vec!["-c".into(), format!("exec >/tmp/{name}.out 2>&1; {script}")],
                ..Program::default()
            };
            let job = guest.agent()?.start(program)?.job;
            self.jobs.push((name.to_owned(), job));
        }
        self.boot_id = guest.health()?.boot_id;
        wait_for("its work to begin", PATIENCE * 2, || {
            let (looks, lines, events) = self.progress(&guest)?;
            let heard = self.number != 1 || events > 0;
            Ok((looks > 0 && lines > 5 && heard).then_some(()))
        })
        .with_context(|| self.said(&guest))?;
        self.off = clock::of_guest(&guest)?;
        println!("scenario: {} is at work", self.name());
        Ok(())
    }

    /// How often it looked at its memory, wrote to its disk, and asked for events.
    fn progress(&self, guest: &Linux<'_>) -> anyhow::Result<(u64, u64, u64)> {
        let script = "cat /tmp/ram.looks 2>/dev/null || echo 0; wc -l </tmp/disk.out; \
                      cat /tmp/events 2>/dev/null | wc -l";
        let text = guest.must_run("/bin/sh", &["-c", script])?;
        let mut numbers = text
            .lines()
            .map(|line| line.trim().parse::<u64>().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        Ok((next(), next(), next()))
    }

    /// What its work printed, for when it does not go on.
    fn said(&self, guest: &Linux<'_>) -> String {
        let script = "for f in /tmp/*.out; do echo \"== $f\"; tail -n 3 $f; done; \
                      echo == /tmp/events; tail -n 90 /tmp/events | uniq -c";
        let said = guest.must_run("/bin/sh", &["-c", script]);
        format!(
            "{}: {}",
            self.name(),
            said.unwrap_or_else(|error| format!("{error:#}"))
        )
    }

    /// Notes where it is.
    pub(super) fn look(&mut self, daemon: &Daemon) -> anyhow::Result<()> {
        let guest = self.guest(daemon);
        (self.looks, self.lines, self.events) = self.progress(&guest)?;
        self.off = clock::of_guest(&guest)?;
        Ok(())
    }

    /// The same boot, the same work, its clock as it was; and it was told before and after.
    pub(super) fn went_on(&mut self, daemon: &Daemon) -> anyhow::Result<()> {
        let guest = self.guest(daemon);
        let health = guest.wait_up()?;
        ensure!(
            health.boot_id == self.boot_id,
            "{} is another boot",
            self.name()
        );
        wait_for("its work to go on", PATIENCE * 2, || {
            let (looks, lines, _) = self.progress(&guest)?;
            Ok((looks > self.looks && lines > self.lines).then_some(()))
        })
        .with_context(|| self.said(&guest))?;
        for (name, job) in &self.jobs {
            let progress = guest.agent()?.poll(*job, std::time::Duration::ZERO)?;
            ensure!(
                progress.exit.is_none(),
                "{}: its {name} ended: {progress:?}\n{}",
                self.name(),
                self.said(&guest)
            );
        }
        let moved = clock::of_guest(&guest)?.since(&self.off)?;
        println!(
            "scenario: {} went on; its clock moved by {moved} against the host's",
            self.name()
        );
        if self.number == 1 {
            self.was_told(&guest)?;
        }
        guest.dmesg_is_clean()
    }

    /// Of what it was told since it was last looked at: that the pause comes, and afterwards that it came.
    fn was_told(&self, guest: &Linux<'_>) -> anyhow::Result<()> {
        let script = format!("tail -n +{} /tmp/events", self.events + 1);
        let heard = wait_for("it to hear that its pause came", PATIENCE, || {
            let text = guest.must_run("/bin/sh", &["-c", &script])?;
            let events = text
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let states: Vec<String> = events
                .filter_map(|document| {
                    let event = document["Events"].as_array()?.first()?.clone();
                    Some(event["EventStatus"].as_str()?.to_owned())
                })
                .collect();
            Ok(states
                .iter()
                .any(|state| state == "Started")
                .then_some(states))
        })
        .with_context(|| self.said(guest))?;
        let first = heard.first().map(String::as_str);
        let started = heard.iter().position(|state| state == "Started");
        let later = started.map_or(&[][..], |at| &heard[at..]);
        ensure!(
            first == Some("Scheduled") && later.iter().all(|state| state == "Started"),
            "it heard {heard:?}"
        );
        println!(
            "scenario: {} heard {} times that it comes, then that it came",
            self.name(),
            heard.len() - later.len()
        );
        Ok(())
    }

    pub(super) fn pause(&self, daemon: &Daemon) -> anyhow::Result<Value> {
        pause(daemon, &self.name())
    }

    /// Its work comes to its end, which must be a good one; its disk holds what it was told is durable.
    pub(super) fn end(&self, daemon: &Daemon) -> anyhow::Result<Value> {
        let guest = self.guest(daemon);
        let mut reports = Vec::new();
        for (name, job) in &self.jobs {
            guest.agent()?.kill(*job, 15)?;
            let exit = guest.agent()?.follow(*job, |_| {})?;
            // Of the loads' own; a shell's loop just ends.
            if ["memory", "events"].contains(&name.as_str()) {
                continue;
            }
            ensure!(
                exit.is_success(),
                "{}: its {name} ended with {exit:?}\n{}",
                self.name(),
                self.said(&guest)
            );
            let last = guest.must_run("/bin/tail", &["-n", "1", &format!("/tmp/{name}.out")])?;
            let last: Value = serde_json::from_str(&last).with_context(|| last.clone())?;
            ensure!(last["report"]["ok"] == true, "{}: {last:#}", self.name());
            reports.push(last["report"].clone());
        }
        guest.must_run("/bin/md5sum", &["-c", "-s", "/tmp/ram.md5"])?;
        let output = daemon.dir().join(format!("{}.out", self.name()));
        std::fs::write(&output, journal(&guest)?)?;
        guest.must_run("/bin/sync", &[])?;
        let disk = verify_disk(Path::new(&self.disk()), &output)?;
        println!(
            "scenario: {}'s disk, looked at from the host: {disk}",
            self.name()
        );
        guest.dmesg_is_clean()?;
        Ok(json!({"name": self.name(), "disk": disk, "reports": reports}))
    }
}

/// All that its disk's work printed, in parts: one answer of the agent holds 128 KiB.
fn journal(guest: &Linux<'_>) -> anyhow::Result<String> {
    const PART: usize = 100_000;
    let mut text = String::new();
    loop {
        let script = format!("tail -c +{} /tmp/disk.out | head -c {PART}", text.len() + 1);
        let part = guest.must_run("/bin/sh", &["-c", &script])?;
        text.push_str(&part);
        if part.len() < PART {
            return Ok(text);
        }
    }
}

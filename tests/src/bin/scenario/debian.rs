//! A Debian guest at work while its host's kernel is swapped: a disk that is written and checked from both
//! sides, a network, every CPU, and its kernel's log.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use stillpoint_agent::protocol::Program;
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::linux::images::{Form, Kernel};
use stillpoint_tests::linux::workload::verify_disk;
use stillpoint_tests::linux::{Linux, Recipe};
use stillpoint_tests::patience::{PATIENCE, wait_for};

pub(crate) const GUEST: &str = "deb-1";
const DISK: &str = "/scratch/deb.img";
const TAP: &str = "sp-tap0";
const ADDRESS: &str = "10.77.0.1";
/// What its work prints, in the guest.
const OUTPUT: &str = "/tmp/disk.out";

/// The guest's wire, which ends with the kernel and is made anew under the next.
pub(crate) fn tap() -> anyhow::Result<()> {
    let script =
        format!("tunctl -t {TAP} && ip addr add {ADDRESS}/24 dev {TAP} && ip link set {TAP} up");
    let output = Command::new("/bin/busybox")
        .args(["sh", "-c", &script])
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{script}: {said}");
    Ok(())
}

/// Boots it and has it begin to work; tells which jobs those are.
pub(crate) fn begin(daemon: &Daemon) -> anyhow::Result<Value> {
    tap()?;
    std::fs::File::create(DISK)?.set_len(64 << 20)?;
    let mut recipe = Recipe::new(Kernel::Backports, Form::Vmlinux, 2)
        .disk(Path::new(DISK))
        .net(TAP, "10.77.0.2/24")
        .open();
    recipe.devices.extend(["--survive".into(), "kernel".into()]);
    let guest = Linux::boot(daemon, GUEST, &recipe)?;
    let disk = format!("/bin/load disk --device /dev/vda --duration 3600 --threads 2 >{OUTPUT}");
    let jobs = [disk.as_str(), "/bin/load cpu --seconds 3600 >/tmp/cpu.out"].map(|script| {
        let program = Program {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), format!("exec {script} 2>&1")],
            ..Program::default()
        };
        Ok::<_, anyhow::Error>(guest.agent()?.start(program)?.job)
    });
    let jobs = jobs.into_iter().collect::<anyhow::Result<Vec<u64>>>()?;
    let began = wait_for("its disk to be written", PATIENCE, || {
        let text = guest.must_run("/bin/sh", &["-c", &format!("wc -l <{OUTPUT}")])?;
        let lines: u64 = text.trim().parse().unwrap_or(0);
        Ok((lines > 20).then_some(lines))
    })?;
    println!("scenario: Debian runs: it writes its disk, and computes on both vCPUs");
    let uptime = guest.must_run("/bin/cat", &["/proc/uptime"])?;
    let late = late_ms(&guest)?;
    Ok(json!({"jobs": jobs, "lines": began, "uptime": uptime, "late_ms": late}))
}

/// It answers.
pub(crate) fn is_up(daemon: &Daemon) -> anyhow::Result<()> {
    let health = Linux::of(daemon, GUEST).wait_up()?;
    ensure!(health.cpus == 2, "{health:?}");
    Ok(())
}

/// How late its wall clock is, ms, as its own `date` says it. A question and its answer lie between the
/// two readings; the quickest of some counts.
fn late_ms(guest: &Linux<'_>) -> anyhow::Result<i64> {
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
    };
    let mut best = (Duration::MAX, 0);
    for _ in 0..5 {
        let asked = now();
        let text = guest.must_run("/bin/date", &["+%s"])?;
        let took = now().saturating_sub(asked);
        let said: u64 = text.trim().parse()?;
        let middle = asked + took / 2;
        let late = i128::try_from(middle.as_millis())? - i128::from(said) * 1000;
        if took < best.0 {
            best = (took, i64::try_from(late)?);
        }
    }
    Ok(best.1)
}

/// It goes on: the same boot, the same jobs, nothing lost of its disk, its network there, no complaint.
pub(crate) fn end(daemon: &Daemon, before: &Value) -> anyhow::Result<Value> {
    let guest = Linux::of(daemon, GUEST);
    let health = guest.wait_up()?;
    ensure!(health.cpus == 2, "{health:?}");
    let uptime = guest.must_run("/bin/cat", &["/proc/uptime"])?;
    let seconds = |text: &str| text.split('.').next().and_then(|s| s.parse::<u64>().ok());
    let was = before["uptime"]
        .as_str()
        .and_then(seconds)
        .context("its uptime")?;
    ensure!(
        seconds(&uptime).is_some_and(|now| now > was),
        "{uptime} after {was}"
    );
    guest.must_run("/bin/ping", &["-c", "3", "-W", "10", ADDRESS])?;
    println!("scenario: Debian went on, and its network is there");
    // Whole seconds, and the time that answers take on such a host.
    let late = late_ms(&guest)?;
    let was_late = before["late_ms"].as_i64().context("its wall clock")?;
    println!(
        "scenario: its wall clock is {late} ms late, as it was {was_late} ms before, to whole seconds"
    );
    ensure!(
        (late - was_late).abs() < 3000,
        "its wall clock: {was_late} ms, then {late} ms"
    );
    let count = || -> anyhow::Result<u64> {
        let text = guest.must_run("/bin/sh", &["-c", &format!("wc -l <{OUTPUT}")])?;
        Ok(text.trim().parse()?)
    };
    let from = count()?;
    wait_for("its disk to be written again", PATIENCE, || {
        Ok((count()? > from).then_some(()))
    })?;
    let jobs: Vec<u64> = serde_json::from_value(before["jobs"].clone())?;
    let mut ends = Vec::new();
    for &job in &jobs {
        guest.agent()?.kill(job, 15)?;
        let exit = guest.agent()?.follow(job, |_| {})?;
        ensure!(exit.is_success(), "a job of the guest ended with {exit:?}");
        ends.push(format!("{exit:?}"));
    }
    let output = daemon.dir().join("disk.out");
    std::fs::write(&output, guest.must_run("/bin/cat", &[OUTPUT])?)?;
    guest.must_run("/bin/sync", &[])?;
    let disk = verify_disk(Path::new(DISK), &output)?;
    println!("scenario: its disk, looked at from the host: {disk}");
    guest.dmesg_is_clean()?;
    println!("scenario: its kernel has nothing to complain of");
    let report = daemon.must(&["report", GUEST])?;
    Ok(json!({"uptime": [before["uptime"], uptime], "disk": disk, "jobs": ends, "report": report}))
}

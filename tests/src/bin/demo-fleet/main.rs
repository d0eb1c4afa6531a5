//! `make demo-fleet`: three hosts, three members of etcd, twelve guests in three availability sets. A good
//! release goes through, one update domain at a time, though its driver is killed in the middle; a bad one
//! stops at its canary and is put back. Exits non-zero if a line of it is untrue.

mod fleet;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_images::cache::Cache;
use stillpoint_images::etcd::Cluster;
use stillpoint_images::packages::Set;
use stillpoint_images::progress::Progress;
use stillpoint_tests::ground;
use stillpoint_tests::patience::wait_for;

use fleet::{Fleet, GUESTS};

/// How long a rollout of twelve guests may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(400);

fn main() -> ExitCode {
    match tell() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo-fleet: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn etcd() -> anyhow::Result<std::path::PathBuf> {
    if let Some(named) = std::env::var_os("STILLPOINT_ETCD") {
        return Ok(named.into());
    }
    let cache = Cache::of_this_user()?;
    let fetched = Set::Etcd.fetch(&cache, false, Progress::People);
    Ok(fetched
        .context("no etcd, which is the store that the fleet shares")?
        .etcd())
}

fn tell() -> anyhow::Result<()> {
    if let Some(reason) = ground::no_kvm() {
        anyhow::bail!("{reason}; `stillpoint doctor` shows what this host lacks");
    }
    let began = Instant::now();
    let server = etcd()?;
    let dir = tempfile::Builder::new()
        .prefix("stillpoint-demo-")
        .tempdir()?;
    let cluster = Cluster::start(&server, dir.path(), 3)?;
    println!("three members of etcd: {}", cluster.url());
    let mut fleet = Fleet::start(dir.path(), &cluster.url())?;
    say(&fleet, 0, &["host", "ls"])?;

    println!("\n── 1: a good release, by update domain; its driver is killed in the middle ──");
    say(&fleet, 0, &fleet::line("plan", "0.2.1"))?;
    let id = start(&fleet, "0.2.1")?;
    let dead = kill_the_driver(&mut fleet, &id)?;
    let other = (dead + 1) % 3;
    let over = follow(&fleet, other, &id, |_| Ok(()))?;
    ensure!(over["rollout"]["state"] == "finished", "{over:#}");
    for (vm, moves) in fleet.moves()? {
        ensure!(moves == 1, "{vm} was swapped {moves} times");
    }
    fleet.are_well()?;
    println!("\nall {GUESTS} guests swapped once each, and none of them noticed");
    blackouts(&over)?;

    println!("\n── 2: a release whose guests lose their heartbeat ──");
    let id = start(&fleet, "0.2.2-bad")?;
    let over = follow(&fleet, other, &id, |_| Ok(()))?;
    ensure!(over["rollout"]["state"] == "rolled_back", "{over:#}");
    let touched = fleet.moves()?.into_iter().filter(|(_, moves)| *moves > 1);
    let touched: Vec<_> = touched.collect();
    ensure!(
        touched.len() == 1 && touched[0].1 == 3,
        "more than the canary was touched: {touched:?}"
    );
    let vm = &touched[0].0;
    println!("\n{vm} was the canary: there and back; nobody else was touched");
    say(&fleet, other, &["rollout", "explain", vm])?;
    fleet.are_well()?;
    fleet.end()?;
    println!(
        "\nAll of it true, in {:.0} s. More: docs/guide.md",
        began.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Runs a command for people, and shows it.
fn say(fleet: &Fleet, host: usize, args: &[&str]) -> anyhow::Result<()> {
    println!("$ stillpoint {}", args.join(" "));
    let status = fleet.daemons[host].command(args).status()?;
    ensure!(status.success(), "{status}");
    Ok(())
}

fn start(fleet: &Fleet, to: &str) -> anyhow::Result<String> {
    let mut args = fleet::line("start", to);
    args.push("--detach");
    println!("$ stillpoint {}", args.join(" "));
    let view = fleet.daemons[0].must(&args)?;
    let id = view["rollout"]["id"].as_str().context("an id")?;
    Ok(id.to_owned())
}

/// Waits until some of it is done, kills whoever drives, and starts that daemon again once another drives.
fn kill_the_driver(fleet: &mut Fleet, id: &str) -> anyhow::Result<usize> {
    let view = follow(fleet, 0, id, |view| {
        let units = view["rollout"]["units"].as_array();
        let done = units.map_or(0, |units| {
            units.iter().filter(|unit| unit["phase"] == "done").count()
        });
        match done >= 3 {
            true => Err(Reached),
            false => Ok(()),
        }
    })?;
    ensure!(view["rollout"]["state"] == "running", "{view:#}");
    let dead = fleet.driver(0)?.context("nobody drives")?;
    fleet.daemons[dead].kill()?;
    println!("    ── h{dead}, which drives, is killed (kill -9); its guests run on ──");
    let other = (dead + 1) % 3;
    let next = wait_for("another driver", PATIENCE, || {
        Ok(fleet.driver(other)?.filter(|&next| next != dead))
    })?;
    println!("    ── h{next} drives now; h{dead}'s daemon is started again ──");
    fleet.daemons[dead].restart()?;
    Ok(dead)
}

/// What was waited for has come.
struct Reached;

/// Prints what is done as it is, until the rollout is over or `enough` says so.
fn follow(
    fleet: &Fleet,
    host: usize,
    id: &str,
    enough: impl Fn(&Value) -> Result<(), Reached>,
) -> anyhow::Result<Value> {
    let daemon = &fleet.daemons[host];
    wait_for("the rollout's end", PATIENCE, || {
        let history = daemon.get(&format!("/v1/rollouts/{id}/history"));
        let view = daemon.get(&format!("/v1/rollouts/{id}"));
        fleet.tell(id, &history);
        let state = view["rollout"]["state"].as_str().unwrap_or_default();
        let is_over = !matches!(state, "" | "running" | "rolling_back");
        let has_enough = !view.is_null() && enough(&view).is_err();
        Ok((is_over || has_enough).then_some(view))
    })
}

fn blackouts(over: &Value) -> anyhow::Result<()> {
    let units = over["rollout"]["units"].as_array().context("units")?;
    let blackouts = units.iter().filter_map(|unit| unit["blackout_ns"].as_u64());
    let mut blackouts: Vec<u64> = blackouts.collect();
    blackouts.sort_unstable();
    let ms = |at: usize| -> anyhow::Result<f64> {
        let ns = blackouts.get(at).context("no blackout")?;
        Ok(Duration::from_nanos(*ns).as_secs_f64() * 1e3)
    };
    println!(
        "blackouts: {:.2} ms at the least, {:.2} in the middle, {:.2} at the most",
        ms(0)?,
        ms(blackouts.len() / 2)?,
        ms(blackouts.len().saturating_sub(1))?
    );
    Ok(())
}

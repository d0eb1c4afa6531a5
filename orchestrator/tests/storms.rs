//! A rollout through storms: members of etcd and daemons killed, members cut off, standing still and with slow disks,
//! histories compacted, at random moments; and the laws of a shared store in each of these weathers. By `make etcd`;
//! needs root, for network namespaces.

mod daemon;
mod etcd;
mod laws;
mod storm;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use daemon::Daemon;
use etcd::{needs_etcd, skip};
use orchestrator::store::shared::Shared;
use orchestrator::store::shared::etcd::{Endpoint, Etcd, EtcdConfig};
use storm::Storm;

/// How long a rollout may take, storms included.
const PATIENCE: Duration = Duration::from_secs(240);
/// How many storms there are, at least.
const STORMS: usize = 16;

fn fleet(url: &str) -> Vec<Daemon> {
    let start = |number: usize| {
        let name = format!("h{number}");
        let daemon = Daemon::start_with(&["--store", url, "--host-name", &name]);
        for release in ["one", "two"] {
            daemon.add(release, None);
        }
        daemon
    };
    let daemons: Vec<Daemon> = (0..3).map(start).collect();
    for guest in 0..4 {
        for (host, daemon) in daemons.iter().enumerate() {
            let name = format!("web-{host}-{guest}");
            daemon.run_with(&name, "one", &["--set", "web"]).good();
        }
    }
    daemons
}

/// Starts it by whoever can; each asks under an id of its own, and a second one over the same guests is refused.
fn start(daemons: &[Daemon], to: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let args = [
            "rollout",
            "start",
            "--detach",
            "--to",
            to,
            "--bake",
            "0s",
            "--well-for",
            "50ms",
            "--deadline",
            "120s",
            "--retry-after",
            "200ms",
            "--tries",
            "50",
            "--notice",
            "0s",
            "--at-once",
            "2",
            "--set-budget",
            "40%",
        ];
        let said = daemons[0].ask(&args);
        if said.ok {
            return said.out["rollout"]["id"]
                .as_str()
                .expect("an id")
                .to_owned();
        }
        assert!(Instant::now() < deadline, "{}", said.error);
        std::thread::sleep(Duration::from_millis(300));
    }
}

fn state(daemons: &[Daemon], id: &str) -> String {
    let mut said = daemons
        .iter()
        .map(|daemon| daemon.ask(&["rollout", "show", id]));
    let found = said.find(|said| said.ok);
    let state = found.map(|said| said.out["rollout"]["state"].clone());
    state
        .and_then(|state| Some(state.as_str()?.to_owned()))
        .unwrap_or_default()
}

/// One thing that goes wrong, and is over when this returns.
fn strike(random: &mut fastrand::Rng, storm: &mut Storm, daemons: &mut [Daemon]) -> String {
    let (member, host) = (random.usize(0..3), random.usize(0..3));
    let lasts = Duration::from_millis(random.u64(200..4_000));
    match random.u8(0..7) {
        0 => {
            storm.kill(member);
            std::thread::sleep(lasts / 2);
            storm.spawn(member);
            storm.wait_up(member);
            format!("member {member} killed")
        }
        1 => {
            storm.part_from_peers(member, true);
            std::thread::sleep(lasts);
            storm.part_from_peers(member, false);
            format!("member {member} parted from its peers for {lasts:?}")
        }
        2 => {
            storm.part_from_all(member, true);
            std::thread::sleep(lasts);
            storm.part_from_all(member, false);
            format!("member {member} parted from all for {lasts:?}")
        }
        3 => {
            storm.stand_still(member, true);
            std::thread::sleep(lasts);
            storm.stand_still(member, false);
            format!("member {member} stood still for {lasts:?}")
        }
        4 => {
            daemons[host].kill();
            std::thread::sleep(lasts / 4);
            daemons[host].spawn();
            format!("daemon {host} killed")
        }
        5 => {
            let by = Duration::from_millis(random.u64(50..900));
            let slow = storm.slow_disk(member, by);
            std::thread::sleep(lasts);
            match slow {
                Some(_) => format!("member {member}'s disk slow by {by:?} for {lasts:?}"),
                None => "no slow disk: there is no strace, or it may not".into(),
            }
        }
        _ => format!("compacted: {}", storm.compact()),
    }
}

#[test]
#[ignore = "takes minutes, and root: make etcd"]
fn through_kills_partitions_and_compactions_no_step_is_lost_or_done_twice() {
    let server = needs_etcd!();
    if !rustix::process::geteuid().is_root() {
        return skip("needs root, for network namespaces");
    }
    let seed = std::env::var("STILLPOINT_SEED").ok();
    let seed = seed.map_or_else(
        || fastrand::u64(0..1_000_000),
        |seed| seed.parse().expect("a number"),
    );
    eprintln!("STILLPOINT_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let Some(mut storm) = Storm::start(&server) else {
        return skip("network namespaces or bridges can't be made here");
    };
    let mut daemons = fleet(&storm.url());
    let began = Instant::now();
    let (mut struck, mut rollouts) = (Vec::new(), 0_usize);
    // There and back again, until there were enough storms.
    while struck.len() < STORMS {
        let to = if rollouts % 2 == 0 { "two" } else { "one" };
        let id = start(&daemons, to);
        rollouts += 1;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match state(&daemons, &id).as_str() {
                "finished" => break,
                "running" | "" => {}
                other => panic!("seed {seed}: it is {other}, after {struck:?}"),
            }
            assert!(
                Instant::now() < deadline,
                "seed {seed}: not in time, after {struck:?}"
            );
            std::thread::sleep(Duration::from_millis(random.u64(0..500)));
            if struck.len() < STORMS * 2 {
                struck.push(strike(&mut random, &mut storm, &mut daemons));
            }
        }
    }
    // Each guest moved once in each rollout, by its own host's records, and no swap is left open.
    for daemon in &daemons {
        let swaps = daemon.ask(&["report"]).good();
        let mut moves = std::collections::BTreeMap::new();
        for swap in swaps.as_array().expect("swaps") {
            let moved = usize::from(swap["state"] == "moved");
            *moves.entry(swap["vm"].to_string()).or_insert(0) += moved;
        }
        assert_eq!(moves.len(), 4, "seed {seed}: {moves:?}");
        let exact = moves.values().all(|count| *count == rollouts);
        assert!(
            exact,
            "seed {seed}, {rollouts} rollouts: {moves:?}, after {struck:?}"
        );
    }
    eprintln!(
        "{} storms, {rollouts} rollouts of 12 guests, in {:?}: {struck:#?}",
        struck.len(),
        began.elapsed()
    );
}

/// How slow a disk is: ten times what a worn-out hard disk takes.
const SLOW: Duration = Duration::from_millis(150);

/// The laws, over keys of that prefix, once a change can be made at all.
fn laws(storm: &Storm, prefix: &str) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let config = EtcdConfig {
            endpoints: Endpoint::list(&storm.url()).expect("members"),
            prefix: format!("/{prefix}/"),
            ca: None,
            identity: None,
            user: None,
        };
        let shared = Shared::Etcd(Etcd::open(config).expect("open"));
        // What breaks off while members elect or are looked for says nothing of the laws.
        let deadline = Instant::now() + PATIENCE;
        let probe = || shared.commit(vec![laws::put("probe", laws::ANYTHING, "1")], None);
        let mut good = 0;
        while good < 3 {
            good = if probe().await.is_ok() { good + 1 } else { 0 };
            assert!(Instant::now() < deadline, "{prefix}: no change can be made");
        }
        laws::suite(&shared).await;
        laws::leases_end_by_themselves(&shared, Duration::from_secs(2)).await;
    });
}

/// Does something again and again, until it is dropped.
struct Meanwhile<'a>(&'a AtomicBool);

impl Drop for Meanwhile<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
#[ignore = "takes minutes, and root: make etcd"]
fn the_laws_hold_with_members_parted_slow_and_compacted() {
    let server = needs_etcd!();
    if !rustix::process::geteuid().is_root() {
        return skip("needs root, for network namespaces");
    }
    let Some(storm) = Storm::start(&server) else {
        return skip("network namespaces or bridges can't be made here");
    };
    let told = |weather: &str, began: Instant| eprintln!("{weather}: {:?}", began.elapsed());
    for member in 0..3 {
        let began = Instant::now();
        storm.part_from_peers(member, true);
        laws(&storm, &format!("peers-{member}"));
        storm.part_from_peers(member, false);
        told("a member parted from its peers", began);
        let began = Instant::now();
        storm.part_from_all(member, true);
        laws(&storm, &format!("all-{member}"));
        storm.part_from_all(member, false);
        told("a member parted from all", began);
    }
    let began = Instant::now();
    let (over, mut compactions) = (AtomicBool::new(false), 0);
    std::thread::scope(|scope| {
        let compacting = scope.spawn(|| {
            let mut many = 0;
            while !over.load(Ordering::Relaxed) {
                many += usize::from(storm.compact());
                std::thread::sleep(Duration::from_millis(50));
            }
            many
        });
        {
            let _over = Meanwhile(&over);
            laws(&storm, "compacted");
        }
        compactions = compacting.join().expect("it compacts");
    });
    assert!(compactions > 3, "{compactions}");
    told(&format!("compacted {compactions} times meanwhile"), began);
    let slow = |members: &[usize], weather: &str| {
        let began = Instant::now();
        let disks: Vec<_> = members
            .iter()
            .map(|&member| storm.slow_disk(member, SLOW))
            .collect();
        if disks.iter().any(Option::is_none) {
            return skip("no strace, by which disks are slow, or it may not");
        }
        laws(&storm, weather);
        // Slow they were: a change takes two of three disks.
        if members.len() == 3 {
            assert!(began.elapsed() > 20 * SLOW, "{:?}", began.elapsed());
        }
        told(weather, began);
    };
    slow(&[0], "one-slow-disk");
    slow(&[0, 1, 2], "slow-disks");
}

//! Three daemons, one etcd: rollouts over a fleet whose driver dies, and hosts that hear nothing.

mod daemon;
mod etcd;

use daemon::{Daemon, until};
use etcd::{Cluster, needs_etcd};
use serde_json::Value;

/// Daemons `h0`, `h1` and `h2`, each in a fault domain of its own, with releases `good` and `next`, and
/// guests `web-H-0`, `web-H-1` in a set of three update domains.
fn fleet(cluster: &Cluster) -> Vec<Daemon> {
    let url = cluster.url();
    let start = |number: usize| {
        let (name, rack) = (format!("h{number}"), format!("rack-{number}"));
        let args = [
            "--store",
            &url,
            "--host-name",
            &name,
            "--fault-domain",
            &rack,
        ];
        let daemon = Daemon::start_with(&args);
        daemon.add("good", None);
        daemon.add("next", None);
        daemon
    };
    let daemons: Vec<Daemon> = (0..3).map(start).collect();
    // In turn, so that each update domain has members on two hosts.
    for guest in 0..2 {
        for (host, daemon) in daemons.iter().enumerate() {
            let set = ["--set", "web", "--update-domains", "3"];
            daemon
                .run_with(&format!("web-{host}-{guest}"), "good", &set)
                .good();
        }
    }
    daemons
}

const QUICK: [&str; 16] = [
    "--bake",
    "0s",
    "--well-for",
    "50ms",
    "--deadline",
    "60s",
    "--retry-after",
    "50ms",
    "--notice",
    "0s",
    "--at-once",
    "2",
    "--set-budget",
    "40%",
    "--canary",
    "1",
];

fn start(daemon: &Daemon, to: &str) -> String {
    let mut args = vec!["rollout", "start", "--detach", "--to", to];
    args.extend(QUICK);
    let view = daemon.ask(&args).good();
    view["rollout"]["id"].as_str().expect("an id").to_owned()
}

fn hosts(daemon: &Daemon) -> Vec<Value> {
    let hosts = daemon.ask(&["host", "ls"]).good();
    hosts.as_array().cloned().unwrap_or_default()
}

fn driver(daemon: &Daemon) -> Option<usize> {
    hosts(daemon).iter().position(|host| host["drives"] == true)
}

fn is_over(daemon: &Daemon, id: &str, state: &str) -> bool {
    let said = daemon.ask(&["rollout", "show", id]);
    said.ok && said.out["rollout"]["state"] == state
}

/// How often each guest moved, by all hosts' own records.
fn moves(daemons: &[Daemon]) -> Vec<(String, usize)> {
    let mut moves = std::collections::BTreeMap::new();
    for daemon in daemons {
        let swaps = daemon.ask(&["report"]).good();
        for swap in swaps.as_array().expect("swaps") {
            let vm = swap["vm"].as_str().unwrap_or_default().to_owned();
            let moved = usize::from(swap["state"] == "moved");
            *moves.entry(vm).or_default() += moved;
        }
    }
    moves.into_iter().collect()
}

#[test]
fn a_driver_that_dies_is_followed_by_another_and_no_step_is_done_twice() {
    let server = needs_etcd!();
    let seed = std::env::var("STILLPOINT_SEED").ok();
    let seed = seed.map_or(3, |seed| seed.parse().expect("a number"));
    let mut random = fastrand::Rng::with_seed(seed);
    let cluster = Cluster::start(&server, 1);
    let mut daemons = fleet(&cluster);
    until("all hosts are heard", || {
        let hosts = hosts(&daemons[0]);
        hosts.len() == 3 && hosts.iter().all(|host| host["alive"] == true)
    });
    let id = start(&daemons[0], "next");
    let mut drivers = Vec::new();
    for _ in 0..2 {
        std::thread::sleep(std::time::Duration::from_millis(random.u64(50..1500)));
        let mut dead = None;
        until("somebody drives", || {
            dead = driver(&daemons[0]);
            dead.is_some()
        });
        let dead = dead.expect("a driver");
        drivers.push(dead);
        daemons[dead].kill();
        let other = (dead + 1) % 3;
        until("another drives", || {
            driver(&daemons[other]).is_some_and(|now| now != dead)
        });
        daemons[dead].spawn();
    }
    until("the rollout is finished", || {
        is_over(&daemons[0], &id, "finished")
    });
    let each = (0..3).flat_map(|host| (0..2).map(move |guest| (format!("web-{host}-{guest}"), 1)));
    let each: Vec<(String, usize)> = each.collect();
    assert_eq!(moves(&daemons), each, "seed {seed}, drivers {drivers:?}");
    let history = daemons[1].ask(&["rollout", "history", &id]).good();
    let history = history.to_string();
    for dead in drivers {
        assert!(daemons[dead].log().contains("drives the fleet"), "h{dead}");
    }
    assert!(history.contains("is done"), "{history}");
}

#[test]
fn a_bad_release_stops_at_its_canary_and_a_fleet_without_its_store_harms_no_guest() {
    let server = needs_etcd!();
    let mut cluster = Cluster::start(&server, 1);
    let daemons = fleet(&cluster);
    for daemon in &daemons {
        daemon.add("bad", Some("crash-on-offer"));
    }
    // The store goes while a rollout is on: it stands still, and guests can be started and swapped by hand.
    let id = start(&daemons[0], "bad");
    cluster.kill(0);
    let (code, message) = daemons[0].ask(&["rollout", "ls"]).bad();
    assert_eq!(code, "store_failed", "{message}");
    assert!(message.contains("guests run on"), "{message}");
    daemons[1].run("alone", "good").good();
    assert_eq!(daemons[1].swap("alone", "next")["state"], "moved");
    cluster.restart(0);

    until("the rollout rolled itself back", || {
        is_over(&daemons[2], &id, "rolled_back")
    });
    let tried: Vec<_> = moves(&daemons)
        .into_iter()
        .filter(|(vm, _)| vm != "alone")
        .collect();
    assert_eq!(tried.len(), 1, "the canary alone was touched: {tried:?}");
    assert_eq!(tried[0].1, 0, "and it stayed where it was: {tried:?}");
}

/// A driver that only stood still believes that it drives: what it writes is refused by its guard.
#[test]
fn a_driver_that_comes_back_to_life_does_no_step_twice() {
    use rustix::process::{Pid, Signal, kill_process};
    let server = needs_etcd!();
    let cluster = Cluster::start(&server, 1);
    let daemons = fleet(&cluster);
    let id = start(&daemons[0], "next");
    let mut dead = None;
    until("somebody drives", || {
        dead = driver(&daemons[0]);
        dead.is_some()
    });
    let dead = dead.expect("a driver");
    let pid = i32::try_from(daemons[dead].pid()).expect("a pid");
    let pid = Pid::from_raw(pid).expect("a pid");
    kill_process(pid, Signal::STOP).expect("SIGSTOP");
    let other = (dead + 1) % 3;
    until("another drives", || {
        driver(&daemons[other]).is_some_and(|now| now != dead)
    });
    kill_process(pid, Signal::CONT).expect("SIGCONT");
    until("the rollout is finished", || {
        is_over(&daemons[other], &id, "finished")
    });
    assert!(moves(&daemons).iter().all(|(_, moves)| *moves == 1));
    assert_eq!(moves(&daemons).len(), 6);
}

#[test]
fn a_daemon_that_ends_in_order_hands_over_and_a_host_that_is_no_more_is_forgotten() {
    let server = needs_etcd!();
    let cluster = Cluster::start(&server, 1);
    let url = cluster.url();
    let named = |name| Daemon::start_with(&["--store", &url, "--host-name", name]);
    let mut first = named("h0");
    until("it drives", || driver(&first).is_some());
    let second = named("h1");
    second.add("good", None);
    second.run_with("web", "good", &["--set", "web"]).good();
    let (code, message) = second.ask(&["host", "forget", "h0"]).bad();
    assert_eq!(code, "still_running", "{message}");
    assert!(first.terminate().success());
    // Its leases would have lasted for seconds.
    let hosts_now = hosts(&second);
    assert_eq!(hosts_now[0]["alive"], false, "{hosts_now:?}");
    until("the other drives", || driver(&second) == Some(1));
    second.ask(&["host", "forget", "h0"]).good();
    assert_eq!(hosts(&second).len(), 1);
    let (code, _) = second.ask(&["host", "forget", "h0"]).bad();
    assert_eq!(code, "not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_of_a_driver_that_was_replaced_and_records_of_nobody_do_nothing() {
    use orchestrator::fleet::{DRIVER, HOSTS, ORDERS, ROLLOUTS, VMS};
    use orchestrator::store::shared::etcd::{Endpoint, Etcd, EtcdConfig, PREFIX};
    use orchestrator::store::shared::{Change, Expect, Shared};

    let server = needs_etcd!();
    let cluster = Cluster::start(&server, 1);
    let config = EtcdConfig {
        endpoints: Endpoint::list(&cluster.url()).expect("members"),
        prefix: PREFIX.into(),
        ca: None,
        identity: None,
        user: None,
    };
    let shared = Shared::Etcd(Etcd::open(config).expect("open"));
    let put = async |key: &str, value: String| {
        let change = Change::put(key, Expect::Anything, value.into_bytes());
        shared.commit(vec![change], None).await.expect("commit");
    };
    put(&format!("{ROLLOUTS}of-nobody"), "{\"id\":".into()).await;
    put(&format!("{HOSTS}of nobody"), "?".into()).await;
    put(&format!("{VMS}h9/of-nobody"), "[]".into()).await;

    let url = cluster.url();
    let daemon = Daemon::start_with(&["--store", &url, "--host-name", "h0"]);
    daemon.add("good", None);
    daemon.add("next", None);
    daemon.run("web", "good").good();
    until("what can't be read is named", || {
        let log = daemon.log();
        log.contains("rollouts/of-nobody") && log.contains("hosts/of nobody")
    });
    let id = start(&daemon, "next");
    until("it is finished all the same", || {
        is_over(&daemon, &id, "finished")
    });

    let swaps = || {
        daemon
            .ask(&["report"])
            .good()
            .as_array()
            .map_or(0, Vec::len)
    };
    assert_eq!(swaps(), 1);
    let driver = shared.get(DRIVER).await.expect("get").expect("a driver");
    let order = |id: &str, epoch: u64| {
        serde_json::json!({
            "id": id, "rollout": "of-nobody", "epoch": epoch, "to": "good", "way": "back",
            "way_back": false, "allow_downgrade": true, "no_notice": "a test",
        })
        .to_string()
    };
    put(
        &format!("{ORDERS}h0/web"),
        order("late-order", driver.created - 1),
    )
    .await;
    until("it is refused", || {
        daemon
            .log()
            .contains("that was replaced is not carried out")
    });
    assert_eq!(swaps(), 1, "nothing was done for it");
    put(
        &format!("{ORDERS}h0/web"),
        order("good-order", driver.created),
    )
    .await;
    until("the same of the driver is done", || swaps() == 2);
    daemon.until_state("web", "running");
    until("it is back", || daemon.show("web")["release"] == "good");
}

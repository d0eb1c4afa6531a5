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
    // Nobody's start waits for the store: a rollout that is begun earlier is one of those that are known by then.
    until("all guests are known", || {
        let guests = hosts(&daemons[0]);
        let guests = guests.iter().filter_map(|host| host["guests"].as_u64());
        guests.sum::<u64>() == 6
    });
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

fn json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("JSON")
}

/// The store, as another daemon has it.
fn shared(cluster: &Cluster) -> orchestrator::store::shared::Shared {
    use orchestrator::store::shared::Shared;
    use orchestrator::store::shared::etcd::{Endpoint, Etcd, EtcdConfig, PREFIX};
    let config = EtcdConfig {
        endpoints: Endpoint::list(&cluster.url()).expect("members"),
        prefix: PREFIX.into(),
        ca: None,
        identity: None,
        user: None,
    };
    Shared::Etcd(Etcd::open(config).expect("open"))
}

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

/// The second of two that call their hosts alike looks after its guests, and touches nothing of the fleet.
#[test]
fn two_daemons_of_one_name_are_told_apart_and_the_later_one_is_refused() {
    let server = needs_etcd!();
    let cluster = Cluster::start(&server, 1);
    let url = cluster.url();
    let named = |name| Daemon::start_with(&["--store", &url, "--host-name", name]);
    let mut first = named("h0");
    first.add("good", None);
    first.add("next", None);
    first.run_with("web", "good", &["--set", "web"]).good();
    until("it is heard", || {
        hosts(&first).iter().any(|host| host["alive"] == true)
    });
    let second = named("h0");
    second.add("good", None);
    until("it is refused", || {
        second.log().contains("another daemon has the name `h0`")
    });
    for args in [
        &["host", "ls"][..],
        &["rollout", "ls"],
        &["rollout", "start", "--detach", "--to", "good"],
        &["explain", "web"],
        &["host", "cordon", "h0", "--reason", "x"],
    ] {
        let args: Vec<&str> = match args {
            ["explain", vm] => vec!["rollout", "explain", vm],
            args => args.to_vec(),
        };
        let (code, message) = second.ask(&args).bad();
        assert_eq!(code, "name_taken", "{args:?}: {message}");
        assert!(
            message.contains("--host-name") && message.contains("state directory"),
            "{message}"
        );
    }
    // Its own guests are its own; a seat in the fleet it has none to give.
    second.run("own", "good").good();
    let (code, _) = second.run_with("seated", "good", &["--set", "web"]).bad();
    assert_eq!(code, "name_taken");
    let seen = hosts(&first);
    assert_eq!((seen.len(), &seen[0]["guests"]), (1, &1.into()), "{seen:?}");
    let id = start(&first, "next");
    until("the first one's rollout is finished", || {
        is_over(&first, &id, "finished")
    });
    assert_eq!(second.show("own")["release"], "good");

    // Once the name is free it is theirs, and the first one's is what is refused.
    assert!(first.terminate().success());
    until("the second has the name", || second.ask(&["host", "ls"]).ok);
    first.spawn();
    until("the first is refused", || {
        first.log().contains("another daemon has the name `h0`")
    });
    assert_eq!(
        first.show("web")["release"],
        "next",
        "and looks after its guests"
    );
}

/// A host whose clock is an hour off is named, and left alone; those whose clocks agree go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_whose_clock_disagrees_is_named_and_left_alone() {
    use orchestrator::fleet::record::{Alive, HostCard, VmCard};
    use orchestrator::fleet::{ALIVE, HOSTS, VMS};
    use orchestrator::model::{Moment, VmState};
    use orchestrator::plan::rollout::seen::Health;
    use orchestrator::store::shared::{Change, Expect};

    let server = needs_etcd!();
    let cluster = Cluster::start(&server, 1);
    let shared = shared(&cluster);
    let put = async |key: &str, value: Vec<u8>| {
        let change = Change::put(key, Expect::Anything, value);
        shared.commit(vec![change], None).await.expect("commit");
    };
    let now = || {
        u64::try_from(
            std::time::SystemTime::UNIX_EPOCH
                .elapsed()
                .expect("after 1970")
                .as_nanos(),
        )
    };
    let alive = |ahead_s: i64| Alive {
        since: Moment(1),
        clock: now()
            .ok()
            .and_then(|now| now.checked_add_signed(ahead_s * 1_000_000_000))
            .map(Moment),
    };
    let card = HostCard {
        zone: "zone-0".into(),
        fault_domain: "rack-9".into(),
        labels: Default::default(),
        releases: vec!["good".into(), "next".into()],
        daemon: "0".into(),
        kvm: Default::default(),
        kernel: Default::default(),
    };
    put(&format!("{HOSTS}h9"), json(&card)).await;
    let guest = VmCard {
        set: None,
        domain: 0,
        state: VmState::Running,
        release: "good".into(),
        health: Health::Well,
        ailment: None,
        since: Moment(1),
        swap: None,
        busy: false,
    };
    put(&format!("{VMS}h9/far"), json(&guest)).await;
    put(&format!("{ALIVE}h9"), json(&alive(3600))).await;

    let url = cluster.url();
    let daemon = Daemon::start_with(&["--store", &url, "--host-name", "h0"]);
    daemon.add("good", None);
    daemon.add("next", None);
    daemon.run("near", "good").good();
    let skew = || {
        hosts(&daemon)
            .iter()
            .find(|host| host["name"] == "h9")
            .expect("h9")["clock"]
            .clone()
    };
    until("it is named", || {
        skew()["ahead_s"]
            .as_u64()
            .is_some_and(|s| (3590..=3600).contains(&s))
    });
    assert!(
        daemon.log().contains("its clock is at least"),
        "{}",
        daemon.log()
    );
    assert!(
        hosts(&daemon)
            .iter()
            .all(|host| host["name"] == "h9" || host["clock"].is_null())
    );

    let mut args = vec!["rollout", "start", "--detach", "--to", "next"];
    args.extend(QUICK);
    let view = daemon.ask(&args).good();
    let id = view["rollout"]["id"].as_str().expect("an id").to_owned();
    until("the other is done", || {
        daemon.show("near")["release"] == "next"
    });
    let explained = || daemon.ask(&["rollout", "explain", "far"]).good()["why"].to_string();
    until("it says why the other isn't", || {
        explained().contains("the clock of host h9 doesn't agree with the driver's")
    });
    let orders = shared
        .list(orchestrator::fleet::ORDERS)
        .await
        .expect("orders")
        .entries;
    assert!(
        orders.iter().all(|order| !order.key.contains("h9")),
        "{orders:?}"
    );

    // Behind is found by what is written anew; right again is right.
    put(&format!("{ALIVE}h9"), json(&alive(-3600))).await;
    until("it is named", || {
        skew()["behind_s"]
            .as_u64()
            .is_some_and(|s| (3500..=3600).contains(&s))
    });
    assert!(!is_over(&daemon, &id, "finished"));
    put(&format!("{ALIVE}h9"), json(&alive(0))).await;
    until("it is right again", || skew().is_null());
    until("it is ordered", || explained().contains("is being swapped"));
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_of_a_driver_that_was_replaced_and_records_of_nobody_do_nothing() {
    use orchestrator::fleet::{DRIVER, HOSTS, ORDERS, ROLLOUTS, VMS};
    use orchestrator::store::shared::{Change, Expect};

    let server = needs_etcd!();
    let cluster = Cluster::start(&server, 1);
    let shared = shared(&cluster);
    let put = async |key: &str, value: String| {
        let change = Change::put(key, Expect::Anything, value.into_bytes());
        shared.commit(vec![change], None).await.expect("commit");
    };
    put(&format!("{ROLLOUTS}of-nobody"), "{\"id\":".into()).await;
    put(&format!("{HOSTS}of nobody"), "?".into()).await;
    put(&format!("{VMS}h9/of-nobody"), "[]".into()).await;
    put(&format!("{ORDERS}h0/web"), "{\"id\": 7}".into()).await;

    let url = cluster.url();
    let daemon = Daemon::start_with(&["--store", &url, "--host-name", "h0"]);
    daemon.add("good", None);
    daemon.add("next", None);
    daemon.run("web", "good").good();
    until("what can't be read is named", || {
        let log = daemon.log();
        let orders = log.contains("an order is not carried out") && log.contains("orders/h0/web");
        log.contains("rollouts/of-nobody") && log.contains("hosts/of nobody") && orders
    });
    let (code, message) = daemon.ask(&["rollout", "show", "of-nobody"]).bad();
    assert_eq!(code, "store_failed");
    assert!(
        message.contains("can't be read") && message.contains("Remove it"),
        "{message}"
    );
    assert_eq!(daemon.show("web")["release"], "good");
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

//! The fleet of the demo: three daemons with directories of their own, and their guests.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::guest::Pulse;
use stillpoint_tests::releases::{self, Release};

/// Hosts.
const HOSTS: usize = 3;
/// Availability sets, with a member on each host and one more.
const SETS: [&str; 3] = ["web", "db", "cache"];
/// Members of each.
const MEMBERS: usize = 4;
/// All guests.
pub(crate) const GUESTS: usize = SETS.len() * MEMBERS;

/// The fleet.
pub(crate) struct Fleet {
    /// Its daemons, by number.
    pub(crate) daemons: Vec<Daemon>,
    pulses: Vec<(String, Pulse)>,
    /// How many steps of a rollout's history were told.
    told: RefCell<HashMap<String, usize>>,
}

/// A `stillpoint rollout` that is quick enough to be watched.
pub(crate) fn line<'a>(verb: &'a str, to: &'a str) -> Vec<&'a str> {
    let terms = [
        "--canary",
        "1",
        "--bake",
        "2s",
        "--well-for",
        "1s",
        "--at-once",
        "3",
        "--set-budget",
        "50%",
        "--notice",
        "0s",
        "--deadline",
        "3min",
    ];
    [&["rollout", verb, "--to", to][..], &terms].concat()
}

impl Fleet {
    /// Starts daemons and guests.
    pub(crate) fn start(dir: &Path, store: &str) -> anyhow::Result<Self> {
        let mut daemons = Vec::new();
        for number in 0..HOSTS {
            let name = format!("h{number}");
            let dir = dir.join(&name);
            std::fs::create_dir(&dir)?;
            let rack = format!("rack-{number}");
            let args = [
                "--store",
                store,
                "--host-name",
                &name,
                "--fault-domain",
                &rack,
                "--web",
                "127.0.0.1:0",
            ];
            let daemon = Daemon::start_with(&dir, &args)?;
            println!("{name} shows the fleet at {}", page_of(&daemon)?);
            add_releases(&daemon)?;
            daemons.push(daemon);
        }
        let kernel = releases::pulse()?.display().to_string();
        let mut pulses = Vec::new();
        for member in 0..MEMBERS {
            for (number, set) in SETS.iter().enumerate() {
                let host = (member + number) % HOSTS;
                let name = format!("{set}-{member}");
                let args = [
                    "run",
                    &name,
                    "--release",
                    "0.2.0",
                    "--kernel",
                    &kernel,
                    "--memory",
                    "64M",
                    "--cmdline",
                    "ram=4M duty=2",
                    "--budget",
                    "20s",
                    "--watch",
                    "6s",
                    "--set",
                    set,
                    "--update-domains",
                    "2",
                ];
                daemons[host].must(&args)?;
                pulses.push((name.clone(), daemons[host].pulse(&name)?));
            }
        }
        Ok(Self {
            daemons,
            pulses,
            told: RefCell::default(),
        })
    }

    /// The number of the host whose daemon drives, as another one sees it.
    pub(crate) fn driver(&self, asked: usize) -> anyhow::Result<Option<usize>> {
        let hosts = self.daemons[asked].get("/v1/hosts");
        let hosts = hosts.as_array().cloned().unwrap_or_default();
        let name = |host: &Value| host["name"].as_str().map(str::to_owned);
        let driver = hosts.iter().find(|host| host["drives"] == true);
        let Some(name) = driver.and_then(name) else {
            return Ok(None);
        };
        let number = name.trim_start_matches('h').parse();
        Ok(Some(number.context("a host of this fleet")?))
    }

    /// How often each guest was moved, by all hosts' own records.
    pub(crate) fn moves(&self) -> anyhow::Result<BTreeMap<String, usize>> {
        let mut moves = BTreeMap::new();
        for daemon in &self.daemons {
            let swaps = daemon.must(&["report"])?;
            for swap in swaps.as_array().context("swaps")? {
                let vm = swap["vm"].as_str().context("a VM")?;
                *moves.entry(vm.to_owned()).or_default() += usize::from(swap["state"] == "moved");
            }
        }
        Ok(moves)
    }

    /// Whether every guest goes on, and saw nothing that it must not see.
    pub(crate) fn are_well(&self) -> anyhow::Result<()> {
        for (name, pulse) in &self.pulses {
            let seen = pulse.wait(
                "a guest that goes on",
                stillpoint_tests::patience::PATIENCE,
                |seen| !seen.vcpus.is_empty(),
            )?;
            ensure!(seen.faults().is_empty(), "{name}: {:#?}", seen.faults());
        }
        Ok(())
    }

    /// Prints what was done since the last time.
    pub(crate) fn tell(&self, id: &str, history: &Value) {
        let mut told = self.told.borrow_mut();
        let told = told.entry(id.to_owned()).or_default();
        let steps = history.as_array().map_or(&[][..], Vec::as_slice);
        for step in steps.iter().skip(*told) {
            let lines = step["lines"].as_array().map_or(&[][..], Vec::as_slice);
            for line in lines {
                let by = step["by"].as_str().unwrap_or_default();
                println!("  {by:<18} {}", line.as_str().unwrap_or_default());
            }
        }
        *told = steps.len().max(*told);
    }

    /// Ends all guests in order.
    pub(crate) fn end(self) -> anyhow::Result<()> {
        for daemon in &self.daemons {
            let vms = daemon.must(&["ls"])?;
            for vm in vms.as_array().context("VMs")? {
                let name = vm["name"].as_str().context("a name")?;
                daemon.must(&["stop", name, "--now"])?;
            }
        }
        Ok(())
    }
}

/// Where a daemon shows the fleet, with the key that lets in.
fn page_of(daemon: &Daemon) -> anyhow::Result<String> {
    let said = daemon.must(&["page"])?;
    let url = said["url"].as_str().context("an address")?;
    Ok(url.replace("/?key=", "/fleet?key="))
}

fn add_releases(daemon: &Daemon) -> anyhow::Result<()> {
    let good = Release::Current.binary()?.display().to_string();
    for version in ["0.2.0", "0.2.1"] {
        daemon.must(&["release", "add", "--unsigned", &good, "--as", version])?;
    }
    let bad = Release::Faulty("").binary()?.display().to_string();
    let args = ["release", "add", "--unsigned", &bad, "--as", "0.2.2-bad"];
    let fault = ["--arg=--fault", "--arg=spoil=vcpu"];
    daemon.must(&[&args[..], &fault].concat()).map(drop)
}

//! All that a guest does at once while it is swapped: a disk, connections of each kind, every CPU.

use std::path::Path;

use anyhow::ensure;
use serde_json::Value;

use super::Linux;
use super::workload::{InGuest, OnHost};
use crate::daemon::Daemon;
use crate::patience::{PATIENCE, wait_for};

/// What a guest does while it is swapped, all without a pause: a disk, a connection of each kind, a
/// stream each way, every CPU.
#[derive(Debug)]
pub struct Loads {
    in_guest: Vec<InGuest>,
    /// The host's caller of the guest, whose report counts; then servers, the last of which sends.
    on_host: Vec<OnHost>,
}

impl Loads {
    /// Starts them; `address` is the host's in the guest's network, `dir` where their output goes.
    pub fn start(
        guest: &Linux<'_>,
        daemon: &Daemon,
        address: &str,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        let out = |name: &str| dir.join(format!("{name}.out"));
        let guest_load = |name, args: &[&str]| InGuest::start(guest, name, args, &out(name));
        let long = ["--seconds", "3600"];
        let socket = guest.vsock().display().to_string();
        let door = format!("{socket}_7004");
        let unix = ["echo-serve", "--unix", &door];
        let (unix, _) = OnHost::listen(daemon, &unix, &out("unix"))?;
        let tcp = ["echo-serve", "--addr", &format!("{address}:0")];
        let (tcp, echoes) = OnHost::listen(daemon, &tcp, &out("tcp"))?;
        let disk = ["disk", "--device", "/dev/vda", "--duration", "3600"];
        let streams = ["tcp", "serve", "--addr", &format!("{address}:0")];
        let (streams, at) = OnHost::listen(daemon, &streams, &out("streams"))?;
        let send = ["tcp", "send", "--addr", &at, "--seconds", "3600"];
        let mut in_guest = vec![
            guest_load("disk", &[&disk[..], &["--threads", "4"]].concat())?,
            guest_load(
                "echoes",
                &[&["echo", "--vsock", "2:7004"], &long[..]].concat(),
            )?,
            guest_load("asks", &[&["echo", "--addr", &echoes], &long[..]].concat())?,
            guest_load("serves", &["echo-serve", "--vsock-port", "7003"])?,
        ];
        let served = out("serves");
        wait_for("the guest to listen", PATIENCE, || {
            let printed = std::fs::read_to_string(&served)?;
            Ok(printed.contains("listening").then_some(()))
        })?;
        let call = ["echo", "--unix", &socket, "--connect-line", "CONNECT 7003"];
        let calls = OnHost::start(daemon, &[&call[..], &long[..]].concat(), &out("calls"))?;
        in_guest.push(guest_load("sends", &send)?);
        in_guest.push(guest_load(
            "receives",
            &[&send[..], &["--reverse"]].concat(),
        )?);
        in_guest.push(guest_load("cpu", &["cpu", "--seconds", "3600"])?);
        let on_host = vec![calls, unix, tcp, streams];
        Ok(Self { in_guest, on_host })
    }

    /// None has come to an end that nobody asked for.
    pub fn go_on(&self) -> anyhow::Result<()> {
        let ended: Vec<_> = self
            .in_guest
            .iter()
            .filter(|load| load.has_ended())
            .collect();
        ensure!(ended.is_empty(), "ended too early: {ended:?}");
        Ok(())
    }

    /// Has them come to their ends; each report must be good.
    pub fn finish(self, guest: &Linux<'_>) -> anyhow::Result<Vec<Value>> {
        let Self {
            in_guest,
            mut on_host,
        } = self;
        // Before their peers in the guest: of a stream its sender ends, which is the host's server
        // for one of them; other servers have no end of their own, and what they saw is in their
        // clients' reports.
        for load in on_host.iter().take(1).chain(on_host.get(3)) {
            load.wind_up()?;
        }
        let mut reports = vec![on_host.remove(0).finish()?];
        for load in in_guest.iter().filter(|load| load.name() != "receives") {
            load.wind_up(guest)?;
        }
        let judged = in_guest.into_iter().filter(|load| load.name() != "serves");
        for load in judged {
            reports.push(load.finish()?);
        }
        Ok(reports)
    }
}

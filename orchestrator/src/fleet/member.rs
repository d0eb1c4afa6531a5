//! That this host's daemon is heard, and what operators want of hosts.

use std::time::Duration;

use super::look::Versioned;
use super::record::{Alive, Cordon, DriverCard, RolloutRecord};
use super::{ALIVE, ANSWERS, CORDONS, DRIVER, Fleet, HOSTS, ORDERS, VMS, keys, written};
use crate::execute::unix_ns;
use crate::model::{Code, HostName, Moment, Problem};
use crate::store::shared::{Change, Committed, Expect, Keep, Lease, SharedError};

/// How long a host that says nothing more still counts as heard.
pub const LEASE: Duration = Duration::from_secs(10);

/// A host's seat among those that are heard.
#[derive(Debug)]
pub(super) struct Heard {
    lease: Option<Lease>,
    since: Moment,
    kept: tokio::time::Instant,
}

impl Heard {
    pub(super) fn new() -> Self {
        Self {
            lease: None,
            since: Moment(unix_ns()),
            kept: tokio::time::Instant::now(),
        }
    }

    /// Says that this host is here, as often as is needed.
    pub(super) async fn say(&mut self, fleet: &Fleet) -> Result<(), SharedError> {
        if let Some(lease) = self.lease {
            if self.kept.elapsed() < LEASE / 4 {
                return Ok(());
            }
            if fleet.shared.keep(lease).await? {
                self.kept = tokio::time::Instant::now();
                return Ok(());
            }
            // It was over for a while, and this host not heard.
            self.lease = None;
            self.since = Moment(unix_ns());
        }
        let lease = fleet.shared.lease(LEASE).await?;
        let alive = Alive { since: self.since };
        let change = Change::keep(
            keys::of_host(ALIVE, &fleet.me),
            Expect::Anything,
            written(&alive),
            Keep::With(lease),
        );
        if let Committed::Done(_) = fleet.shared.commit(vec![change], None).await? {
            self.lease = Some(lease);
            self.kept = tokio::time::Instant::now();
        }
        Ok(())
    }
}

impl Fleet {
    /// Has a host left alone, for that reason, or not any more.
    pub async fn cordon(&self, host: &str, reason: Option<String>) -> Result<(), Problem> {
        let unknown = || {
            let message = format!("no host `{host}`; `stillpoint host ls` shows those there are");
            Problem::new(Code::NotFound, message)
        };
        let name = HostName::try_from(host.to_owned()).map_err(|_| unknown())?;
        let card = self.shared.get(&keys::of_host(HOSTS, &name)).await?;
        card.ok_or_else(unknown)?;
        let key = keys::of_host(CORDONS, &name);
        let change = match reason {
            Some(reason) => {
                let since = Moment(unix_ns());
                Change::put(key, Expect::Anything, written(&Cordon { reason, since }))
            }
            None => Change::remove(key, Expect::Anything),
        };
        self.shared.commit(vec![change], None).await?;
        Ok(())
    }

    /// Forgets a host that is no more, with its guests and their seats. One that is heard is not forgotten, nor
    /// one of which a rollout still has guests.
    pub async fn forget(&self, host: &str) -> Result<(), Problem> {
        let look = self.look().await?;
        let found = look.hosts.keys().find(|name| name.as_str() == host);
        let Some(name) = found else {
            let message = format!("no host `{host}`; `stillpoint host ls` shows those there are");
            return Err(Problem::new(Code::NotFound, message));
        };
        if look.is_alive(name) {
            let message =
                format!("host {name} is heard: it would be back at once; end its daemon first");
            return Err(Problem::new(Code::StillRunning, message));
        }
        let has = |rollout: &&Versioned<RolloutRecord>| {
            let mut units = rollout.record.units.iter();
            units.any(|unit| unit.host == *name)
        };
        if let Some(Versioned { record, .. }) = look.open().find(has) {
            let message = format!(
                "rollout {} still has guests of host {name}; end it first: `stillpoint rollout abort {}`",
                record.id, record.id
            );
            return Err(Problem::new(Code::RolloutInProgress, message));
        }
        for (set, record) in self.sets().await? {
            let of_host = format!("{name}/");
            for member in record.members.keys().filter(|m| m.starts_with(&of_host)) {
                self.vacate(&set, member).await?;
            }
        }
        for (host, vm) in look.vms.keys().filter(|(host, _)| host == name) {
            let gone = [VMS, ORDERS, ANSWERS].map(|area| keys::of_vm(area, host, vm));
            let gone = gone.map(|key| Change::remove(key, Expect::Anything));
            self.shared.commit(gone.to_vec(), None).await?;
        }
        let gone = [CORDONS, HOSTS].map(|area| keys::of_host(area, name));
        let gone = gone.map(|key| Change::remove(key, Expect::Anything));
        self.shared.commit(gone.to_vec(), None).await?;
        Ok(())
    }

    /// Leaves in order: whoever is to drive next need not wait for a lease to end.
    pub async fn leave(&self) -> Result<(), SharedError> {
        let alive = keys::of_host(ALIVE, &self.me);
        let mut gone = vec![Change::remove(alive, Expect::Anything)];
        if let Some(entry) = self.shared.get(DRIVER).await? {
            let card: DriverCard = super::read(&entry)?;
            if card.host == self.me {
                gone.push(Change::remove(DRIVER, Expect::Version(entry.version)));
            }
        }
        self.shared.commit(gone, None).await?;
        Ok(())
    }

    /// Why this host is to be left alone, if it is.
    pub async fn cordoned(&self) -> Result<Option<Cordon>, SharedError> {
        let entry = self.shared.get(&keys::of_host(CORDONS, &self.me)).await?;
        entry.as_ref().map(super::read).transpose()
    }
}

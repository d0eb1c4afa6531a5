//! That this host's daemon is heard, and what operators want of hosts.

use std::time::Duration;

use super::clocks::TELL;
use super::look::Versioned;
use super::name::Holder;
use super::record::{Alive, Cordon, DriverCard, RolloutRecord};
use super::{ALIVE, ANSWERS, CLAIMS, CORDONS, DRIVER, Fleet, HOSTS, ORDERS, VMS, keys, written};
use crate::execute::unix_ns;
use crate::model::{Code, HostName, Moment, Problem};
use crate::store::shared::{Change, Committed, Expect, Keep, Lease, SharedError};

/// How long a host that says nothing more still counts as heard.
pub const LEASE: Duration = Duration::from_secs(10);

/// A host's seat among those that are heard.
#[derive(Debug)]
pub(super) struct Heard {
    holder: Holder,
    since: Moment,
    /// The lease that it hangs on, and when it was said last.
    told: Option<(Lease, tokio::time::Instant)>,
}

impl Heard {
    pub(super) fn new() -> Self {
        Self {
            holder: Holder::new(),
            since: Moment(unix_ns()),
            told: None,
        }
    }

    /// Keeps the name, or claims it; whether it is ours.
    pub(super) async fn claim(&mut self, fleet: &Fleet) -> Result<bool, SharedError> {
        let lease = self.holder.hold(fleet).await?;
        if self.told.is_some_and(|(told, _)| Some(told) != lease) {
            // It was over for a while, and this host not heard.
            self.told = None;
            self.since = Moment(unix_ns());
        }
        Ok(lease.is_some())
    }

    /// Says that this host is here, and what time it is, as often as is needed. After [`Self::claim`].
    pub(super) async fn say(&mut self, fleet: &Fleet) -> Result<(), SharedError> {
        let Some(lease) = self.holder.hold(fleet).await? else {
            return Ok(());
        };
        if self
            .told
            .is_some_and(|(told, at)| told == lease && at.elapsed() < TELL)
        {
            return Ok(());
        }
        let alive = Alive {
            since: self.since,
            clock: Some(Moment(unix_ns())),
        };
        let change = Change::keep(
            keys::of_host(ALIVE, &fleet.me),
            Expect::Anything,
            written(&alive),
            Keep::With(lease),
        );
        let guard = fleet.name_guard();
        if let Committed::Done(_) = fleet.shared.commit(vec![change], guard.as_ref()).await? {
            self.told = Some((lease, tokio::time::Instant::now()));
        }
        Ok(())
    }
}

impl Fleet {
    /// Has a host left alone, for that reason, or not any more.
    pub async fn cordon(&self, host: &str, reason: Option<String>) -> Result<(), Problem> {
        self.is_us()?;
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
        let whole = [ORDERS, ANSWERS].map(|area| keys::of_unit(area, name, None));
        let gone = [CORDONS, HOSTS].map(|area| keys::of_host(area, name));
        let gone = whole.into_iter().chain(gone);
        let gone = gone.map(|key| Change::remove(key, Expect::Anything));
        self.shared.commit(gone.collect(), None).await?;
        Ok(())
    }

    /// Leaves in order: whoever is to drive next need not wait for a lease to end.
    pub async fn leave(&self) -> Result<(), SharedError> {
        // What is said under a name that is another's is theirs to take back.
        let Some(guard) = self.name_guard() else {
            return Ok(());
        };
        let gone = [CLAIMS, ALIVE].map(|area| keys::of_host(area, &self.me));
        let mut gone = gone
            .map(|key| Change::remove(key, Expect::Anything))
            .to_vec();
        if let Some(entry) = self.shared.get(DRIVER).await? {
            let card: DriverCard = super::read(&entry)?;
            if card.host == self.me {
                gone.push(Change::remove(DRIVER, Expect::Version(entry.version)));
            }
        }
        self.shared.commit(gone, Some(&guard)).await?;
        Ok(())
    }

    /// Why this host is to be left alone, if it is.
    pub async fn cordoned(&self) -> Result<Option<Cordon>, SharedError> {
        if self.is_us().is_err() {
            // The other's host is cordoned, or not.
            return Ok(None);
        }
        let entry = self.shared.get(&keys::of_host(CORDONS, &self.me)).await?;
        entry.as_ref().map(super::read).transpose()
    }
}

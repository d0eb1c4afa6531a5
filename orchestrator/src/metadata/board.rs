//! The board that events hang on: which pauses are announced to whom, who listens, who approved.
//! Pure: no I/O, and what time it is, it is told.
//!
//! ```text
//!  announce ─▶ Scheduled ──approved by every group, or not_before──▶ Started ──end──▶ Over
//!                  └──────────────── cancel ────────────────▶ Cancelled
//! ```
//!
//! Every change of what a group sees raises its revision by one. What a VM reads as
//! `DocumentIncarnation` is that revision, counted from the moment it began to listen.
//!
//! Must never: start a pause before its time unless every group approved, show a group another's
//! event, or issue an id twice.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::model::{
    Approval, Approver, EventId, Group, Measured, Notice, Pause, PauseId, PauseState, SwapId,
    VmName,
};

const SECOND: u64 = 1_000_000_000;
/// A VM that asks nothing for so long no longer listens.
const LISTENS_NS: u64 = 24 * 3600 * SECOND;
/// When it asked last is written down no oftener than that.
const WRITE_NS: u64 = 60 * SECOND;
/// Pauses of a group that are kept after their end. Their ids may still be approved, to no effect.
const KEPT: usize = 64;

/// A VM that listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// Whom it listens as.
    pub group: Group,
    /// The group's revision just before it began to.
    pub base: u64,
    /// When it asked last, nanoseconds since the Unix epoch.
    pub asked_at_unix_ns: u64,
}

/// What is to be announced.
#[derive(Clone, Debug)]
pub struct Announcement {
    /// The pause's id.
    pub id: PauseId,
    /// The swap it is for.
    pub swap: SwapId,
    /// What it is for, in words for the guest.
    pub description: String,
    /// An event for each group and the VMs in it.
    pub notices: Vec<(EventId, Group, Vec<VmName>)>,
    /// How long before it starts, ns.
    pub notice_ns: u64,
    /// How long it is expected to be, ns.
    pub expected_ns: u64,
    /// Why nobody is given notice.
    pub no_notice: Option<String>,
}

/// What changed and is to be written down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Pauses, as they are now.
    pub pauses: Vec<Pause>,
    /// Pauses that are forgotten.
    pub forgotten: Vec<PauseId>,
    /// Groups with their revision.
    pub groups: Vec<(Group, u64)>,
    /// VMs that listen.
    pub listeners: Vec<(VmName, Listener)>,
    /// VMs that are no more.
    pub gone: Vec<VmName>,
}

/// Why an event was not approved or cancelled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// Never issued to this group, or long forgotten.
    #[error("there is no event {0}; `stillpoint events ls` shows those there are")]
    Unknown(String),
    /// Too late.
    #[error("event {0} is {1}; only one that is scheduled can be cancelled")]
    Late(EventId, PauseState),
}

/// Whether a pause may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It may, or has.
    Now,
    /// Not before that, seconds since the Unix epoch, unless it is approved.
    At(u64),
    /// Never: it was cancelled, or is over.
    Never,
}

/// The board.
#[derive(Clone, Debug, Default)]
pub struct Board {
    revisions: BTreeMap<Group, u64>,
    listeners: BTreeMap<VmName, Listener>,
    pauses: BTreeMap<PauseId, Pause>,
    touched: Touched,
}

#[derive(Clone, Debug, Default)]
struct Touched {
    pauses: BTreeSet<PauseId>,
    groups: BTreeSet<Group>,
    listeners: BTreeSet<VmName>,
}

impl Board {
    /// The board as it was written down.
    pub fn from_parts(
        revisions: BTreeMap<Group, u64>,
        listeners: BTreeMap<VmName, Listener>,
        pauses: Vec<Pause>,
    ) -> Self {
        Self {
            revisions,
            listeners,
            pauses: pauses
                .into_iter()
                .map(|pause| (pause.id.clone(), pause))
                .collect(),
            touched: Touched::default(),
        }
    }

    /// What changed since the last time.
    pub fn take_changes(&mut self) -> Changes {
        let touched = std::mem::take(&mut self.touched);
        let mut changes = Changes::default();
        for id in touched.pauses {
            match self.pauses.get(&id) {
                Some(pause) => changes.pauses.push(pause.clone()),
                None => changes.forgotten.push(id),
            }
        }
        for group in touched.groups {
            let revision = self.revision(&group);
            changes.groups.push((group, revision));
        }
        for vm in touched.listeners {
            match self.listeners.get(&vm) {
                Some(listener) => changes.listeners.push((vm, listener.clone())),
                None => changes.gone.push(vm),
            }
        }
        changes
    }

    /// Whether it is time to note that a VM asks: it does not listen yet, or its last note is old.
    pub fn is_due(&self, vm: &VmName, group: &Group, now: u64) -> bool {
        !self.listeners.get(vm).is_some_and(|listener| {
            listener.group == *group && now.saturating_sub(listener.asked_at_unix_ns) < WRITE_NS
        })
    }

    /// Notes that a VM asks.
    pub fn listen(&mut self, vm: &VmName, group: &Group, now: u64) {
        let revision = self.revision(group);
        let known = self.listeners.get_mut(vm);
        if let Some(listener) = known
            && listener.group == *group
            && now.saturating_sub(listener.asked_at_unix_ns) < LISTENS_NS
        {
            listener.asked_at_unix_ns = now;
        } else {
            let listener = Listener {
                group: group.clone(),
                base: revision,
                asked_at_unix_ns: now,
            };
            self.listeners.insert(vm.clone(), listener);
        }
        self.touched.listeners.insert(vm.clone());
    }

    /// Whether any VM of the group listens.
    pub fn is_heard(&self, group: &Group, now: u64) -> bool {
        !self.heard_by(group, now).is_empty()
    }

    /// The VMs of the group that listen.
    pub fn heard_by(&self, group: &Group, now: u64) -> Vec<VmName> {
        let listens = |listener: &Listener| {
            listener.group == *group && now.saturating_sub(listener.asked_at_unix_ns) < LISTENS_NS
        };
        let all = self.listeners.iter().filter(|(_, of)| listens(of));
        all.map(|(vm, _)| vm.clone()).collect()
    }

    /// Forgets a VM that is no more. What was announced to its group stays.
    pub fn forget(&mut self, vm: &VmName) {
        if self.listeners.remove(vm).is_some() {
            self.touched.listeners.insert(vm.clone());
        }
    }

    /// What a VM of this group reads as `DocumentIncarnation`.
    pub fn incarnation(&self, vm: &VmName, group: &Group) -> u64 {
        let base = self.listeners.get(vm).map_or(0, |listener| listener.base);
        self.revision(group).saturating_sub(base) + 1
    }

    /// What a group sees, in the order in which it was announced.
    pub fn seen_by(&self, group: &Group) -> Vec<(&Pause, &Notice)> {
        let mut seen: Vec<_> = self
            .pauses
            .values()
            .filter(|pause| pause.state.is_open())
            .filter_map(|pause| Some((pause, pause.notice_to(group)?)))
            .collect();
        seen.sort_by_key(|(pause, _)| (pause.announced_at_unix_ns, pause.id.clone()));
        seen
    }

    /// Pauses that a VM had, has or is to have, oldest first.
    pub fn of_vm(&self, vm: &VmName) -> Vec<&Pause> {
        let mut all: Vec<_> = self.pauses.values().collect();
        all.retain(|pause| pause.vms().any(|paused| paused == vm));
        all.sort_by_key(|pause| pause.announced_at_unix_ns);
        all
    }

    /// All pauses that are known, oldest first.
    pub fn all(&self) -> Vec<&Pause> {
        let mut all: Vec<_> = self.pauses.values().collect();
        all.sort_by_key(|pause| pause.announced_at_unix_ns);
        all
    }

    /// The pause of this swap.
    pub fn of_swap(&self, swap: &SwapId) -> Option<&Pause> {
        self.pauses.values().find(|pause| pause.swap == *swap)
    }

    /// Announces a pause.
    pub fn announce(&mut self, new: Announcement, now: u64) -> PauseId {
        let not_before_unix_s = match new.notice_ns {
            0 => now / SECOND,
            // Rounded up: guests read whole seconds, and it must not start before what they read.
            notice => now.saturating_add(notice).div_ceil(SECOND),
        };
        let notices = new.notices.into_iter();
        let notices = notices.map(|(event, group, vms)| Notice {
            event,
            group,
            vms,
            approval: None,
        });
        let pause = Pause {
            id: new.id.clone(),
            state: PauseState::Scheduled,
            swap: new.swap,
            description: new.description,
            not_before_unix_s,
            expected_ns: new.expected_ns,
            no_notice: new.no_notice,
            notices: notices.collect(),
            announced_at_unix_ns: now,
            started_at_unix_ns: None,
            ended_at_unix_ns: None,
            measured: None,
        };
        self.pauses.insert(new.id.clone(), pause);
        self.changed(&new.id);
        new.id
    }

    /// Whether a pause may start.
    pub fn start_of(&self, id: &PauseId, now: u64) -> Start {
        let Some(pause) = self.pauses.get(id) else {
            return Start::Never;
        };
        match pause.state {
            PauseState::Started => Start::Now,
            PauseState::Over | PauseState::Cancelled => Start::Never,
            PauseState::Scheduled => {
                let unannounced = pause.no_notice.is_some();
                if unannounced || pause.is_approved() || now / SECOND >= pause.not_before_unix_s {
                    Start::Now
                } else {
                    Start::At(pause.not_before_unix_s)
                }
            }
        }
    }

    /// Starts a pause that may start. `false`: it may not.
    pub fn start(&mut self, id: &PauseId, now: u64) -> bool {
        if self.start_of(id, now) != Start::Now {
            return false;
        }
        if let Some(pause) = self.pauses.get_mut(id)
            && pause.state == PauseState::Scheduled
        {
            pause.state = PauseState::Started;
            pause.started_at_unix_ns = Some(now);
            self.changed(id);
        }
        true
    }

    /// Ends a pause: one that started is over, one that did not is cancelled. What ended already
    /// stays as it is.
    pub fn end(&mut self, id: &PauseId, measured: Measured, now: u64) {
        let Some(pause) = self.pauses.get_mut(id) else {
            return;
        };
        pause.state = match pause.state {
            PauseState::Scheduled => PauseState::Cancelled,
            PauseState::Started => PauseState::Over,
            PauseState::Over | PauseState::Cancelled => return,
        };
        pause.ended_at_unix_ns = Some(now);
        pause.measured = Some(measured);
        self.changed(id);
        self.prune(id);
    }

    /// Approves events for a group, all or none of them. What is approved, started or over already
    /// stays as it is, and is no error.
    pub fn approve(
        &mut self,
        events: &[EventId],
        group: &Group,
        by: &Approver,
        now: u64,
    ) -> Result<(), EventError> {
        let mut found = Vec::new();
        for event in events {
            let is_it = |n: &Notice| n.event == *event && n.group == *group;
            let mut pauses = self.pauses.values();
            let pause = pauses.find(|pause| pause.notices.iter().any(is_it));
            let pause = pause.ok_or_else(|| EventError::Unknown(event.to_string()))?;
            found.push((pause.id.clone(), event));
        }
        for (id, event) in found {
            self.note(&id, event, by, now);
        }
        Ok(())
    }

    fn note(&mut self, id: &PauseId, event: &EventId, by: &Approver, now: u64) {
        let Some(pause) = self.pauses.get_mut(id) else {
            return;
        };
        let open = pause.state.is_open();
        for notice in &mut pause.notices {
            if notice.event == *event && notice.approval.is_none() && open {
                notice.approval = Some(Approval {
                    by: by.clone(),
                    at_unix_ns: now,
                });
                self.touched.pauses.insert(id.clone());
            }
        }
    }

    /// The group that an event was issued to.
    pub fn group_of(&self, event: &EventId) -> Option<&Group> {
        let notices = self.pauses.values().flat_map(|pause| &pause.notices);
        let mut found = notices.filter(|notice| notice.event == *event);
        found.next().map(|notice| &notice.group)
    }

    /// Withdraws the whole pause of which this event tells.
    pub fn cancel(&mut self, event: &EventId, why: &str, now: u64) -> Result<PauseId, EventError> {
        let has = |pause: &&Pause| pause.notices.iter().any(|n| n.event == *event);
        let found = self.pauses.values().find(has);
        let found = found.ok_or_else(|| EventError::Unknown(event.to_string()))?;
        if found.state != PauseState::Scheduled {
            return Err(EventError::Late(event.clone(), found.state));
        }
        let id = found.id.clone();
        let measured = Measured {
            reason: Some(why.to_owned()),
            ..Measured::default()
        };
        self.end(&id, measured, now);
        Ok(id)
    }

    fn revision(&self, group: &Group) -> u64 {
        self.revisions.get(group).copied().unwrap_or(0)
    }

    /// What the pause's groups see has changed.
    fn changed(&mut self, id: &PauseId) {
        self.touched.pauses.insert(id.clone());
        let Some(pause) = self.pauses.get(id) else {
            return;
        };
        for notice in &pause.notices {
            *self.revisions.entry(notice.group.clone()).or_default() += 1;
            self.touched.groups.insert(notice.group.clone());
        }
    }

    /// Forgets the oldest pauses of these groups that have ended.
    fn prune(&mut self, id: &PauseId) {
        let groups = self.pauses.get(id).map(|pause| &pause.notices);
        let groups: Vec<Group> = groups
            .into_iter()
            .flatten()
            .map(|n| n.group.clone())
            .collect();
        for group in groups {
            let mut ended: Vec<_> = self
                .pauses
                .values()
                .filter(|pause| !pause.state.is_open() && pause.notice_to(&group).is_some())
                .map(|pause| (pause.ended_at_unix_ns, pause.id.clone()))
                .collect();
            ended.sort();
            let extra = ended.len().saturating_sub(KEPT);
            for (_, id) in ended.into_iter().take(extra) {
                self.pauses.remove(&id);
                self.touched.pauses.insert(id);
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! Records in memory, and the one law of commits. Pure: whoever has it says when leases end.

use std::collections::{BTreeMap, BTreeSet};

use super::{Become, Change, Committed, Entry, Expect, Guard, Keep, Lease, Snapshot};

#[derive(Debug)]
struct Row {
    value: Vec<u8>,
    version: u64,
    created: u64,
    lease: Option<Lease>,
}

/// All records, as they are after the last commit.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    rows: BTreeMap<String, Row>,
    leases: BTreeSet<Lease>,
    revision: u64,
}

impl Mirror {
    /// An empty one, whose next commit has the revision after that one.
    pub(super) fn at(revision: u64) -> Self {
        Self {
            revision,
            ..Self::default()
        }
    }

    /// A record that was there before.
    pub(super) fn load(&mut self, entry: Entry) {
        let Entry {
            key,
            value,
            version,
            created,
        } = entry;
        let row = Row {
            value,
            version,
            created,
            lease: None,
        };
        self.rows.insert(key, row);
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// When the record there was made.
    pub(super) fn created(&self, key: &str) -> Option<u64> {
        self.rows.get(key).map(|row| row.created)
    }

    pub(super) fn list(&self, prefix: &str) -> Snapshot {
        let rows = self.rows.range(prefix.to_owned()..);
        let rows = rows.take_while(|(key, _)| key.starts_with(prefix));
        let entries = rows.map(|(key, row)| entry(key, row)).collect();
        Snapshot {
            entries,
            revision: self.revision,
            origin: "own".into(),
        }
    }

    /// Whether a commit would be done.
    pub(super) fn allows(&self, changes: &[Change], guard: Option<&Guard>) -> bool {
        let holds = |guard: &Guard| {
            let row = self.rows.get(&guard.key);
            row.is_some_and(|row| row.created == guard.created)
        };
        let as_expected = |change: &Change| {
            let row = self.rows.get(&change.key);
            let expected = match change.expect {
                Expect::Absent => row.is_none(),
                Expect::Version(version) => row.is_some_and(|row| row.version == version),
                Expect::Anything => true,
            };
            expected && self.has_lease(&change.to)
        };
        guard.is_none_or(holds) && changes.iter().all(as_expected)
    }

    fn has_lease(&self, to: &Become) -> bool {
        match to {
            Become::Value(_, Keep::With(lease)) => self.leases.contains(lease),
            _ => true,
        }
    }

    /// Does what is allowed.
    pub(super) fn commit(&mut self, changes: &[Change], guard: Option<&Guard>) -> Committed {
        if !self.allows(changes, guard) {
            return Committed::Refused;
        }
        self.revision += 1;
        for change in changes {
            match &change.to {
                Become::Gone => {
                    self.rows.remove(&change.key);
                }
                Become::Value(value, keep) => {
                    let before = self.rows.get(&change.key);
                    let row = Row {
                        value: value.clone(),
                        version: self.revision,
                        created: before.map_or(self.revision, |row| row.created),
                        lease: match keep {
                            Keep::With(lease) => Some(*lease),
                            Keep::Always | Keep::Retold => None,
                        },
                    };
                    self.rows.insert(change.key.clone(), row);
                }
            }
        }
        Committed::Done(self.revision)
    }

    /// A lease that ends when it is told so.
    pub(super) fn lease(&mut self) -> Lease {
        let last = self.leases.last().map_or(0, |lease| lease.0);
        // Never one that was there before: what still names it must not come to life again.
        let lease = Lease(last.max(i64::try_from(self.revision).unwrap_or(i64::MAX / 2)) + 1);
        self.revision += 1;
        self.leases.insert(lease);
        lease
    }

    pub(super) fn has(&self, lease: Lease) -> bool {
        self.leases.contains(&lease)
    }

    /// Ends a lease, and all that hangs on it; whether there was anything.
    pub(super) fn revoke(&mut self, lease: Lease) -> bool {
        self.leases.remove(&lease);
        let before = self.rows.len();
        self.rows.retain(|_, row| row.lease != Some(lease));
        let changed = self.rows.len() != before;
        self.revision += u64::from(changed);
        changed
    }
}

fn entry(key: &str, row: &Row) -> Entry {
    Entry {
        key: key.to_owned(),
        value: row.value.clone(),
        version: row.version,
        created: row.created,
    }
}

//! The journal in the store.
//!
//! Before: the change that a line tells of is being made. After: line and change are on disk together, or
//! neither is, so the journal can't tell of what was not done, nor leave out what was. Must never: be
//! written by anybody but the function that writes the change.

use rusqlite::{OptionalExtension, Row, Transaction, params};

use super::rows::{from_word, from_word_option, signed, unsigned, word};
use super::vms::Observed;
use super::{Store, StoreError};
use crate::model::{
    HOST, JournalEntry, JournalKind, Release, SwapId, SwapRecord, SwapState, VmName, VmRecord,
    VmState,
};

/// Lines that are kept.
const KEPT: i64 = 10_000;
/// What the last line of a daemon says that ended in order.
const ENDED: &str = "stillpointd ended in order";

/// A line to be written.
struct Line<'a> {
    vm: Option<&'a VmName>,
    swap: Option<&'a SwapId>,
    kind: JournalKind,
    text: String,
}

fn write(tx: &Transaction<'_>, line: &Line<'_>) -> rusqlite::Result<()> {
    tx.execute(
        "INSERT INTO journal (at_unix_ns, vm, swap, kind, text) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![
            signed(crate::execute::unix_ns()),
            line.vm.map(VmName::as_str),
            line.swap.map(|swap| swap.0.as_str()),
            word(&line.kind)?,
            line.text,
        ],
    )?;
    let oldest = tx.last_insert_rowid() - KEPT;
    tx.execute("DELETE FROM journal WHERE number <= ?1", [oldest])
        .map(drop)
}

fn of_vm(
    tx: &Transaction<'_>,
    vm: &VmName,
    kind: JournalKind,
    text: String,
) -> rusqlite::Result<()> {
    let (vm, swap) = (Some(vm), None);
    write(
        tx,
        &Line {
            vm,
            swap,
            kind,
            text,
        },
    )
}

fn of_swap(
    tx: &Transaction<'_>,
    swap: &SwapRecord,
    kind: JournalKind,
    text: String,
) -> rusqlite::Result<()> {
    let (vm, swap) = (Some(&swap.vm), Some(&swap.id));
    write(
        tx,
        &Line {
            vm,
            swap,
            kind,
            text,
        },
    )
}

/// A machine is to be started.
pub(super) fn wanted(tx: &Transaction<'_>, vm: &VmRecord) -> rusqlite::Result<()> {
    let text = format!("to run, with release {}", vm.release);
    of_vm(tx, &vm.name, JournalKind::Asked, text)
}

/// A machine is to be ended.
pub(super) fn unwanted(tx: &Transaction<'_>, vm: &VmName) -> rusqlite::Result<()> {
    of_vm(tx, vm, JournalKind::Asked, "to be stopped".into())
}

/// A machine's record is gone.
pub(super) fn removed(tx: &Transaction<'_>, vm: &VmName) -> rusqlite::Result<()> {
    of_vm(tx, vm, JournalKind::Done, "forgotten".into())
}

/// A release was recorded.
pub(super) fn added(tx: &Transaction<'_>, release: &Release) -> rusqlite::Result<()> {
    let manifest = &release.manifest;
    let line = Line {
        vm: None,
        swap: None,
        kind: JournalKind::Done,
        text: format!(
            "release {} of the {} added",
            manifest.version, manifest.component
        ),
    };
    write(tx, &line)
}

/// Something is seen of a machine.
pub(super) fn observed(
    tx: &Transaction<'_>,
    vm: &VmName,
    observed: &Observed,
) -> rusqlite::Result<()> {
    let reason = observed.reason.as_deref().unwrap_or("no reason is known");
    let reason = reason.lines().next().unwrap_or_default();
    let process = observed.process.as_ref();
    let process = process.map_or(String::new(), |process| {
        format!(", process {}", process.pid)
    });
    let (kind, text) = match observed.state {
        // The lines of its swap tell more.
        VmState::Swapping => return Ok(()),
        VmState::Starting => (JournalKind::Step, format!("starts{process}")),
        VmState::Running => (JournalKind::Done, format!("runs{process}")),
        VmState::Stopped => (JournalKind::Done, "stopped".into()),
        VmState::Lost => (JournalKind::Step, format!("can't be found: {reason}")),
        state @ (VmState::Crashed | VmState::Failed) => {
            (JournalKind::Undone, format!("{state}: {reason}"))
        }
    };
    of_vm(tx, vm, kind, text)
}

/// A swap got on: it is wanted, at a step, or over.
pub(super) fn got_on(tx: &Transaction<'_>, swap: &SwapRecord) -> rusqlite::Result<()> {
    let reason = swap.reason.as_deref().unwrap_or_default();
    let reason = reason.lines().next().unwrap_or_default();
    let (kind, text) = match swap.state {
        SwapState::Wanted if swap.step == "recorded" && swap.component == HOST => (
            JournalKind::Asked,
            "to stand still while its host is changed".to_owned(),
        ),
        SwapState::Wanted if swap.step == "recorded" => {
            let (from, to) = (&swap.from.version, &swap.to.version);
            (
                JournalKind::Asked,
                format!("to be swapped from {from} to {to}"),
            )
        }
        SwapState::Wanted | SwapState::InProgress => (JournalKind::Step, step(swap)),
        SwapState::InDoubt => (JournalKind::Step, format!("in doubt: {reason}")),
        SwapState::Moved => (JournalKind::Done, format!("moved to {}", swap.to.version)),
        SwapState::Resumed => (JournalKind::Done, "stood still, and runs on".into()),
        SwapState::Kept if swap.component == HOST => (
            JournalKind::Undone,
            format!("did not stand still: {reason}"),
        ),
        SwapState::Kept => {
            let from = &swap.from.version;
            (JournalKind::Undone, format!("stayed with {from}: {reason}"))
        }
        SwapState::Crashed => (JournalKind::Undone, format!("crashed: {reason}")),
    };
    of_swap(tx, swap, kind, text)
}

fn step(swap: &SwapRecord) -> String {
    match &swap.successor {
        Some(successor) => format!("{}, successor is process {}", swap.step, successor.pid),
        None => swap.step.clone(),
    }
}

fn entry(row: &Row<'_>) -> rusqlite::Result<JournalEntry> {
    Ok(JournalEntry {
        number: unsigned(row, 0)?,
        at_unix_ns: unsigned(row, 1)?,
        vm: from_word_option(row, 2)?,
        swap: from_word_option(row, 3)?,
        kind: from_word(row, 4)?,
        text: row.get(5)?,
    })
}

const COLUMNS: &str = "SELECT number, at_unix_ns, vm, swap, kind, text FROM journal";

/// What is on record as begun and not over: for each machine what it is in the middle of.
fn unfinished(tx: &Transaction<'_>) -> rusqlite::Result<Vec<(VmName, Option<SwapId>, String)>> {
    let mut query = tx.prepare(
        "SELECT vm, id, state, step FROM swaps WHERE state IN ('wanted', 'in_progress', 'in_doubt')
         ORDER BY asked_at_unix_ns, rowid",
    )?;
    let swaps = query.query_map([], |row| {
        let (state, step): (SwapState, String) = (from_word(row, 2)?, row.get(3)?);
        let text = match state {
            SwapState::Wanted => format!("a swap that is to be done, at `{step}`"),
            state => format!("a swap {state}, at `{step}`"),
        };
        Ok((from_word(row, 0)?, Some(SwapId(row.get(1)?)), text))
    })?;
    let mut found: Vec<_> = swaps.collect::<rusqlite::Result<_>>()?;
    let mut query = tx.prepare(
        "SELECT name, state, wanted FROM vms WHERE state = 'starting'
         OR (wanted = 'stopped' AND state IN ('running', 'swapping', 'lost')) ORDER BY name",
    )?;
    let vms = query.query_map([], |row| {
        let state: VmState = from_word(row, 1)?;
        let wanted: String = row.get(2)?;
        let text = match wanted.as_str() {
            "stopped" => format!("an end: it is {state}, and to be stopped"),
            _ => "a start".to_owned(),
        };
        Ok((from_word(row, 0)?, None, text))
    })?;
    for vm in vms {
        found.push(vm?);
    }
    Ok(found)
}

impl Store {
    /// A daemon starts: says so, how the one before it ended, and of everything that is unfinished
    /// that it is gone on with. Gives those lines.
    pub async fn begin_journal(&self, version: &str) -> Result<Vec<JournalEntry>, StoreError> {
        let version = version.to_owned();
        self.call(move |tx| {
            let last =
                "SELECT text FROM journal WHERE kind = 'daemon' ORDER BY number DESC LIMIT 1";
            let last: Option<String> = tx.query_row(last, [], |row| row.get(0)).optional()?;
            let before: i64 =
                tx.query_row("SELECT coalesce(max(number), 0) FROM journal", [], |row| {
                    row.get(0)
                })?;
            let how = match last.as_deref() {
                None => "",
                Some(ENDED) => "; the one before ended in order",
                Some(_) => "; the one before was cut off",
            };
            let (vm, swap, kind) = (None, None, JournalKind::Daemon);
            let text = format!(
                "stillpointd {version} started, process {}{how}",
                std::process::id()
            );
            write(
                tx,
                &Line {
                    vm,
                    swap,
                    kind,
                    text,
                },
            )?;
            for (vm, swap, what) in unfinished(tx)? {
                let line = Line {
                    vm: Some(&vm),
                    swap: swap.as_ref(),
                    kind: JournalKind::Found,
                    text: format!("in the middle of {what}; it is finished or undone now"),
                };
                write(tx, &line)?;
            }
            let mut query = tx.prepare(&format!("{COLUMNS} WHERE number > ?1 ORDER BY number"))?;
            query.query_map([before], entry)?.collect()
        })
        .await
    }

    /// A daemon ends in order.
    pub async fn end_journal(&self) -> Result<(), StoreError> {
        self.call(|tx| {
            let (vm, swap, kind) = (None, None, JournalKind::Daemon);
            let text = ENDED.to_owned();
            write(
                tx,
                &Line {
                    vm,
                    swap,
                    kind,
                    text,
                },
            )
        })
        .await
    }

    /// The last so many lines, of one machine or all, oldest first.
    pub async fn journal(
        &self,
        vm: Option<&VmName>,
        last: u32,
    ) -> Result<Vec<JournalEntry>, StoreError> {
        let vm = vm.map(|name| name.as_str().to_owned());
        self.call(move |tx| {
            let query = format!(
                "SELECT * FROM ({COLUMNS} WHERE ?1 IS NULL OR vm = ?1 ORDER BY number DESC LIMIT ?2)
                 ORDER BY number"
            );
            tx.prepare(&query)?
                .query_map(params![vm, last], entry)?
                .collect()
        })
        .await
    }
}

//! The audit log in the store.
//!
//! Before: a change is asked for. After `begin_audit` the line is on disk, and only then is the change begun; what
//! came of it is written to the same line. A line that a daemon leaves under way is cut off for the next one. Must
//! never: let those who are denied everything push out what was done.

use rusqlite::{Row, params};

use super::rows::{from_word, from_word_option, signed, unsigned, unsigned_option, word};
use super::{Store, StoreError};
use crate::auth::Role;
use crate::execute::unix_ns;
use crate::model::{AuditEntry, Outcome};

/// Lines of changes that are kept.
const KEPT: i64 = 10_000;
/// Lines of those who were denied.
const DENIED_KEPT: i64 = 1_000;

/// What is known when a change is asked for.
#[derive(Clone, Debug)]
pub struct Asking {
    /// Who asks.
    pub who: String,
    /// From where.
    pub from: String,
    /// In which role.
    pub role: Option<Role>,
    /// The request's method.
    pub method: String,
    /// And its path.
    pub path: String,
    /// The first part of its body.
    pub body: Option<String>,
}

/// What became of it.
#[derive(Clone, Debug)]
pub struct Came {
    /// In a word.
    pub outcome: Outcome,
    /// The status of the answer, if there was one.
    pub status: Option<u16>,
    /// Why.
    pub reason: Option<String>,
}

fn entry(row: &Row<'_>) -> rusqlite::Result<AuditEntry> {
    Ok(AuditEntry {
        number: unsigned(row, 0)?,
        at_unix_ns: unsigned(row, 1)?,
        who: row.get(2)?,
        from: row.get(3)?,
        role: from_word_option(row, 4)?,
        method: row.get(5)?,
        path: row.get(6)?,
        body: row.get(7)?,
        outcome: from_word(row, 8)?,
        status: row.get(9)?,
        reason: row.get(10)?,
        ended_unix_ns: unsigned_option(row, 11)?,
    })
}

impl Store {
    /// Records that something was asked; its number.
    pub async fn begin_audit(&self, asking: Asking, outcome: Outcome) -> Result<i64, StoreError> {
        self.call(move |tx| {
            let role = asking.role.as_ref().map(word).transpose()?;
            tx.execute(
                "INSERT INTO audit (at_unix_ns, who, \"from\", role, method, path, body, outcome)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
                params![
                    signed(unix_ns()),
                    asking.who,
                    asking.from,
                    role,
                    asking.method,
                    asking.path,
                    asking.body,
                    word(&outcome)?,
                ],
            )?;
            let number = tx.last_insert_rowid();
            let (of, kept) = match outcome {
                Outcome::Denied => ("outcome = 'denied'", DENIED_KEPT),
                _ => ("outcome <> 'denied'", KEPT),
            };
            let old = format!(
                "DELETE FROM audit WHERE {of} AND number <=
                 (SELECT number FROM audit WHERE {of} ORDER BY number DESC LIMIT 1 OFFSET ?1)"
            );
            tx.execute(&old, [kept])?;
            Ok(number)
        })
        .await
    }

    /// Records what came of it.
    pub async fn end_audit(&self, number: i64, came: Came) -> Result<(), StoreError> {
        self.call(move |tx| {
            tx.execute(
                "UPDATE audit SET outcome = ?2, status = ?3, reason = ?4, ended_unix_ns = ?5
                 WHERE number = ?1 AND ended_unix_ns IS NULL",
                params![
                    number,
                    word(&came.outcome)?,
                    came.status,
                    came.reason,
                    signed(unix_ns()),
                ],
            )
            .map(drop)
        })
        .await
    }

    /// A daemon starts: what the one before it left under way was cut off. How many there were.
    pub async fn cut_off_audit(&self) -> Result<usize, StoreError> {
        self.call(|tx| {
            tx.execute(
                "UPDATE audit SET outcome = 'cut_off', reason = 'the daemon ended before it answered',
                 ended_unix_ns = ?1 WHERE outcome = 'under_way'",
                [signed(unix_ns())],
            )
        })
        .await
    }

    /// The last so many lines, of one caller or all, oldest first.
    pub async fn audit(
        &self,
        who: Option<String>,
        last: u32,
    ) -> Result<Vec<AuditEntry>, StoreError> {
        self.call(move |tx| {
            tx.prepare(
                "SELECT * FROM (SELECT number, at_unix_ns, who, \"from\", role, method, path, body, outcome,
                 status, reason, ended_unix_ns FROM audit WHERE ?1 IS NULL OR who = ?1
                 ORDER BY number DESC LIMIT ?2) ORDER BY number",
            )?
            .query_map(params![who, last], entry)?
            .collect()
        })
        .await
    }

    /// Which store this is: made with it, and as long as it is there.
    pub async fn identity(&self) -> Result<String, StoreError> {
        self.call(|tx| tx.query_row("SELECT id FROM identity", [], |row| row.get(0)))
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(who: &str) -> Asking {
        Asking {
            who: who.into(),
            from: "a test".into(),
            role: Some(Role::Operate),
            method: "POST".into(),
            path: "/v1/vms/web/swaps".into(),
            body: Some("{}".into()),
        }
    }

    #[tokio::test]
    async fn what_is_under_way_when_a_daemon_dies_is_cut_off_for_the_next() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("store.sqlite");
        let store = Store::open(&path).expect("open");
        let done = store
            .begin_audit(asking("a"), Outcome::UnderWay)
            .await
            .expect("begin");
        let came = Came {
            outcome: Outcome::Done,
            status: Some(202),
            reason: None,
        };
        store.end_audit(done, came).await.expect("end");
        store
            .begin_audit(asking("b"), Outcome::UnderWay)
            .await
            .expect("begin");
        let identity = store.identity().await.expect("identity");
        assert_eq!(identity.len(), 32);
        store.close().await;

        let store = Store::open(&path).expect("open again");
        assert_eq!(store.identity().await.expect("identity"), identity);
        assert_eq!(store.cut_off_audit().await.expect("cut off"), 1);
        let all = store.audit(None, 10).await.expect("read");
        let outcomes: Vec<_> = all
            .iter()
            .map(|entry| (entry.who.as_str(), entry.outcome))
            .collect();
        assert_eq!(outcomes, [("a", Outcome::Done), ("b", Outcome::CutOff)]);
        assert_eq!(all[0].status, Some(202));
        assert_eq!(
            store.audit(Some("b".into()), 10).await.expect("read").len(),
            1
        );
        // Another store is another.
        let other = Store::open(&dir.path().join("other")).expect("open");
        assert_ne!(other.identity().await.expect("identity"), identity);
    }

    #[tokio::test]
    async fn those_who_are_denied_push_out_their_own_lines_alone() {
        let dir = tempfile::tempdir().expect("dir");
        let store = Store::open(&dir.path().join("store.sqlite")).expect("open");
        store
            .begin_audit(asking("early"), Outcome::UnderWay)
            .await
            .expect("begin");
        let over = 5;
        for _ in 0..DENIED_KEPT + over {
            store
                .begin_audit(asking("mallory"), Outcome::Denied)
                .await
                .expect("begin");
        }
        let all = store.audit(None, 10_000).await.expect("read");
        assert_eq!(i64::try_from(all.len()), Ok(DENIED_KEPT + 1));
        assert_eq!(all[0].who, "early");
    }
}

//! All that a shared store must be, asked of each.
#![allow(dead_code)] // Each test file uses its own part.

use std::time::Duration;

use orchestrator::store::shared::{Change, Committed, Expect, Guard, Keep, Shared};

/// Whatever stands there.
pub(crate) const ANYTHING: Expect = Expect::Anything;

pub(crate) fn put(key: &str, expect: Expect, value: &str) -> Change {
    Change::put(key, expect, value.as_bytes().to_vec())
}

pub(crate) async fn commit(shared: &Shared, changes: Vec<Change>) -> Committed {
    // A member that is too busy to take a connection in time was not asked anything.
    for _ in 0..5 {
        match shared.commit(changes.clone(), None).await {
            Err(error) if error.to_string().contains("no connection") => {}
            done => return done.expect("commit"),
        }
    }
    panic!("no connection, again and again");
}

pub(crate) async fn value(shared: &Shared, key: &str) -> Option<String> {
    let entry = shared.get(key).await.expect("get")?;
    Some(String::from_utf8(entry.value).expect("UTF-8"))
}

/// All that a shared store must be.
pub(crate) async fn suite(shared: &Shared) {
    records_change_by_compare_and_put_only(shared).await;
    a_commit_is_made_as_a_whole_or_not_at_all(shared).await;
    a_guard_says_whose_word_counts(shared).await;
    prefixes_are_prefixes(shared).await;
    what_hangs_on_a_lease_goes_with_it(shared).await;
    of_many_at_once_each_counts_once(shared).await;
    changes_are_heard(shared).await;
}

pub(crate) async fn records_change_by_compare_and_put_only(shared: &Shared) {
    let Committed::Done(first) = commit(shared, vec![put("a/1", Expect::Absent, "x")]).await else {
        panic!("it was not there");
    };
    let again = commit(shared, vec![put("a/1", Expect::Absent, "y")]).await;
    assert_eq!(again, Committed::Refused);
    let entry = shared.get("a/1").await.expect("get").expect("it is there");
    assert_eq!((entry.version, entry.created), (first, first));
    let Committed::Done(second) =
        commit(shared, vec![put("a/1", Expect::Version(first), "y")]).await
    else {
        panic!("it was not changed since");
    };
    assert!(second > first);
    let stale = commit(shared, vec![put("a/1", Expect::Version(first), "z")]).await;
    assert_eq!(stale, Committed::Refused);
    let entry = shared.get("a/1").await.expect("get").expect("it is there");
    assert_eq!((entry.version, entry.created), (second, first));
    assert_eq!(value(shared, "a/1").await.as_deref(), Some("y"));
    let gone = commit(shared, vec![Change::remove("a/1", Expect::Version(second))]).await;
    assert!(matches!(gone, Committed::Done(_)));
    assert_eq!(value(shared, "a/1").await, None);
    let Committed::Done(third) = commit(shared, vec![put("a/1", Expect::Absent, "x")]).await else {
        panic!("it is gone");
    };
    let entry = shared.get("a/1").await.expect("get").expect("it is there");
    assert_eq!((entry.version, entry.created), (third, third), "made anew");
}

async fn a_commit_is_made_as_a_whole_or_not_at_all(shared: &Shared) {
    let mixed = vec![
        put("b/1", Expect::Absent, "1"),
        put("b/2", Expect::Version(1), "2"),
    ];
    assert_eq!(commit(shared, mixed).await, Committed::Refused);
    assert_eq!(value(shared, "b/1").await, None);
    let both = vec![
        put("b/1", Expect::Absent, "1"),
        put("b/2", Expect::Anything, "2"),
    ];
    assert!(matches!(commit(shared, both).await, Committed::Done(_)));
    let snapshot = shared.list("b/").await.expect("list");
    let versions: Vec<u64> = snapshot.entries.iter().map(|entry| entry.version).collect();
    assert_eq!(versions.len(), 2);
    assert_eq!(versions[0], versions[1], "one commit, one revision");
}

async fn a_guard_says_whose_word_counts(shared: &Shared) {
    let Committed::Done(created) = commit(shared, vec![put("seat", Expect::Absent, "me")]).await
    else {
        panic!("nobody sat there");
    };
    let guard = Guard {
        key: "seat".into(),
        created,
    };
    let by = async |guard: &Guard, text: &str| {
        let change = put("c/1", Expect::Anything, text);
        shared
            .commit(vec![change], Some(guard))
            .await
            .expect("commit")
    };
    assert!(matches!(by(&guard, "1").await, Committed::Done(_)));
    // Another value in the same seat is the same seat; a seat that was left and taken again is another.
    commit(shared, vec![put("seat", Expect::Anything, "still me")]).await;
    assert!(matches!(by(&guard, "2").await, Committed::Done(_)));
    commit(shared, vec![Change::remove("seat", Expect::Anything)]).await;
    assert_eq!(by(&guard, "3").await, Committed::Refused);
    commit(shared, vec![put("seat", Expect::Absent, "you")]).await;
    assert_eq!(by(&guard, "4").await, Committed::Refused);
    assert_eq!(value(shared, "c/1").await.as_deref(), Some("2"));
    commit(shared, vec![Change::remove("seat", Expect::Anything)]).await;
}

async fn prefixes_are_prefixes(shared: &Shared) {
    for key in ["d/1", "d/10", "d/2", "d0", "da"] {
        commit(shared, vec![put(key, Expect::Anything, key)]).await;
    }
    let keys = async |prefix: &str| {
        let entries = shared.list(prefix).await.expect("list").entries;
        entries
            .into_iter()
            .map(|entry| entry.key)
            .collect::<Vec<_>>()
    };
    assert_eq!(keys("d/").await, ["d/1", "d/10", "d/2"]);
    assert_eq!(keys("d/1").await, ["d/1", "d/10"]);
    assert_eq!(keys("d/3").await, Vec::<String>::new());
    assert_eq!(value(shared, "d/1").await.as_deref(), Some("d/1"));
}

async fn what_hangs_on_a_lease_goes_with_it(shared: &Shared) {
    let lease = shared.lease(Duration::from_secs(30)).await.expect("lease");
    let hang = |key: &str, lease| {
        let bytes = b"here".to_vec();
        Change::keep(key, Expect::Anything, bytes, Keep::With(lease))
    };
    commit(
        shared,
        vec![hang("e/1", lease), put("e/2", Expect::Anything, "stays")],
    )
    .await;
    assert!(shared.keep(lease).await.expect("keep"));
    assert_eq!(value(shared, "e/1").await.as_deref(), Some("here"));
    shared.revoke(lease).await.expect("revoke");
    assert_eq!(value(shared, "e/1").await, None);
    assert_eq!(value(shared, "e/2").await.as_deref(), Some("stays"));
    let late = commit(shared, vec![hang("e/3", lease)]).await;
    assert_eq!(late, Committed::Refused, "on a lease that has ended");
    shared.revoke(lease).await.expect("once more");
}

async fn of_many_at_once_each_counts_once(shared: &Shared) {
    let adders = (0..8).map(|_| {
        let shared = shared.clone();
        tokio::spawn(async move {
            for _ in 0..5 {
                loop {
                    let entry = shared.get("f").await.expect("get");
                    let (expect, seen) = match &entry {
                        None => (Expect::Absent, 0),
                        Some(entry) => {
                            let text = String::from_utf8_lossy(&entry.value);
                            (
                                Expect::Version(entry.version),
                                text.parse().expect("number"),
                            )
                        }
                    };
                    let next: u32 = seen + 1;
                    let change = put("f", expect, &next.to_string());
                    if let Committed::Done(_) = commit(&shared, vec![change]).await {
                        break;
                    }
                }
            }
        })
    });
    for adder in adders.collect::<Vec<_>>() {
        adder.await.expect("adder");
    }
    assert_eq!(value(shared, "f").await.as_deref(), Some("40"));
}

async fn changes_are_heard(shared: &Shared) {
    let mut changes = shared.changes();
    // A stream that was opened just now may not be there yet: it is told of again and again.
    let told = async {
        loop {
            commit(shared, vec![put("g", Expect::Anything, "!")]).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        () = told => {}
        heard = tokio::time::timeout(Duration::from_secs(20), changes.changed()) => {
            heard.expect("in time").expect("a change");
        }
    }
}

pub(crate) async fn leases_end_by_themselves(shared: &Shared, lasts: Duration) {
    let lease = shared.lease(lasts).await.expect("lease");
    let change = Change::keep("i", Expect::Anything, b"1".to_vec(), Keep::With(lease));
    commit(shared, vec![change]).await;
    let gone = async {
        while shared.get("i").await.expect("get").is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let gone = tokio::time::timeout(Duration::from_secs(30), gone).await;
    gone.expect("it ends");
    assert!(!shared.keep(lease).await.expect("keep"), "it has ended");
}

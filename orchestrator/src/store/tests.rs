use std::os::unix::fs::MetadataExt;

use stillpoint_control::report::ReleaseName;
use stillpoint_control::secret::Secret;
use stillpoint_control::spec::MachineSpec;

use super::*;
use crate::model::{
    Health, HealthState, HostSwap, HostSwapState, JournalKind, Manifest, Release, RolloutId,
    Safeguards, SwapId, SwapRecord, SwapState, VMM, VmName, VmRecord, VmState, Wanted,
};

fn name(text: &str) -> VmName {
    VmName::try_from(text.to_owned()).expect("name")
}

fn vm(text: &str, state: VmState) -> VmRecord {
    let json = format!(r#"{{"name":"{text}","kernel":{{"path":"/k"}}}}"#);
    VmRecord {
        name: name(text),
        spec: MachineSpec::from_json(&json).expect("spec"),
        release: "0.1.0".into(),
        profile: crate::model::Profile::default(),
        wanted: Wanted::Running,
        state,
        reason: Some("why".into()),
        process: stillpoint_control::message::ProcessId::of(std::process::id()),
        secret: Secret::random().expect("random"),
        swaps: 3,
        created_at_unix_ns: 1,
        changed_at_unix_ns: 2,
    }
}

fn swap(id: &str, vm: &str, state: SwapState) -> SwapRecord {
    SwapRecord {
        id: SwapId(id.into()),
        part_of: None,
        rollout: Some(RolloutId("r1".into())),
        vm: name(vm),
        component: VMM.into(),
        from: ReleaseName::default(),
        to: ReleaseName {
            version: "0.2.0".into(),
            sha256: "ab".into(),
        },
        state,
        step: "start".into(),
        reason: None,
        budget_ns: Some(5),
        clock: Some(stillpoint_control::clock::Policy::Hold),
        notice_ns: Some(3),
        no_notice: Some("urgent".into()),
        safeguards: Safeguards {
            rehearse: true,
            watch_ns: 9,
            health: Some(Health::new(HealthState::Watching, vec!["late".into()], 4)),
            ..Safeguards::default()
        },
        successor: None,
        epoch_before: Some(0),
        asked_at_unix_ns: 7,
        ended_at_unix_ns: None,
        report: None,
    }
}

#[tokio::test]
async fn everything_is_there_after_opening_again() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("store.sqlite");
    let (vm, swap) = (
        vm("a", VmState::Running),
        swap("s", "a", SwapState::InProgress),
    );
    let release = Release {
        signed_by: None,
        manifest: Manifest {
            component: VMM.into(),
            version: "0.1.0".into(),
            sha256: "ff".into(),
            reads: vec![1],
            writes: vec![1],
            args: vec!["--x".into()],
        },
        added_at_unix_ns: 9,
    };
    let store = Store::open(&path).expect("open");
    assert!(store.put_vm(&vm).await.expect("put"));
    assert!(store.add_swap(&swap).await.expect("add"));
    store.add_release(&release).await.expect("add");
    drop(store);
    assert_eq!(
        std::fs::metadata(&path).expect("metadata").mode() & 0o777,
        0o600
    );
    let store = Store::open(&path).expect("open again");
    assert_eq!(store.vm(&vm.name).await.expect("vm"), Some(vm.clone()));
    assert_eq!(store.open_swap(&vm.name).await.expect("swap"), Some(swap));
    assert_eq!(
        store.release("0.1.0").await.expect("release"),
        Some(release)
    );
    assert_eq!(store.release("9").await.expect("none"), None);
}

#[tokio::test]
async fn an_active_vm_is_not_replaced_and_not_removed() {
    let dir = tempfile::tempdir().expect("temp dir");
    let store = Store::open(&dir.path().join("s")).expect("open");
    assert!(store.put_vm(&vm("a", VmState::Running)).await.expect("put"));
    assert!(
        !store
            .put_vm(&vm("a", VmState::Starting))
            .await
            .expect("put")
    );
    assert!(!store.remove_vm(&name("a")).await.expect("remove"));
    let observed = Observed {
        state: VmState::Crashed,
        reason: None,
        process: None,
        at_unix_ns: 3,
    };
    store.observe(&name("a"), observed).await.expect("observe");
    assert!(
        store
            .put_vm(&vm("a", VmState::Starting))
            .await
            .expect("put")
    );
    let put = store.vm(&name("a")).await.expect("vm").expect("there");
    assert_eq!(put.state, VmState::Starting);
}

#[tokio::test]
async fn one_swap_at_a_time_and_its_end_changes_the_vm_with_it() {
    let dir = tempfile::tempdir().expect("temp dir");
    let store = Store::open(&dir.path().join("s")).expect("open");
    store.put_vm(&vm("a", VmState::Running)).await.expect("put");
    let mut first = swap("1", "a", SwapState::Wanted);
    assert!(store.add_swap(&first).await.expect("add"));
    assert!(
        !store
            .add_swap(&swap("2", "a", SwapState::Wanted))
            .await
            .expect("add")
    );
    assert!(
        store
            .add_swap(&swap("3", "b", SwapState::Wanted))
            .await
            .expect("other VM")
    );
    first.state = SwapState::Moved;
    let observed = Observed {
        state: VmState::Running,
        reason: None,
        process: None,
        at_unix_ns: 3,
    };
    store.end_swap(&first, Some(observed)).await.expect("end");
    let moved = store.vm(&name("a")).await.expect("vm").expect("there");
    assert_eq!((moved.release.as_str(), moved.swaps), ("0.2.0", 4));
    assert!(
        store
            .add_swap(&swap("2", "a", SwapState::Wanted))
            .await
            .expect("add")
    );
    assert_eq!(store.swaps(Some(&name("a"))).await.expect("swaps").len(), 2);
}

#[test]
fn what_is_no_store_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("garbage");
    let garbage = vec![b'x'; 8192];
    std::fs::write(&path, &garbage).expect("write");
    let error = Store::open(&path).expect_err("garbage");
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
    assert_eq!(std::fs::read(&path).expect("read"), garbage);

    let path = dir.path().join("foreign");
    let foreign = Connection::open(&path).expect("open");
    foreign.execute_batch("CREATE TABLE t (x)").expect("table");
    drop(foreign);
    let before = std::fs::read(&path).expect("read");
    let error = Store::open(&path).expect_err("foreign");
    assert!(matches!(error, OpenError::Foreign(_)), "{error}");
    assert_eq!(std::fs::read(&path).expect("read"), before);
}

#[test]
fn a_store_in_use_is_refused() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("s");
    let _first = Store::open(&path).expect("open");
    let error = Store::open(&path).expect_err("in use");
    assert!(matches!(error, OpenError::Locked(_)), "{error}");
}

#[tokio::test]
async fn one_swap_of_the_host_at_a_time_and_all_its_parts_or_none() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("s");
    let store = Store::open(&path).expect("open");
    for vm_name in ["a", "b"] {
        store
            .put_vm(&vm(vm_name, VmState::Running))
            .await
            .expect("put");
    }
    let host_swap = |id: &str, state| HostSwap {
        rollout: None,
        id: SwapId(id.into()),
        kvm: None,
        command: vec!["true".into()],
        kernel: None,
        undo: None,
        vms: vec![name("a"), name("b")],
        budget_ns: 5,
        notice_ns: None,
        no_notice: None,
        state,
        step: String::new(),
        reason: None,
        process: None,
        ended: None,
        undone: None,
        output: String::new(),
        pause_ns: None,
        asked_at_unix_ns: 1,
        ended_at_unix_ns: None,
    };
    let part = |of: &str, vm: &str, state| SwapRecord {
        part_of: Some(SwapId(of.into())),
        ..swap(&format!("{of}.{vm}"), vm, state)
    };
    let parts = |of: &str, state| [part(of, "a", state), part(of, "b", state)];
    let wanted = |id: &str| host_swap(id, HostSwapState::Wanted);
    // A swap of one of them stands in the way, and nothing is left of the try.
    let mut other = swap("9", "b", SwapState::Wanted);
    assert!(store.add_swap(&other).await.expect("add"));
    let added = store
        .add_host_swap(&wanted("1"), &parts("1", SwapState::Wanted))
        .await;
    assert_eq!(added.expect("asked"), Err(Busy::Vm("b".into())));
    assert_eq!(store.host_swaps().await.expect("read"), []);
    assert_eq!(store.open_swap(&name("a")).await.expect("read"), None);
    other.state = SwapState::Kept;
    store.update_swap(&other).await.expect("end");
    let added = store
        .add_host_swap(&wanted("2"), &parts("2", SwapState::Wanted))
        .await;
    assert_eq!(added.expect("asked"), Ok(()));
    let added = store.add_host_swap(&wanted("3"), &[]).await;
    let busy = Busy::Host(SwapId("2".into()));
    assert_eq!(added.expect("asked"), Err(busy));
    let open = store.open_parts(&SwapId("2".into())).await.expect("read");
    assert_eq!(open, parts("2", SwapState::Wanted));
    store.close().await;
    // All of it is there for the next daemon.
    let store = Store::open(&path).expect("open again");
    assert_eq!(store.host_swaps().await.expect("read"), [wanted("2")]);
    let done = host_swap("2", HostSwapState::Done);
    let ended = parts("2", SwapState::Resumed);
    store.update_host_swap(&done, &ended).await.expect("end");
    assert_eq!(store.host_swap(&done.id).await.expect("read"), Some(done));
    let open = store.open_parts(&SwapId("2".into())).await.expect("read");
    assert_eq!(open, []);
    let added = store.add_host_swap(&wanted("3"), &[]).await;
    assert_eq!(added.expect("asked"), Ok(()));
}

#[tokio::test]
async fn the_journal_says_what_a_daemon_found_unfinished() {
    let dir = tempfile::tempdir().expect("temp dir");
    let store = Store::open(&dir.path().join("s")).expect("open");
    let lines = store.begin_journal("0.2.0").await.expect("begin");
    assert_eq!(lines.len(), 1, "{lines:?}");
    store.put_vm(&vm("a", VmState::Running)).await.expect("put");
    store
        .put_vm(&vm("b", VmState::Starting))
        .await
        .expect("put");
    let mut first = swap("1", "a", SwapState::InProgress);
    assert!(store.add_swap(&first).await.expect("add"));
    let found = store.begin_journal("0.2.0").await.expect("begin");
    assert!(
        found[0].text.ends_with("the one before was cut off"),
        "{found:?}"
    );
    let of: Vec<_> = found[1..]
        .iter()
        .map(|line| {
            (
                line.kind,
                line.vm.clone().expect("a machine"),
                line.swap.clone(),
            )
        })
        .collect();
    let expected = [("a", Some(SwapId("1".into()))), ("b", None)];
    let expected = expected.map(|(vm, swap)| (JournalKind::Found, name(vm), swap));
    assert_eq!(of, expected);
    first.state = SwapState::Kept;
    store.end_swap(&first, None).await.expect("end");
    store.end_journal().await.expect("end");
    let found = store.begin_journal("0.2.0").await.expect("begin");
    assert!(
        found[0].text.ends_with("the one before ended in order"),
        "{found:?}"
    );
    assert_eq!(found.len(), 2, "the start of b alone: {found:?}");
    let of_a = store.journal(Some(&name("a")), 100).await.expect("lines");
    let last = of_a.last().expect("a line");
    assert_eq!(
        (last.kind, last.vm.as_ref()),
        (JournalKind::Undone, Some(&name("a")))
    );
    assert_eq!(store.journal(None, 1).await.expect("lines").len(), 1);
}

#[tokio::test]
async fn a_way_back_is_recorded_with_the_verdict_or_not_at_all() {
    let dir = tempfile::tempdir().expect("temp dir");
    let store = Store::open(&dir.path().join("s")).expect("open");
    assert!(store.put_vm(&vm("a", VmState::Running)).await.expect("put"));
    let mut first = swap("1", "a", SwapState::Moved);
    store.update_swap(&first).await.expect("moved");
    let watched = store.watched_swap(&name("a")).await.expect("watched");
    assert_eq!(watched, Some(first.clone()));
    assert_eq!(store.watched_swap(&name("b")).await.expect("none"), None);

    let mut verdict = first.clone();
    verdict.safeguards.health = Some(Health::new(HealthState::Unwell, Vec::new(), 5));
    verdict.safeguards.put_back_by = Some(SwapId("1-back".into()));
    let back = swap("1-back", "a", SwapState::Wanted);
    // An operator was quicker: neither is recorded.
    let mut other = swap("2", "a", SwapState::Wanted);
    assert!(store.add_swap(&other).await.expect("add"));
    assert!(!store.put_back(&verdict, &back).await.expect("put back"));
    assert_eq!(
        store.swap(&first.id).await.expect("first"),
        Some(first.clone())
    );
    assert_eq!(store.swap(&back.id).await.expect("none"), None);
    other.state = SwapState::Kept;
    store.update_swap(&other).await.expect("over");

    assert!(store.put_back(&verdict, &back).await.expect("put back"));
    assert_eq!(
        store.open_swap(&name("a")).await.expect("open"),
        Some(back.clone())
    );
    assert_eq!(store.watched_swap(&name("a")).await.expect("over"), None);
    assert!(
        !store.put_back(&verdict, &back).await.expect("once"),
        "and once"
    );
    for state in [HealthState::Well, HealthState::Ended] {
        first.safeguards.health = Some(Health::new(state, Vec::new(), 5));
        store.update_swap(&first).await.expect("update");
        assert_eq!(store.watched_swap(&name("a")).await.expect("over"), None);
    }
    first.safeguards.health = Some(Health::new(HealthState::WellSoFar, Vec::new(), 5));
    store.update_swap(&first).await.expect("update");
    assert_eq!(
        store.watched_swap(&name("a")).await.expect("watched"),
        Some(first)
    );
}

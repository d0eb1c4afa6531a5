//! What groups see over time, with a clock of the test's own.

use super::*;
use crate::metadata::answer::{self, Answer};
use crate::metadata::document::{VERSIONS, Version, document};
use crate::metadata::instance::Facts;
use crate::model::{Profile, VmRecord, VmState, Wanted};
use stillpoint_control::secret::Secret;
use stillpoint_control::spec::MachineSpec;

/// Thu, 26 Sep 2019 15:00:21 GMT.
const START: u64 = 1_569_510_021 * SECOND;
const MINUTE: u64 = 60 * SECOND;

fn facts(name: &str, set: Option<&str>) -> Facts {
    let spec = serde_json::json!({ "name": name, "kernel": { "path": "/k" } });
    Facts::of(&VmRecord {
        name: VmName::try_from(name.to_owned()).unwrap(),
        spec: MachineSpec::from_json(&spec.to_string()).unwrap(),
        profile: Profile {
            availability_set: set.map(Into::into),
            ..Profile::default()
        },
        release: "1".into(),
        wanted: Wanted::Running,
        state: VmState::Running,
        reason: None,
        process: None,
        secret: Secret::random().unwrap(),
        swaps: 0,
        created_at_unix_ns: 1,
        changed_at_unix_ns: 1,
    })
}

/// A pause of these VMs, each group's event numbered from `first`.
fn pause(first: u32, paused: &[&Facts], notice_ns: u64) -> Announcement {
    let mut notices: Vec<(EventId, Group, Vec<VmName>)> = Vec::new();
    for facts in paused {
        let known = notices
            .iter_mut()
            .find(|(_, group, _)| *group == facts.group);
        match known {
            Some((_, _, vms)) => vms.push(facts.name.clone()),
            None => {
                let number = first + u32::try_from(notices.len()).unwrap();
                notices.push((event(number), facts.group.clone(), vec![facts.name.clone()]));
            }
        }
    }
    Announcement {
        id: PauseId(format!("pause-{first}")),
        swap: SwapId(format!("swap-{first}")),
        description: "Virtual machine is being paused.".into(),
        notices,
        notice_ns,
        expected_ns: 5 * SECOND,
        no_notice: None,
    }
}

fn event(number: u32) -> EventId {
    EventId(format!("C7061BAC-AFDC-4513-B24B-AA5F13A{number:05}"))
}

fn get(board: &mut Board, facts: &Facts, now: u64) -> Answer {
    board.listen(&facts.name, &facts.group, now);
    answer::events(board, facts, Version::V2020_07, &[])
}

fn approve(board: &mut Board, facts: &Facts, number: u32, now: u64) -> Answer {
    let by = Approver::Vm(facts.name.clone());
    answer::approved(board.approve(&[event(number)], &facts.group, &by, now))
}

fn idle(incarnation: u64) -> String {
    format!("{{\"DocumentIncarnation\":{incarnation},\"Events\":[]}}")
}

#[test]
fn an_idle_document_is_the_same_over_a_hundred_polls() {
    let (mut board, web) = (Board::default(), facts("web", None));
    for poll in 0..100 {
        assert_eq!(get(&mut board, &web, START + poll * SECOND).body, idle(1));
    }
}

/// Each api-version's document, as it is committed.
#[test]
fn golden_documents_of_every_version() {
    let (mut board, a, b) = (
        Board::default(),
        facts("web-1", Some("web")),
        facts("web-2", Some("web")),
    );
    board.announce(pause(1, &[&a], MINUTE), START);
    board.start(&PauseId("pause-1".into()), START + MINUTE);
    board.announce(pause(2, &[&a, &b], 15 * MINUTE), START + MINUTE);
    let incarnation = board.incarnation(&a.name, &a.group);
    for (date, version) in VERSIONS {
        let text = document(incarnation, &board.seen_by(&a.group), version);
        let path = format!(
            "{}/src/metadata/golden/{date}.json",
            env!("CARGO_MANIFEST_DIR")
        );
        if std::env::var_os("STILLPOINT_WRITE_GOLDEN").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        assert_eq!(text, std::fs::read_to_string(&path).unwrap(), "{date}");
    }
}

#[test]
fn the_incarnation_counts_changes_and_the_id_stays() {
    let (mut board, web) = (Board::default(), facts("web", None));
    assert_eq!(get(&mut board, &web, START).etag, Some(1));
    let id = board.announce(pause(1, &[&web], 15 * MINUTE), START);
    let scheduled = get(&mut board, &web, START + SECOND);
    assert_eq!(scheduled.etag, Some(2));
    assert!(
        scheduled
            .body
            .contains("\"NotBefore\":\"Thu, 26 Sep 2019 15:15:21 GMT\"")
    );
    assert!(scheduled.body.contains("\"EventStatus\":\"Scheduled\""));
    assert_eq!(approve(&mut board, &web, 1, START + SECOND).status, 200);
    assert_eq!(
        get(&mut board, &web, START + SECOND),
        scheduled,
        "an approval changes nothing"
    );
    assert!(board.start(&id, START + 2 * SECOND));
    let started = get(&mut board, &web, START + 2 * SECOND);
    assert_eq!(started.etag, Some(3));
    assert!(started.body.contains("\"EventStatus\":\"Started\""));
    assert!(started.body.contains("\"NotBefore\":\"\""));
    for answer in [&scheduled, &started] {
        assert!(answer.body.contains(&event(1).to_string()));
        assert!(answer.body.contains("\"Resources\":[\"web\"]"));
    }
    board.end(&id, Measured::default(), START + 3 * SECOND);
    assert_eq!(get(&mut board, &web, START + 3 * SECOND).body, idle(4));
}

#[test]
fn nothing_starts_before_its_time_without_approval() {
    let (mut board, web) = (Board::default(), facts("web", None));
    // Not at a whole second: what the guest reads is rounded up.
    let announced = START + SECOND / 3;
    let id = board.announce(pause(1, &[&web], 15 * MINUTE), announced);
    let at = START / SECOND + 15 * 60 + 1;
    for now in [announced, announced + 15 * MINUTE, at * SECOND - 1] {
        assert_eq!(board.start_of(&id, now), Start::At(at));
        assert!(!board.start(&id, now));
    }
    assert!(board.start(&id, at * SECOND));
}

#[test]
fn an_approval_starts_it_and_may_be_given_again() {
    let (mut board, a, b) = (
        Board::default(),
        facts("a", Some("set")),
        facts("b", Some("set")),
    );
    let id = board.announce(pause(1, &[&a], 15 * MINUTE), START);
    // Any member of the set, whether it is paused or not, in either case.
    let lower = EventId(event(1).to_string().to_lowercase());
    let by = Approver::Vm(b.name.clone());
    board
        .approve(&[lower], &b.group, &by, START + SECOND)
        .unwrap();
    assert_eq!(approve(&mut board, &a, 1, START + 2 * SECOND).status, 200);
    let pause = board.of_vm(&a.name)[0];
    let approval = pause.notices[0].approval.as_ref().unwrap();
    assert_eq!(
        approval.by,
        Approver::Vm(b.name.clone()),
        "the first counts"
    );
    assert!(board.start(&id, START + 2 * SECOND));
    assert_eq!(approve(&mut board, &a, 1, START + 3 * SECOND).status, 200);
    board.end(&id, Measured::default(), START + 4 * SECOND);
    assert_eq!(approve(&mut board, &a, 1, START + 5 * SECOND).status, 200);
    assert_eq!(approve(&mut board, &a, 2, START + 5 * SECOND).status, 400);
}

#[test]
fn one_unknown_id_approves_none_of_them() {
    let (mut board, web) = (Board::default(), facts("web", None));
    let id = board.announce(pause(1, &[&web], 15 * MINUTE), START);
    let by = Approver::Vm(web.name.clone());
    let result = board.approve(&[event(1), event(9)], &web.group, &by, START);
    assert_eq!(result, Err(EventError::Unknown(event(9).to_string())));
    assert_ne!(board.start_of(&id, START), Start::Now);
}

#[test]
fn another_group_neither_sees_nor_approves() {
    let (mut board, a, stranger) = (Board::default(), facts("a", Some("s")), facts("s", None));
    let id = board.announce(pause(1, &[&a], 15 * MINUTE), START);
    assert_eq!(get(&mut board, &stranger, START).body, idle(1));
    assert_eq!(approve(&mut board, &stranger, 1, START).status, 400);
    assert_ne!(board.start_of(&id, START), Start::Now);
    assert!(
        answer::pauses(&board, &stranger)
            .body
            .contains("\"pauses\":[]")
    );
}

#[test]
fn all_tenants_of_a_host_approve_or_time_decides() {
    let (a, b) = (facts("a", None), facts("b", None));
    for both in [true, false] {
        let mut board = Board::default();
        let id = board.announce(pause(1, &[&a, &b], 15 * MINUTE), START);
        let seen = get(&mut board, &a, START).body;
        assert!(
            seen.contains("[\"a\"]") && !seen.contains("\"b\""),
            "{seen}"
        );
        assert_eq!(approve(&mut board, &a, 1, START).status, 200);
        assert!(!board.start(&id, START + SECOND), "one of two");
        if both {
            assert_eq!(approve(&mut board, &b, 2, START).status, 200);
            assert!(board.start(&id, START + SECOND));
        } else {
            assert!(!board.start(&id, START + 15 * MINUTE - 1));
            assert!(board.start(&id, START + 15 * MINUTE));
        }
    }
}

#[test]
fn a_cancelled_event_vanishes_and_never_starts() {
    let (mut board, web) = (Board::default(), facts("web", None));
    get(&mut board, &web, START);
    let id = board.announce(pause(1, &[&web], MINUTE), START);
    board
        .cancel(&event(1), "not today", START + SECOND)
        .unwrap();
    assert_eq!(get(&mut board, &web, START + SECOND).body, idle(3));
    assert_eq!(board.start_of(&id, START + 10 * MINUTE), Start::Never);
    assert!(!board.start(&id, START + 10 * MINUTE));
    let again = board.cancel(&event(1), "again", START + 2 * SECOND);
    assert_eq!(
        again,
        Err(EventError::Late(event(1), PauseState::Cancelled))
    );
    let id = board.announce(pause(2, &[&web], MINUTE), START);
    board.start(&id, START + MINUTE);
    let late = board.cancel(&event(2), "too late", START + MINUTE);
    assert_eq!(late, Err(EventError::Late(event(2), PauseState::Started)));
}

#[test]
fn whoever_asks_listens_for_a_day_and_counts_anew_after_it() {
    let (mut board, web, other) = (Board::default(), facts("web", None), facts("o", None));
    assert!(!board.is_heard(&web.group, START));
    let id = board.announce(pause(1, &[&web], 0), START);
    board.start(&id, START);
    assert_eq!(
        get(&mut board, &web, START).etag,
        Some(1),
        "what was before does not count"
    );
    assert!(board.is_heard(&web.group, START + LISTENS_NS - 1));
    assert!(!board.is_heard(&other.group, START));
    board.end(&id, Measured::default(), START + SECOND);
    assert_eq!(get(&mut board, &web, START + LISTENS_NS - 1).etag, Some(2));
    assert!(
        board.is_heard(&web.group, START + 2 * LISTENS_NS - 2),
        "each request renews it"
    );
    assert!(!board.is_heard(&web.group, START + 2 * LISTENS_NS));
    assert_eq!(get(&mut board, &web, START + 2 * LISTENS_NS).etag, Some(1));
}

#[test]
fn a_request_is_noted_once_a_minute() {
    let (mut board, web) = (Board::default(), facts("web", None));
    assert!(board.is_due(&web.name, &web.group, START));
    board.listen(&web.name, &web.group, START);
    assert!(!board.is_due(&web.name, &web.group, START + MINUTE - 1));
    assert!(board.is_due(&web.name, &web.group, START + MINUTE));
}

#[test]
fn a_board_is_what_its_changes_say() {
    let (mut board, a, b) = (Board::default(), facts("a", None), facts("b", None));
    let mut written = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut write = |board: &mut Board| {
        let changes = board.take_changes();
        written.0.extend(changes.groups);
        written.1.extend(changes.listeners);
        for id in changes.forgotten {
            written.2.remove(&id);
        }
        for vm in changes.gone {
            written.1.remove(&vm);
        }
        written
            .2
            .extend(changes.pauses.into_iter().map(|p| (p.id.clone(), p)));
        let (groups, listeners, pauses) = written.clone();
        let again = Board::from_parts(groups, listeners, pauses.into_values().collect());
        assert_eq!(again.revisions, board.revisions);
        assert_eq!(again.listeners, board.listeners);
        assert_eq!(again.pauses, board.pauses);
    };
    for number in 0..100 {
        let now = START + u64::from(number) * MINUTE;
        board.listen(&a.name, &a.group, now);
        write(&mut board);
        let id = board.announce(pause(2 * number, &[&a, &b], MINUTE), now);
        write(&mut board);
        approve(&mut board, &a, 2 * number, now);
        write(&mut board);
        board.start(&id, now + MINUTE);
        board.end(&id, Measured::default(), now + MINUTE);
        write(&mut board);
    }
    board.forget(&a.name);
    write(&mut board);
    assert_eq!(board.pauses.len(), KEPT, "the oldest are forgotten");
}

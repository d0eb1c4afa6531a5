//! What must be true, always or in the end.

use stateright::Property;
use stillpoint_control::ownership::Owner;

use crate::{At, Handover, PROCS, Record, State};

/// All of them.
pub(crate) fn all() -> Vec<Property<Handover>> {
    vec![
        Property::always("one process runs the guest", |_, s: &State| {
            s.procs.iter().filter(|p| p.at.runs()).count() <= 1
        }),
        Property::always("who runs the guest owns it by the word", |_, s: &State| {
            s.procs
                .iter()
                .filter(|p| p.at.runs())
                .all(|p| p.owner == Some(s.word))
        }),
        Property::always("no old state is run", |_, s: &State| !s.stale),
        Property::always("every execution ends", |_, s: &State| !s.went_back),
        Property::always("nothing is stranded", |m: &Handover, s: &State| {
            !ended(m, s) || s.procs.iter().any(|p| p.at.runs()) || lost_by_its_owner(s)
        }),
        Property::always("records are true", |m: &Handover, s: &State| {
            !ended(m, s) || records_are_true(s)
        }),
        // A model in which nothing happens would hold as well.
        Property::sometimes("a guest moves twice", |_, s: &State| {
            s.records == [Record::Moved; 2] && s.procs[2].at.runs()
        }),
        Property::sometimes("a guest is kept, and moves then", |_, s: &State| {
            s.records == [Record::Kept, Record::Moved]
        }),
    ]
}

/// Nothing goes on by itself any more.
fn ended(model: &Handover, state: &State) -> bool {
    let mut events = Vec::new();
    model.good_events(state, &mut events);
    events.is_empty()
}

/// A guest that doesn't run is lost if the process that owned it by the word has failed it, and
/// not by the daemon's hand; while it is between two, if both have.
fn lost_by_its_owner(state: &State) -> bool {
    let gone = |p: usize| {
        let proc = &state.procs[p];
        matches!(proc.at, At::Dead | At::Failed) || proc.hung
    };
    // A predecessor that hangs with its state sealed is relieved of the guest by the daemon, if that
    // has held the word all along.
    let stuck = |p: usize| state.procs[p].hung && !state.daemon.holds_word;
    match state.word {
        Owner::Held(_) | Owner::Taken(_) => {
            let owner = (0..PROCS).find(|&p| state.procs[p].owner == Some(state.word));
            owner.is_some_and(gone)
        }
        Owner::Sealed(_) | Owner::GivenUp(_) => {
            let Some((attempt, predecessor)) = state.attempt() else {
                return false;
            };
            gone(predecessor) && (gone(attempt + 1) || stuck(predecessor))
        }
        // The predecessor was late beyond any budget; a second fault took the successor.
        Owner::Revoked(_) => {
            let lost = |(attempt, predecessor)| gone(attempt + 1) || stuck(predecessor);
            state.attempt().is_some_and(lost)
        }
    }
}

/// What is on disk is so, when nothing goes on any more; what isn't known is not said to be over.
fn records_are_true(state: &State) -> bool {
    let Some((attempt, predecessor)) = state.attempt() else {
        return true;
    };
    let settled = |p: usize| state.procs[p].at.runs() || state.procs[p].at == At::Dead;
    match state.records[attempt] {
        Record::Moved => settled(attempt + 1),
        Record::Kept => settled(predecessor),
        Record::Crashed => !state.procs.iter().any(|p| p.at.runs()),
        // Somebody hangs, and may own the guest: the record says "in doubt" then.
        Record::InProgress => state.procs.iter().any(|p| p.hung && p.at.lives()),
        Record::NotBegun => true,
    }
}

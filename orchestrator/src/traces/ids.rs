//! Ids of traces and spans, made from the ids of what they tell of: whoever knows a record's id knows its span's.

use sha2::{Digest, Sha256};

use crate::model::{RolloutId, SwapId, SwapRecord};

/// A trace's id.
pub(crate) type TraceId = Vec<u8>;
/// A span's id.
pub(crate) type SpanId = Vec<u8>;

fn of(kind: &str, id: &str, bytes: usize) -> Vec<u8> {
    let digest = Sha256::new()
        .chain_update(kind)
        .chain_update([0])
        .chain_update(id)
        .finalize();
    let mut id = digest.as_slice()[..bytes].to_vec();
    // All zeros is no id; a digest never is, and this costs nothing.
    id[0] |= 1;
    id
}

/// The trace of a rollout, with all that is done for it.
pub(crate) fn rollout_trace(rollout: &RolloutId) -> TraceId {
    of("trace of rollout", &rollout.0, 16)
}

/// The trace of a swap that nothing else is the cause of.
fn swap_trace(swap: &SwapId) -> TraceId {
    of("trace of swap", &swap.0, 16)
}

/// A rollout as a whole.
pub(crate) fn rollout(rollout: &RolloutId) -> SpanId {
    of("rollout", &rollout.0, 8)
}

/// A step of a rollout: what came of one order, whose id is the swap's.
pub(crate) fn step(order: &SwapId) -> SpanId {
    of("step", &order.0, 8)
}

/// A swap.
pub(crate) fn swap(swap: &SwapId) -> SpanId {
    of("swap", &swap.0, 8)
}

/// A part of something, by a name of its own.
pub(crate) fn part(of_what: &SwapId, name: &str) -> SpanId {
    of(&format!("part {name}"), &of_what.0, 8)
}

/// The trace that a swap belongs to, and the span that it is a part of.
pub(crate) fn place(record: &SwapRecord) -> (TraceId, Option<SpanId>) {
    let cause = record.safeguards.way_back_of.as_ref();
    let parent = match (&record.part_of, cause, &record.rollout) {
        (Some(whole), ..) => Some(swap(whole)),
        (None, Some(first), _) => Some(swap(first)),
        (None, None, Some(_)) => Some(step(&record.id)),
        (None, None, None) => None,
    };
    let root = record.part_of.as_ref().or(cause).unwrap_or(&record.id);
    (trace(record.rollout.as_ref(), root), parent)
}

/// The trace of a swap that may be a rollout's.
pub(crate) fn trace(rollout: Option<&RolloutId>, swap: &SwapId) -> TraceId {
    rollout.map_or_else(|| swap_trace(swap), rollout_trace)
}

//! What is asked of all guests that take part, at once.

use std::time::Duration;

use stillpoint_control::client::{Client, ClientError};
use stillpoint_control::report::SwapReport;

use super::Part;
use crate::agent::find::FindError;
use crate::model::HostSwap;

/// How long a VMM may take to come to rest before its ceiling counts, and to measure afterwards.
const PATIENCE: Duration = Duration::from_secs(20);

/// Asks every guest's VMM the same, all at once; gives each one's answer, or what was wrong.
async fn ask_all<T: Send + 'static>(
    parts: &[Part],
    ask: impl Fn(&Client) -> Result<T, ClientError> + Clone + Send + 'static,
) -> Vec<Result<T, String>> {
    let one = |part: &Part| {
        let (expected, ask) = (part.expected.clone(), ask.clone());
        tokio::task::spawn_blocking(move || {
            let (client, _) = expected.greet()?;
            let asked = client.set_patience(PATIENCE).and_then(|()| ask(&client));
            asked.map_err(|error| expected.mute(error))
        })
    };
    let tasks: Vec<_> = parts.iter().map(one).collect();
    let mut answers = Vec::with_capacity(tasks.len());
    for task in tasks {
        answers.push(match task.await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(FindError::Mute {
                source: ClientError::Refused { message, .. },
                ..
            })) => Err(message),
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        });
    }
    answers
}

/// Whether all did; an error names the first that did not.
fn all(parts: &[Part], answers: Vec<Result<(), String>>, did_not: &str) -> Result<(), String> {
    let pairs = parts.iter().zip(answers);
    let mut failed = pairs.filter_map(|(part, answer)| Some((part, answer.err()?)));
    match failed.next() {
        None => Ok(()),
        Some((part, why)) => Err(format!("{} did not {did_not}: {why}", part.vm.name)),
    }
}

/// Freezes all guests.
pub(super) async fn freeze_all(swap: &HostSwap, parts: &[Part]) -> Result<(), String> {
    let (id, ceiling) = (swap.id.0.clone(), Duration::from_nanos(swap.budget_ns));
    let answers = ask_all(parts, move |client| client.freeze(&id, ceiling)).await;
    all(parts, answers, "stand still")
}

/// Freezes all guests, and has their processes let go of KVM; also those that were rebuilt and have
/// not run since.
pub(super) async fn detach_all(swap: &HostSwap, parts: &[Part]) -> Result<(), String> {
    let (id, ceiling) = (swap.id.0.clone(), Duration::from_nanos(swap.budget_ns));
    let answers = ask_all(parts, move |client| client.detach(&id, ceiling)).await;
    all(parts, answers, "let go of KVM")
}

/// Has the machines of all guests rebuilt that have let go of KVM.
pub(super) async fn rebuild_all(swap: &HostSwap, parts: &[Part]) -> Result<(), String> {
    let id = swap.id.0.clone();
    let answers = ask_all(parts, move |client| client.rebuild(&id)).await;
    all(parts, answers, "come back")
}

/// Stores all guests for a jump.
pub(in crate::execute) async fn store_all(
    swap: &HostSwap,
    parts: &[Part],
    nonce: &str,
) -> Result<(), String> {
    let (id, ceiling) = (swap.id.0.clone(), Duration::from_nanos(swap.budget_ns));
    let nonce = nonce.to_owned();
    let store = move |client: &Client| client.store(&id, &nonce, ceiling).map(drop);
    all(parts, ask_all(parts, store).await, "come to be stored")
}

/// Has all guests stand still through the jump, which comes now.
pub(in crate::execute) async fn await_jump_all(
    swap: &HostSwap,
    parts: &[Part],
    ceiling: Duration,
) -> Result<(), String> {
    let id = swap.id.0.clone();
    let answers = ask_all(parts, move |client| client.await_jump(&id, ceiling)).await;
    all(parts, answers, "stand still for the jump")
}

/// Has all guests run on; gives each one's report, or why there is none.
pub(in crate::execute) async fn resume_all(
    swap: &HostSwap,
    parts: &[Part],
) -> Vec<Result<SwapReport, String>> {
    let id = swap.id.0.clone();
    ask_all(parts, move |client| client.resume(&id)).await
}

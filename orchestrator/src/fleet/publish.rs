//! What this host says of itself and its guests, whenever that changes.
//!
//! Cards come before the word that the host is heard: whoever hears it knows its guests.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::member::Heard;
use super::record::{ComponentCard, HostCard, VmCard};
use super::{Fleet, HOSTS, VMS, keys, written};
use crate::agent::process::boot_id;
use crate::agent::{kernel_releases, kexec, kvm_releases};
use crate::execute::Host;
use crate::model::{
    HealthState, HostName, Moment, SwapRecord, SwapState, VmName, VmRecord, VmState, Wanted,
    kvm_release,
};
use crate::plan::rollout::seen::Health;
use crate::store::StoreError;
use crate::store::shared::{Change, Committed, Expect, Keep, SharedError};

/// Between two looks when nothing is heard.
const TICK: Duration = Duration::from_secs(1);
/// Events come in swarms.
const BREATH: Duration = Duration::from_millis(20);
/// Between two looks at what was said before.
const RETELL: Duration = Duration::from_secs(60);
/// Cards that go into one commit: etcd takes 128 changes.
const BATCH: usize = 100;
/// How long anybody waits for what is said.
const CATCH_UP: Duration = Duration::from_secs(3);

/// Asks the publisher for something to be said now. Clones ask the same.
#[derive(Clone, Debug)]
pub struct Publisher(mpsc::Sender<oneshot::Sender<()>>);

impl Publisher {
    /// Starts to say it, until the daemon ends.
    pub fn start(fleet: Fleet, host: Host) -> (Self, JoinHandle<()>) {
        let (asks, asked) = mpsc::channel(8);
        let task = tokio::spawn(publish(fleet, host, asked));
        (Self(asks), task)
    }

    /// Returns when all that was so before is said, or could not be.
    pub async fn catch_up(&self) {
        let (said, heard) = oneshot::channel();
        if self.0.send(said).await.is_ok() {
            let _ = tokio::time::timeout(CATCH_UP, heard).await;
        }
    }
}

async fn publish(fleet: Fleet, host: Host, mut asked: mpsc::Receiver<oneshot::Sender<()>>) {
    let mut asking: Vec<oneshot::Sender<()>> = Vec::new();
    let mut heard = Heard::new();
    let mut said: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut is_known = false;
    let mut quiet = false;
    let mut listed = Instant::now();
    let mut events = host.events.subscribe();
    loop {
        if listed.elapsed() > RETELL {
            // A store that was put back from a backup knows less than was said.
            is_known = false;
            listed = Instant::now();
        }
        match say(&fleet, &host, &mut said, &mut is_known, &mut heard).await {
            Ok(()) => quiet = false,
            Err(error) => {
                // What was said may be gone with whoever was told.
                is_known = false;
                if !std::mem::replace(&mut quiet, true) {
                    tracing::warn!("the fleet does not hear of this host: {error}");
                }
            }
        }
        for said in asking.drain(..) {
            // Whoever asked may have gone.
            let _ = said.send(());
        }
        tokio::select! {
            () = tokio::time::sleep(TICK) => {}
            Some(ask) = asked.recv() => asking.push(ask),
            _ = events.recv() => {
                tokio::time::sleep(BREATH).await;
                events = events.resubscribe();
            }
        }
    }
}

async fn say(
    fleet: &Fleet,
    host: &Host,
    said: &mut BTreeMap<String, Vec<u8>>,
    is_known: &mut bool,
    heard: &mut Heard,
) -> Result<(), SharedError> {
    if !heard.claim(fleet).await? {
        *is_known = false;
        return Ok(());
    }
    let guard = fleet.name_guard();
    if !*is_known {
        // What a daemon before this one said, also of guests that are gone.
        said.clear();
        let prefix = keys::guests(VMS, &fleet.me);
        for entry in fleet.shared.list(&prefix).await?.entries {
            said.insert(entry.key, entry.value);
        }
        *is_known = true;
    }
    let now = cards(&fleet.me, host, fleet).await?;
    let put = now
        .iter()
        .filter(|(key, card)| said.get(*key) != Some(card));
    let put = put
        .map(|(key, card)| Change::keep(key.clone(), Expect::Anything, card.clone(), Keep::Retold));
    let gone = said.keys().filter(|key| !now.contains_key(*key));
    let gone = gone.map(|key| Change::remove(key.clone(), Expect::Anything));
    let changes: Vec<Change> = put.chain(gone).collect();
    for batch in changes.chunks(BATCH) {
        let done = fleet.shared.commit(batch.to_vec(), guard.as_ref()).await?;
        if done == Committed::Refused {
            // The name is another's by now.
            *is_known = false;
            return Ok(());
        }
    }
    *said = now;
    heard.say(fleet).await
}

async fn cards(
    me: &HostName,
    host: &Host,
    fleet: &Fleet,
) -> Result<BTreeMap<String, Vec<u8>>, StoreError> {
    let releases = host.store.releases().await?;
    let kvm = ComponentCard {
        runs: kvm_release(&host.store.host_swaps().await?, &boot_id()),
        releases: kvm_releases::versions(&host.kvm_dir),
    };
    let kernel = ComponentCard {
        runs: kexec::running(),
        releases: kernel_releases::versions(&host.boot_dir),
    };
    let card = HostCard {
        zone: fleet.stands.zone.clone(),
        fault_domain: fleet.stands.fault_domain.clone(),
        labels: fleet.stands.labels.clone(),
        releases: releases
            .into_iter()
            .map(|release| release.manifest.version)
            .collect(),
        kvm,
        kernel,
        daemon: env!("CARGO_PKG_VERSION").into(),
    };
    let mut cards = BTreeMap::from([(keys::of_host(HOSTS, me), written(&card))]);
    let mut last: BTreeMap<VmName, SwapRecord> = BTreeMap::new();
    for swap in host.store.last_swaps().await? {
        last.insert(swap.vm.clone(), swap);
    }
    for vm in host.store.vms().await? {
        let card = vm_card(&vm, last.get(&vm.name));
        cards.insert(keys::of_vm(VMS, me, &vm.name), written(&card));
    }
    Ok(cards)
}

/// What is said of a guest, from its record and its last swap.
fn vm_card(vm: &VmRecord, last: Option<&SwapRecord>) -> VmCard {
    let open = last.filter(|swap| !swap.state.is_over());
    // Of a swap that is over, and of which the guest is still where it brought it.
    let unwell = last.and_then(|swap| {
        let health = swap.safeguards.health.as_ref()?;
        let is_there = swap.state == SwapState::Moved && swap.to.version == vm.release;
        (is_there && health.state == HealthState::Unwell).then_some(health)
    });
    let (health, since, ailment) = match vm.state {
        VmState::Running | VmState::Swapping => match unwell {
            Some(unwell) => (
                Health::Ill,
                unwell.since_unix_ns,
                Some(unwell.problems.join("; ")),
            ),
            None => (Health::Well, vm.changed_at_unix_ns, None),
        },
        VmState::Stopped => (Health::Off, vm.changed_at_unix_ns, None),
        VmState::Failed | VmState::Crashed if vm.wanted == Wanted::Stopped => {
            (Health::Off, vm.changed_at_unix_ns, None)
        }
        _ => (Health::Ill, vm.changed_at_unix_ns, vm.reason.clone()),
    };
    VmCard {
        set: vm.profile.availability_set.clone(),
        domain: vm.profile.update_domain,
        state: vm.state,
        release: vm.release.clone(),
        health,
        ailment,
        since: Moment(since),
        swap: open.map(|swap| swap.id.clone()),
        busy: vm.state == VmState::Starting
            || (vm.wanted == Wanted::Stopped && vm.state.is_active()),
    }
}

//! KVM's modules, exchanged while guests stand still that have let go of KVM.
//!
//! ```text
//!  detached ▶ unload ▶ load the new ones ▶ rebuild every guest ▶ (resume)
//!                │          │                  │
//!                └──────────┴────── fails ─────┴──▶ detach again ▶ unload ▶ load the old ones ▶ rebuild
//! ```
//!
//! A guest that was rebuilt has not run: so all of them come back on the new modules, or all on the old
//! ones. The way back is not bound by the budget, as a guest can't run on without KVM; each VMM keeps trying
//! by itself from its ceiling on, so nothing here is needed but the modules.

use std::time::{Duration, Instant};

use super::guests::{detach_all, rebuild_all};
use super::{Part, Stood, command_deadline, run_command, undo};
use crate::agent::modules::{self, ModulesError};
use crate::execute::Host;
use crate::model::{CameBackOn, HostSwap, KvmSwap, Module};

/// Between two tries to have guests rebuilt.
const GLANCE: Duration = Duration::from_millis(50);
/// How long the way back waits for the new modules' last user.
const BACK_PATIENCE: Duration = Duration::from_secs(10);
/// How long guests may take to come back on the old modules before that is told.
const REBUILD_PATIENCE: Duration = Duration::from_secs(10);

/// Exchanges them, and has the guests rebuilt; they are to run on afterwards, whatever came of it.
pub(super) async fn stand_apart(
    host: &Host,
    swap: &mut HostSwap,
    modules: &KvmSwap,
    parts: &[Part],
) -> Stood {
    let deadline = command_deadline(swap);
    let mut account = Account::default();
    let mut stood = match swap.command.is_empty() {
        true => Stood {
            reason: exchange(host, swap, modules, &mut account, deadline.into_std())
                .await
                .err(),
            ended: None,
            output: String::new(),
        },
        false => run_command(host, swap, deadline).await,
    };
    if stood.reason.is_none() {
        step(host, swap, "rebuild");
        let rebuilt = rebuild_until(swap, parts, deadline.into_std()).await;
        account.add("rebuild the guests");
        stood.reason = rebuilt.err();
    }
    let mut came_back_on = Some(CameBackOn::New);
    if stood.reason.is_some() {
        // Of a command without an undo nobody knows what it left.
        let is_known = swap.command.is_empty() || swap.undo.is_some();
        came_back_on = is_known.then_some(CameBackOn::Old);
        // What is left undone by this is said, and the guests keep trying by themselves.
        if let Err(why) = go_back(host, swap, modules, parts, &mut account).await {
            let first = stood.reason.take().unwrap_or_default();
            stood.reason = Some(format!("{first}; and the way back: {why}"));
            came_back_on = None;
        }
        stood.output = std::mem::take(&mut swap.output);
    }
    if let Some(kvm) = &mut swap.kvm {
        kvm.came_back_on = came_back_on;
    }
    stood.output.push_str(&account.0);
    stood
}

/// After the death of a daemon in the middle: puts back whatever is not loaded.
pub(super) async fn see_that_it_is_there(modules: &KvmSwap) {
    if std::path::Path::new("/dev/kvm").exists() {
        return;
    }
    if let Err(why) = put_back(&modules.before).await {
        tracing::error!("KVM is not there, and its modules can't be loaded: {why}");
    }
}

/// What was done, each with the time it took, for people.
struct Account(String, Instant);

impl Default for Account {
    fn default() -> Self {
        Self(String::new(), Instant::now())
    }
}

impl Account {
    fn add(&mut self, what: &str) {
        let took = self.1.elapsed();
        self.1 = Instant::now();
        self.0.push_str(&format!("{what}: {took:.1?}\n"));
    }
}

fn step(host: &Host, swap: &mut HostSwap, name: &str) {
    swap.step = name.into();
    host.tell_host_swap(swap);
}

async fn exchange(
    host: &Host,
    swap: &mut HostSwap,
    modules: &KvmSwap,
    account: &mut Account,
    deadline: Instant,
) -> Result<(), String> {
    step(host, swap, "unload KVM's modules");
    let unloaded = unload(&modules.before, deadline).await;
    account.add("unload the modules that were there");
    unloaded?;
    step(host, swap, "load KVM's modules");
    let loaded = load(&modules.to).await;
    account.add("load the new ones");
    loaded
}

/// Until then at the longest: a new `/dev/kvm` may not be everybody's at once (udev sets its mode).
async fn rebuild_until(swap: &HostSwap, parts: &[Part], deadline: Instant) -> Result<(), String> {
    loop {
        match rebuild_all(swap, parts).await {
            Err(why) if Instant::now() >= deadline => return Err(why),
            Err(_) => tokio::time::sleep(GLANCE).await,
            Ok(()) => return Ok(()),
        }
    }
}

/// Puts back what was there.
async fn go_back(
    host: &Host,
    swap: &mut HostSwap,
    modules: &KvmSwap,
    parts: &[Part],
    account: &mut Account,
) -> Result<(), String> {
    let detached = detach_all(swap, parts).await;
    let mut problem = detached.err();
    if swap.command.is_empty() {
        step(host, swap, "put back KVM's modules");
        let unloaded = unload(&modules.to, Instant::now() + BACK_PATIENCE).await;
        let loaded = put_back(&modules.before).await;
        account.add("put back the modules that were there");
        problem = problem.or(unloaded.err()).or(loaded.err());
    } else {
        undo(host, swap).await;
        account.add("undo");
        let failed = swap.undone.as_ref().filter(|ended| !ended.is_success());
        problem = problem.or(failed.map(|ended| format!("the undo: {ended}")));
    }
    let rebuilt = rebuild_until(swap, parts, Instant::now() + REBUILD_PATIENCE).await;
    account.add("rebuild the guests");
    match problem.or(rebuilt.err()) {
        Some(why) => Err(why),
        None => Ok(()),
    }
}

async fn unload(modules: &[Module], deadline: Instant) -> Result<(), String> {
    let modules = modules.to_vec();
    blocking(move || modules::unload(&modules, deadline)).await
}

async fn load(modules: &[Module]) -> Result<(), String> {
    let modules = modules.to_vec();
    blocking(move || modules::load(&modules)).await
}

async fn put_back(modules: &[Module]) -> Result<(), String> {
    let modules = modules.to_vec();
    blocking(move || modules::put_back(&modules)).await
}

async fn blocking(
    what: impl FnOnce() -> Result<(), ModulesError> + Send + 'static,
) -> Result<(), String> {
    let done = tokio::task::spawn_blocking(what).await;
    done.map_err(|error| error.to_string())?
        .map_err(|error| error.to_string())
}

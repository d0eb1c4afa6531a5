//! Ends the VMM of a VM, because its owner wants it off.

use std::time::Duration;

use super::Host;
use crate::agent::find::Held;
use crate::model::VmRecord;

/// How long a VMM may take to end after it was told to.
const PATIENCE: Duration = Duration::from_secs(10);

/// Powers it off; kills it if it doesn't end in time. It is dead afterwards.
pub async fn power_off(host: &Host, vm: &VmRecord, held: &Held) {
    if let Err(error) = host.expected(vm).power_off().await {
        tracing::warn!(vm = %vm.name, "asking to power off: {error}");
    }
    if !held.process.ends_within(PATIENCE).await {
        tracing::warn!(vm = %vm.name, "did not end within {PATIENCE:?}: killed");
        held.process.kill().await;
    }
}

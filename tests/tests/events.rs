//! Guests' events with a real VMM and the real agent: what the demo shows is so.

use std::process::Command;

use anyhow::ensure;
use stillpoint_tests::daemon::programs;
use stillpoint_tests::needs_kvm;

/// The agent runs its hooks and approves, the guest is swapped; a pause is withdrawn; one comes without
/// notice; and host and guest have the same of all three on record.
#[test]
fn announced_approved_withdrawn_and_urgent() -> anyhow::Result<()> {
    needs_kvm!();
    let output = Command::new(programs().join("demo-events")).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}\n{error}");
    ensure!(said.contains("All of it true"), "{said}");
    Ok(())
}

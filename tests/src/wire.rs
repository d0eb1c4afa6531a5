//! A wire of the test's own on which every frame comes back: a tap, in a bridge that sends out
//! again where it came in (hairpin). No program is needed at the other end.

use std::path::Path;
use std::process::Command;

use anyhow::ensure;

use crate::ground;

/// Set in the process in which a test runs.
const INSIDE: &str = "STILLPOINT_TEST_WIRE";

/// The tap's name.
pub const TAP: &str = "t0";

const MAKE: &str = "set -e
ip tuntap add dev t0 mode tap multi_queue
ip link add b0 type bridge
ip link set t0 master b0
ip link set t0 type bridge_slave hairpin on
ip link set b0 up
ip link set t0 up";

/// Why there can be no such wire; `None` if there can.
pub fn no_wire() -> Option<String> {
    let tried = Command::new("unshare")
        .args(["-n", "sh", "-c", MAKE])
        .output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!(
            "a tap in a bridge: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(error) => Some(format!("unshare: {error}")),
    }
}

/// Whether this process is beside such a wire.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// A program, to be run beside such a wire.
pub fn beside(program: &Path) -> Command {
    let script = format!("{MAKE}\nexec \"$@\"");
    let mut command = Command::new("unshare");
    command
        .args(["-n", "sh", "-c", &script, "sh"])
        .arg(program)
        .env(INSIDE, "1");
    command
}

/// Runs the test `name` once more, in a process of its own beside such a wire. Gives whether this
/// is that process; in the other one the test is done by then, or skipped.
pub fn is_beside(name: &str) -> anyhow::Result<bool> {
    if is_inside() {
        return Ok(true);
    }
    if let Some(reason) = no_wire() {
        ground::skip(&reason);
        return Ok(false);
    }
    let output = beside(&std::env::current_exe()?)
        .args(["--exact", name, "--nocapture"])
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    // A name that is none would run no test, and succeed.
    let passed = output.status.success() && said.contains("1 passed");
    ensure!(passed, "{said}\n{error}");
    Ok(false)
}

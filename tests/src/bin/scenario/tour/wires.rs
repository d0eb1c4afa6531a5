//! The host's network, which ends with each kernel and is made anew under the next: a bridge with the way out
//! and the guests' taps.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use stillpoint_tests::rig::order::{ORDER, Order, Outside};

use super::guests::Debian;

/// The host's address in QEMU's user network.
const HOST: &str = "10.0.2.15/24";

fn busybox(words: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("/bin/busybox").args(words).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{words:?}: {said}");
    Ok(())
}

/// Makes it.
pub(super) fn connect(guests: &[Debian]) -> anyhow::Result<()> {
    busybox(&["brctl", "addbr", "br0"])?;
    busybox(&["brctl", "addif", "br0", "eth0"])?;
    busybox(&["ip", "link", "set", "eth0", "up"])?;
    for guest in guests {
        let tap = guest.tap();
        busybox(&["tunctl", "-t", &tap])?;
        busybox(&["brctl", "addif", "br0", &tap])?;
        busybox(&["ip", "link", "set", &tap, "up"])?;
    }
    busybox(&["ip", "addr", "add", HOST, "dev", "br0"])?;
    busybox(&["ip", "link", "set", "br0", "up"])
}

/// Who is outside.
pub(super) fn outside() -> anyhow::Result<Outside> {
    let order: Order = serde_json::from_slice(&std::fs::read(ORDER).context(ORDER)?)?;
    order
        .outside
        .context("this host has nobody outside: give the rig `--peer`")
}

/// KVM's modules where a distribution has them.
pub(super) fn lay_out_modules() -> anyhow::Result<()> {
    let running = rustix::system::uname();
    let folder = Path::new("/lib/modules").join(running.release().to_str()?);
    std::fs::create_dir_all(&folder)?;
    for name in ["kvm.ko", "kvm_amd.ko"] {
        let from = Path::new("/lib/modules").join(name);
        std::fs::copy(&from, folder.join(name)).context(from.display().to_string())?;
    }
    Ok(())
}

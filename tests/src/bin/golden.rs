//! `make golden`: writes golden states anew, by a real guest with devices of all kinds at work. A format
//! or a release that is there already is kept as it is: what was released does not change.

use anyhow::ensure;
use stillpoint_state::golden::{from_text, to_text};
use stillpoint_state::sections::VIRTIO_FORMAT;
use stillpoint_tests::furnished::Furnished;
use stillpoint_tests::releases::{Release, root};
use stillpoint_tests::saved::state_of;
use stillpoint_tests::vm::{Recipe, Vm};
use stillpoint_tests::wire;

/// Stands for: the newest format, by a guest with every kind of device.
const ALL_KINDS: u32 = u32::MAX;

fn main() -> anyhow::Result<()> {
    if !wire::is_inside() {
        let status = wire::beside(&std::env::current_exe()?).status()?;
        ensure!(status.success(), "beside a wire: {status}");
        return Ok(());
    }
    let dir = root().join("vmm/state/golden");
    std::fs::create_dir_all(&dir)?;
    let wanted = [
        (Release::Compat, 1),
        (Release::Current, 1),
        (Release::Current, 2),
        (Release::Current, VIRTIO_FORMAT),
        (Release::Current, ALL_KINDS),
    ];
    for (release, format) in wanted {
        let version = release.version();
        // The first of format 3 has neither a vmclock nor an entropy device at work.
        let all_kinds = format == ALL_KINDS;
        let (format, which) = match all_kinds {
            true => (VIRTIO_FORMAT, "-all-kinds"),
            false => (format, ""),
        };
        let path = dir.join(format!("{version}-format-{format}{which}.golden"));
        if path.exists() {
            println!("{} is there", path.display());
            continue;
        }
        let devices = format >= VIRTIO_FORMAT;
        let bytes = if devices {
            let mut guest = Furnished::boot(release, true)?;
            guest.send()?;
            let bytes = state_of(&guest.vm, format)?.bytes;
            guest.receive()?;
            guest.end()?;
            bytes
        } else {
            let vm = Vm::up(&Recipe {
                release,
                ..Recipe::pulse(2, "ram=2M duty=50")
            })?;
            let bytes = state_of(&vm, format)?.bytes;
            vm.is_well()?;
            vm.power_off()?;
            bytes
        };
        let about = format!(
            "Release {version}, state format {format}: pulse, {}.",
            if devices {
                "5 vCPUs, a disk, a network interface, sockets with two connections, entropy, vmclock, a viewer at the console"
            } else {
                "2 vCPUs, no virtio devices"
            }
        );
        let text = to_text(&about, &bytes);
        ensure!(from_text(&text)? == bytes, "not the same again");
        std::fs::write(&path, text)?;
        println!("{}: {} bytes", path.display(), bytes.len());
    }
    Ok(())
}

//! `make golden`: writes golden states anew, by a real guest with devices of all kinds at work. A format
//! or a release that is there already is kept as it is: what was released does not change.
//!
//! The state is taken by a successor of few words: it adopts nothing, asks for the format that is
//! wanted, reads what was saved, and refuses.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use stillpoint_control::message::{Handover, Request};
use stillpoint_control::report::ReleaseName;
use stillpoint_state::golden::{from_text, to_text};
use stillpoint_state::sections::VIRTIO_FORMAT;
use stillpoint_tests::furnished::Furnished;
use stillpoint_tests::patience::PATIENCE;
use stillpoint_tests::releases::{Release, root};
use stillpoint_tests::vm::{Recipe, Vm};
use stillpoint_tests::wire;
use stillpoint_vmm::handover::{Adopted, Body, Channel};

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
    ];
    for (release, format) in wanted {
        let version = release.version();
        let path = dir.join(format!("{version}-format-{format}.golden"));
        if path.exists() {
            println!("{} is there", path.display());
            continue;
        }
        let devices = format >= VIRTIO_FORMAT;
        let bytes = if devices {
            let mut guest = Furnished::boot(release, true)?;
            guest.send()?;
            let bytes = state_of(&guest.vm, format)?;
            guest.receive()?;
            guest.end()?;
            bytes
        } else {
            let vm = Vm::up(&Recipe {
                release,
                ..Recipe::pulse(2, "ram=2M duty=50")
            })?;
            let bytes = state_of(&vm, format)?;
            vm.is_well()?;
            vm.power_off()?;
            bytes
        };
        let about = format!(
            "Release {version}, state format {format}: pulse, {}.",
            if devices {
                "4 vCPUs, a disk, a network interface, sockets with two connections, entropy"
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

/// Has the VMM save its guest in `format`. The guest stays.
fn state_of(vm: &Vm, format: u32) -> anyhow::Result<Vec<u8>> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let state = rustix::fs::memfd_create("stillpoint-state", flags)?;
    let request = Request::HandOver {
        swap: "golden".into(),
        to: ReleaseName::default(),
        budget_ns: Some(u64::try_from(Duration::from_secs(20).as_nanos())?),
        brownout: PATIENCE,
        clock: None,
    };
    let client = vm.client()?;
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| client.hand_over(&request, theirs, state.as_fd(), |_| {}));
        let saved = save(ours, &state, format);
        match asked.join() {
            Ok(Ok(Handover::Kept { .. })) => saved,
            other => bail!("the guest was to stay: {other:?}; {saved:?}"),
        }
    })
}

fn save(socket: OwnedFd, state: &OwnedFd, format: u32) -> anyhow::Result<Vec<u8>> {
    let mut channel = Channel::new(socket);
    let populated = 0;
    loop {
        let (body, _) = channel.receive(Instant::now() + PATIENCE)?;
        match body {
            Body::Offer(offer) => {
                let there = offer.formats.contains(&format);
                ensure!(there, "format {format} is not among {:?}", offer.formats);
                channel.send(
                    Body::Adopted(Adopted {
                        format,
                        populated,
                        hold: false,
                    }),
                    &[],
                )?;
            }
            Body::Files(_) => {}
            Body::State(saved) => {
                let mut bytes = vec![0; usize::try_from(saved.len)?];
                let n = rustix::io::pread(state, &mut bytes, 0)?;
                channel.refuse("the state was all that was wanted");
                bytes.truncate(n);
                return Ok(bytes);
            }
            other => bail!("unexpected: {other:?}"),
        }
    }
}

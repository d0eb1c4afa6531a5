//! A guest's saved state, taken by a successor of few words: it adopts nothing, asks for the format that
//! is wanted, reads what was saved, and refuses. The guest stays.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use stillpoint_control::message::{Handover, Request};
use stillpoint_control::report::ReleaseName;
use stillpoint_vmm::handover::{Adopted, Body, Channel, Offer};

use crate::patience::PATIENCE;
use crate::vm::Vm;

/// What a predecessor said and saved.
#[derive(Clone, Debug)]
pub struct Saved {
    /// What it offered.
    pub offer: Offer,
    /// Whether it said beforehand that the state comes.
    pub announced: bool,
    /// The state.
    pub bytes: Vec<u8>,
}

/// Has the VMM save its guest in `format`. The guest stays.
pub fn state_of(vm: &Vm, format: u32) -> anyhow::Result<Saved> {
    let wanted = Adopted {
        format,
        ..Adopted::default()
    };
    state_for(vm, wanted)
}

/// The same, for a successor that says so much of itself.
pub fn state_for(vm: &Vm, wanted: Adopted) -> anyhow::Result<Saved> {
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
        let saved = save(ours, &state, wanted);
        match asked.join() {
            Ok(Ok(Handover::Kept { .. })) => saved,
            other => bail!("the guest was to stay: {other:?}; {saved:?}"),
        }
    })
}

fn save(socket: OwnedFd, state: &OwnedFd, wanted: Adopted) -> anyhow::Result<Saved> {
    let mut channel = Channel::new(socket);
    let (mut offered, mut announced) = (None, false);
    loop {
        let (body, _) = channel.receive(Instant::now() + PATIENCE)?;
        match body {
            Body::Offer(offer) => {
                let (there, format) = (&offer.formats, wanted.format);
                ensure!(
                    there.contains(&format),
                    "format {format} is not among {there:?}"
                );
                channel.send(Body::Adopted(wanted.clone()), &[])?;
                offered = Some(offer);
            }
            Body::Files(_) => {}
            Body::Soon(_) => announced = true,
            Body::State(saved) => {
                let mut bytes = vec![0; usize::try_from(saved.len)?];
                let n = rustix::io::pread(state, &mut bytes, 0)?;
                channel.refuse("the state was all that was wanted");
                bytes.truncate(n);
                let offer = offered.context("a state without an offer")?;
                return Ok(Saved {
                    offer,
                    announced,
                    bytes,
                });
            }
            other => bail!("unexpected: {other:?}"),
        }
    }
}

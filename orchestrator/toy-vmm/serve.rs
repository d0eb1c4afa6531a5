//! The control socket, and a console that says hello.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use stillpoint_control::frame;
use stillpoint_control::message::{Description, GuestState, PROTOCOL, ProcessId, Reply, Request};

use super::{Toy, handover, lock, standstill};

/// Serves until the process ends.
pub(super) fn serve(toy: Arc<Toy>) -> anyhow::Result<()> {
    let console = UnixListener::from(toy.console.try_clone()?);
    std::thread::spawn(move || {
        for client in console.incoming().flatten() {
            let mut client = client;
            let _ = client.write_all(b"hello from the toy\n");
        }
    });
    loop {
        let client = rustix::net::accept(&toy.control)?;
        let toy = toy.clone();
        std::thread::spawn(move || while answer(&toy, &client).is_ok() {});
    }
}

fn answer(toy: &Arc<Toy>, client: &OwnedFd) -> anyhow::Result<()> {
    let (request, fds): (Request, _) = frame::receive_json(client)?;
    let reply = match request {
        Request::Hello { nonce } => Reply::Identity {
            protocol: PROTOCOL,
            name: toy.spec.name.clone(),
            process: ProcessId::of(std::process::id())
                .ok_or_else(|| anyhow::anyhow!("no /proc"))?,
            proof: toy.secret.prove(&nonce),
        },
        Request::Describe => Reply::Description(Box::new(describe(toy)?)),
        Request::LendGuest => {
            let lent = [toy.memory.as_fd(), toy.ownership.as_fd()];
            return Ok(frame::send_json(client, &Reply::Guest, &lent)?);
        }
        Request::PowerOff => {
            frame::send_json(client, &Reply::Done, &[])?;
            let _ = std::fs::remove_file(toy.dir.join("control.sock"));
            leave(0)
        }
        Request::LastReport => Reply::Report {
            report: lock(&toy.now).report.clone().map(Box::new),
        },
        // A toy's guest has no driver for its power button.
        Request::PressPowerButton => Reply::Pressed { heard: false },
        Request::HandOver { .. } => handover::offer(toy, client, request, fds)?,
        Request::Detach { swap, .. } => standstill::detach(toy, swap),
        Request::Rebuild { swap } => standstill::rebuild(toy, &swap),
        Request::Resume { swap } => standstill::resume(toy, &swap),
        // As of a release that does not know them yet.
        Request::Rehearse { .. }
        | Request::Signs
        | Request::Freeze { .. }
        | Request::Store { .. }
        | Request::AwaitJump { .. } => Reply::Error {
            code: "bad_request".into(),
            message: "not a request of this protocol".into(),
        },
    };
    Ok(frame::send_json(client, &reply, &[])?)
}

fn describe(toy: &Toy) -> anyhow::Result<Description> {
    let now = lock(&toy.now);
    let said = super::marker()?;
    Ok(Description {
        spec: toy.spec.clone(),
        release: toy.release.clone(),
        state: if now.swapping {
            GuestState::Swapping
        } else {
            GuestState::Running
        },
        epoch: now.owner.epoch(),
        swaps: now.swaps,
        reads: serde_json::from_value(said["reads"].clone())?,
        writes: serde_json::from_value(said["writes"].clone())?,
        last_swap: now.report.as_ref().map(|report| report.swap.clone()),
    })
}

/// Ends the process at once.
pub(super) fn leave(code: i32) -> ! {
    #[allow(clippy::exit)] // From a thread that serves a client; there is nothing to unwind.
    std::process::exit(code)
}

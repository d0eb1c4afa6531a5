//! The control socket: one thread that lets callers in, and one for each caller.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use rustix::net::SocketFlags;
use stillpoint_control::frame;
use stillpoint_control::message::{GuestState, Reply, Request};

use super::desk::Desk;
use crate::event::{Event, Job};
use crate::handover::correct;
use crate::{handover, peer};

/// The most callers at a time.
const MAX_CALLERS: usize = 32;
/// How often a door that somebody knocks at looks whether it is open.
const GLANCE: Duration = Duration::from_millis(20);
/// As good as never.
const FAR: Duration = Duration::from_secs(3600);

/// Starts serving.
pub(super) fn start(
    listener: OwnedFd,
    desk: Arc<Desk>,
    events: Sender<Event>,
) -> std::io::Result<()> {
    rustix::io::ioctl_fionbio(&listener, true)?;
    let callers = Arc::new(AtomicUsize::new(0));
    Builder::new()
        .name("control".into())
        .spawn(move || {
            loop {
                // However long nobody does: a guest that sleeps costs its host nothing.
                let knocks = handover::wait_readable(&listener, Instant::now() + FAR);
                let may_enter = knocks && desk.is_open();
                match may_enter.then(|| accept(&listener)).flatten() {
                    Some(caller) => admit(caller, &desk, &events, &callers),
                    // Callers wait in the backlog while the guest is handed over, or while there is
                    // no file descriptor for them: not at the cost of the guest's core.
                    None => std::thread::sleep(GLANCE),
                }
            }
        })
        .map(drop)
}

fn accept(listener: &OwnedFd) -> Option<OwnedFd> {
    rustix::net::accept_with(listener, SocketFlags::CLOEXEC).ok()
}

fn admit(caller: OwnedFd, desk: &Arc<Desk>, events: &Sender<Event>, callers: &Arc<AtomicUsize>) {
    if !peer::may_enter(&caller) || callers.load(Ordering::SeqCst) >= MAX_CALLERS {
        return;
    }
    callers.fetch_add(1, Ordering::SeqCst);
    let (desk, events, callers_of_thread) = (Arc::clone(desk), events.clone(), Arc::clone(callers));
    let spawned = Builder::new().name("caller".into()).spawn(move || {
        while answer(&caller, &desk, &events) {}
        callers_of_thread.fetch_sub(1, Ordering::SeqCst);
    });
    if spawned.is_err() {
        callers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Answers one request; false when the caller is gone.
fn answer(caller: &OwnedFd, desk: &Desk, events: &Sender<Event>) -> bool {
    let (request, fds) = match frame::receive_json::<Request>(caller) {
        Ok(received) => received,
        Err(frame::FrameError::Malformed(error)) => {
            let message = format!("not a request of this protocol: {error}");
            let reply = Reply::Error {
                code: "bad_request".into(),
                message,
            };
            return frame::send_json(caller, &reply, &[]).is_ok();
        }
        Err(_) => return false,
    };
    let sent = match request {
        Request::Hello { nonce } => frame::send_json(caller, &desk.identity(&nonce), &[]),
        Request::Describe => frame::send_json(caller, &desk.describe(), &[]),
        Request::LastReport => frame::send_json(caller, &desk.last_report(), &[]),
        Request::LendGuest => frame::send_json(caller, &Reply::Guest, &desk.lent()),
        Request::PressPowerButton
        | Request::PowerOff
        | Request::HandOver { .. }
        | Request::Freeze { .. }
        | Request::Detach { .. }
        | Request::Rebuild { .. }
        | Request::Store { .. }
        | Request::AwaitJump { .. }
        | Request::Resume { .. }
        | Request::Rehearse { .. } => {
            return change(caller, desk, events, request, fds);
        }
        Request::Signs => return signs(caller, desk, events),
    };
    sent.is_ok()
}

/// Signs of life: the machine's from its thread, the agent's from here, where nobody waits for it.
fn signs(caller: &OwnedFd, desk: &Desk, events: &Sender<Event>) -> bool {
    let (reply, replies) = channel();
    let asked = events.send(Event::Control(Job {
        request: Request::Signs,
        fds: Vec::new(),
        reply,
        told: None,
    }));
    if asked.is_err() {
        return false;
    }
    let said = match replies.recv() {
        Ok(Reply::Signs(mut signs)) => {
            signs.agent = desk.asks_agent().map(|dir| correct::is_heard(&dir));
            signs.recovery = desk.recovery();
            Reply::Signs(signs)
        }
        Ok(other) => other,
        Err(_) => return false,
    };
    frame::send_json(caller, &said, &[]).is_ok()
}

fn change(
    caller: &OwnedFd,
    desk: &Desk,
    events: &Sender<Event>,
    request: Request,
    fds: Vec<OwnedFd>,
) -> bool {
    if let Some(refusal) = refuse(desk, &request) {
        return frame::send_json(caller, &refusal, &[]).is_ok();
    }
    let (reply, replies) = channel();
    let (telling, told) = channel();
    if events
        .send(Event::Control(Job {
            request,
            fds,
            reply,
            told: Some(told),
        }))
        .is_err()
    {
        return false;
    }
    let mut alive = true;
    // Until the machine thread drops its end. Whoever asked may have gone away meanwhile; what
    // was asked goes on all the same.
    for reply in replies {
        alive = alive && frame::send_json(caller, &reply, &[]).is_ok();
    }
    drop(telling);
    alive
}

fn refuse(desk: &Desk, request: &Request) -> Option<Reply> {
    let of_pause = matches!(
        request,
        Request::Resume { .. }
            | Request::Detach { .. }
            | Request::Rebuild { .. }
            | Request::AwaitJump { .. }
            | Request::PowerOff
    );
    let (code, message) = match desk.state() {
        GuestState::Running => return None,
        GuestState::Frozen if of_pause => return None,
        GuestState::Frozen => (
            "busy",
            "this guest stands still while its host is changed; wait until it runs on",
        ),
        GuestState::Swapping => (
            "busy",
            "this guest is being swapped; wait until that swap is over",
        ),
        GuestState::Stopped => ("not_running", "this guest is stopped"),
    };
    Some(Reply::Error {
        code: code.into(),
        message: message.into(),
    })
}

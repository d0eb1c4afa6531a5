//! The saved form: everything that was agreed on with the guest, and the bytes that are on neither
//! side's hands.
//!
//! Not saved is what a successor finds out by looking: whether a socket has something to read or
//! room to write. How long a first line has been waited for begins anew with each swap.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::time::Instant;

use stillpoint_state::sections::{VirtioVsock, VsockConnection, VsockReset, VsockStage};
use stillpoint_state::{Section as _, StateError};

use super::connection::{Connection, Stage};
use super::connections::{Connections, HOST_PORTS, MOST, Reset};
use super::credit::Credit;
use super::host::MAX_LINE;
use super::packet::{NO_MORE, Ports};
use super::socket::Socket;

/// More connections than a guest can have in its life: a token of a poller must hold each number.
const MOST_NUMBERS: u64 = 1 << 60;

pub(super) fn section(connections: &Connections) -> VirtioVsock {
    let each = connections.all.iter();
    let resets = connections.resets.iter();
    VirtioVsock {
        next: connections.next,
        next_port: connections.next_port,
        connections: each.map(|(&number, c)| connection(number, c)).collect(),
        resets: resets
            .map(|reset| VsockReset {
                cid: reset.cid,
                host_port: reset.ports.host,
                guest_port: reset.ports.guest,
                kind: reset.kind.into(),
            })
            .collect(),
    }
}

fn connection(number: u64, connection: &Connection) -> VsockConnection {
    let (stage, line) = match &connection.stage {
        Stage::Greeting { line, .. } => (VsockStage::Greeting, line.clone()),
        Stage::Requesting => (VsockStage::Requesting, Vec::new()),
        Stage::Requested => (VsockStage::Requested, Vec::new()),
        Stage::Answering => (VsockStage::Answering, Vec::new()),
        Stage::Open => (VsockStage::Open, Vec::new()),
        Stage::Lingering => (VsockStage::Lingering, Vec::new()),
    };
    let credit = &connection.credit;
    let (front, back) = connection.for_host.as_slices();
    VsockConnection {
        number,
        stage: stage.into(),
        socket: connection.socket.is_some(),
        line,
        host_port: connection.ports.host,
        guest_port: connection.ports.guest,
        own_room: credit.own_room,
        consumed: credit.consumed,
        told: credit.told,
        guest_room: credit.guest_room,
        guest_consumed: credit.guest_consumed,
        sent: credit.sent,
        for_host: [front, back].concat(),
        guest_shut: connection.guest_shut,
        host_shut: connection.host_shut,
        told_shut: connection.told_shut,
        owes_credit: connection.owes_credit,
    }
}

/// Connections from their saved form. `socket` gives the socket of the one with that number;
/// without it, its guest is told that it was reset.
pub(super) fn connections(
    from: &VirtioVsock,
    mut socket: impl FnMut(u64) -> Option<OwnedFd>,
) -> Result<Connections, StateError> {
    let mut connections = Connections::new(from.next, from.next_port);
    if from.next > MOST_NUMBERS || !HOST_PORTS.contains(&from.next_port) {
        let (next, port) = (from.next, from.next_port);
        return Err(wrong(format!("next connection {next}, next port {port}")));
    }
    if from.connections.len() > MOST {
        let found = from.connections.len();
        return Err(wrong(format!("{found} connections, {MOST} at most")));
    }
    for reset in &from.resets {
        let kind = u16::try_from(reset.kind);
        let kind = kind.map_err(|_| wrong(format!("socket type {}", reset.kind)))?;
        let ports = Ports {
            host: reset.host_port,
            guest: reset.guest_port,
        };
        let cid = reset.cid;
        connections.resets.push_back(Reset { cid, ports, kind });
    }
    let mut ports = HashSet::new();
    for saved in &from.connections {
        let number = saved.number;
        let stage = stage(saved)?;
        judge(saved, from.next)?;
        let lingers = matches!(stage, Stage::Greeting { .. } | Stage::Lingering);
        let twice = connections.all.contains_key(&number)
            || !lingers && !ports.insert((saved.host_port, saved.guest_port));
        if twice {
            return Err(wrong(format!("connection {number} is there twice")));
        }
        let fd = saved.socket.then(|| socket(number)).flatten();
        let lost = saved.socket && fd.is_none();
        connections.put(number, restored(saved, stage, fd));
        if lost {
            connections.reset(number);
        }
    }
    Ok(connections)
}

fn wrong(problem: String) -> StateError {
    StateError::Value {
        section: VirtioVsock::NAME,
        problem,
    }
}

fn stage(saved: &VsockConnection) -> Result<Stage, StateError> {
    Ok(match saved.stage() {
        VsockStage::Greeting => Stage::Greeting {
            line: saved.line.clone(),
            since: Instant::now(),
        },
        VsockStage::Requesting => Stage::Requesting,
        VsockStage::Requested => Stage::Requested,
        VsockStage::Answering => Stage::Answering,
        VsockStage::Open => Stage::Open,
        VsockStage::Lingering => Stage::Lingering,
        VsockStage::Unknown => {
            let (number, stage) = (saved.number, saved.stage);
            return Err(wrong(format!(
                "connection {number} is at stage {stage}, which this release doesn't know"
            )));
        }
    })
}

fn judge(saved: &VsockConnection, next: u64) -> Result<(), StateError> {
    let problem = if saved.number >= next {
        "has a number that was not given yet"
    } else if saved.line.len() >= MAX_LINE {
        "has too long a first line"
    } else if saved.for_host.len() > saved.own_room as usize {
        "holds more than its guest was promised"
    } else if (saved.guest_shut | saved.host_shut | saved.told_shut) & !NO_MORE != 0 {
        "has ends shut that it doesn't have"
    } else {
        return Ok(());
    };
    Err(wrong(format!("connection {} {problem}", saved.number)))
}

fn restored(saved: &VsockConnection, stage: Stage, fd: Option<OwnedFd>) -> Connection {
    let ports = Ports {
        host: saved.host_port,
        guest: saved.guest_port,
    };
    let credit = Credit {
        own_room: saved.own_room,
        consumed: saved.consumed,
        told: saved.told,
        guest_room: saved.guest_room,
        guest_consumed: saved.guest_consumed,
        sent: saved.sent,
    };
    let mut connection = Connection::with(stage, ports, fd.map(Socket::new), credit);
    connection.for_host = saved.for_host.iter().copied().collect();
    connection.guest_shut = saved.guest_shut;
    connection.host_shut = saved.host_shut;
    connection.told_shut = saved.told_shut;
    connection.owes_credit = saved.owes_credit;
    connection
}

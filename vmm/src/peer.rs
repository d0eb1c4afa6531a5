//! Who may connect to a guest's sockets.

use std::os::fd::AsFd;

/// Whether whoever connected is of our uid, or root.
pub fn may_enter(socket: impl AsFd) -> bool {
    let us = rustix::process::geteuid();
    rustix::net::sockopt::socket_peercred(socket)
        .is_ok_and(|peer| peer.uid == us || peer.uid.is_root())
}

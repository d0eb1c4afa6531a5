//! Messages between the processes, over SEQPACKET sockets.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use rustix::time::{ClockId, clock_gettime};

use crate::machine::MachineState;
use crate::state::{Plain, VcpuState, VmState};

/// Longer than the state of 16 vCPUs.
const LONGEST: usize = 256 << 10;

/// CLOCK_MONOTONIC, the same in all processes.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Two connected ends.
pub(crate) fn pair() -> Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .context("socketpair")?;
    rustix::net::sockopt::set_socket_send_buffer_size(&pair.0, LONGEST).context("SO_SNDBUF")?;
    Ok(pair)
}

/// Sends one message.
pub(crate) fn put(socket: impl AsFd, message: &[u8]) -> Result<()> {
    let sent = send(socket, message, SendFlags::NOSIGNAL).context("send a message")?;
    ensure!(sent == message.len(), "a message was cut short");
    Ok(())
}

/// Waits for one message.
pub(crate) fn get(socket: impl AsFd) -> Result<Vec<u8>> {
    let mut buffer = vec![0; LONGEST];
    let (len, _) = recv(socket, &mut buffer, RecvFlags::empty()).context("receive a message")?;
    if len == 0 {
        bail!("the other process has ended");
    }
    buffer.truncate(len);
    Ok(buffer)
}

/// Whether a message comes (or the other end closes) within this time.
pub(crate) fn wait(socket: impl AsFd, time: Duration) -> Result<bool> {
    let timeout = Timespec::try_from(time).context("timeout")?;
    let mut fds = [PollFd::new(&socket, PollFlags::IN)];
    Ok(poll(&mut fds, Some(&timeout)).context("poll")? != 0)
}

/// All state as one message.
pub(crate) fn pack(state: &MachineState) -> Vec<u8> {
    let mut message = state.vm.bytes().to_vec();
    for vcpu in &state.vcpus {
        message.extend_from_slice(vcpu.bytes());
    }
    message
}

/// The way back.
pub(crate) fn unpack(message: &[u8]) -> Result<MachineState> {
    let (vm, vcpus) = message
        .split_at_checked(size_of::<VmState>())
        .context("a message too short")?;
    Ok(MachineState {
        vm: VmState::from_bytes(vm)?,
        vcpus: vcpus
            .chunks(size_of::<VcpuState>())
            .map(VcpuState::from_bytes)
            .collect::<Result<_>>()?,
    })
}

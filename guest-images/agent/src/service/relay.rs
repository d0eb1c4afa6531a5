//! Gives a guest without a network interface the address that its software knows: what connects to
//! it is led to the metadata service by vsock.
//!
//! The address itself must be there: `ip address add 169.254.169.254/32 dev lo` (the unit file does
//! it). Connections are bounded; the host bounds them again.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context;
use vsock::{VMADDR_CID_HOST, VsockStream};

/// Connections at once.
const CONNECTIONS: usize = 16;

/// Relays for ever from `address` to this vsock port of the host.
pub(crate) fn run(address: SocketAddr, port: u32) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address)
        .with_context(|| format!("listening on {address}; is it on an interface, as `lo`?"))?;
    say!("leading {address} to vsock port {port} of the host");
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok((stream, _)) = listener.accept() else {
            // One connection's failure, or it passes.
            std::thread::sleep(std::time::Duration::from_millis(100));
            continue;
        };
        if open.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS {
            open.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let count = Arc::clone(&open);
        let spawned = std::thread::Builder::new()
            .name("relay".into())
            .spawn(move || {
                if let Err(error) = relay(&stream, port) {
                    say!("relay: {error}");
                }
                count.fetch_sub(1, Ordering::SeqCst);
            });
        if spawned.is_err() {
            open.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Copies both ways until both ends are done.
fn relay(near: &TcpStream, port: u32) -> io::Result<()> {
    let far = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port)?;
    let (mut from_far, mut to_near) = (far.try_clone()?, near.try_clone()?);
    let back = std::thread::spawn(move || {
        let _ = io::copy(&mut from_far, &mut to_near);
        // Whatever ended it, nothing more comes.
        let _ = to_near.shutdown(Shutdown::Both);
    });
    let mut near = near.try_clone()?;
    let mut to_far = far.try_clone()?;
    let _ = io::copy(&mut near, &mut to_far);
    let _ = far.shutdown(Shutdown::Write);
    let _ = back.join();
    Ok(())
}

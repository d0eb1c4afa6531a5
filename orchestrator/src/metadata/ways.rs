//! The ways by which guests reach the service, one for each wire: set up when a VM runs, taken down
//! when it is over, untouched by its swaps. With them come the fences, which keep guests from all else of
//! the host: up before the guest runs, and never down while it does, whatever becomes of the daemon.
//!
//! A VM whose way or fence can't be set up runs all the same, and the log says why.

mod fence;
mod nft;
mod room;
mod tap;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use self::room::{Room, WireError};
use self::tap::Wire;
use super::instance::Facts;
use super::notices::Notices;
use super::serve::Service;
use crate::agent::places::VmDir;
use crate::model::{VmName, VmRecord};

/// The port of the host at which guests find the service by vsock.
pub const VSOCK_PORT: u32 = 80;

/// The ways of all VMs. Clones are the same ones.
#[derive(Clone, Debug)]
pub struct Ways(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    notices: Notices,
    places: Mutex<Places>,
}

#[derive(Debug, Default)]
struct Places {
    open: HashMap<VmName, Way>,
    /// Made for the first VM that has a tap.
    room: Option<Room>,
    /// Taps with a fence, and whose they are.
    fenced: HashMap<String, VmName>,
    /// VMs whose ways an earlier daemon set up, and this one did not take over yet.
    left: HashSet<VmName>,
}

/// The open ways of one VM. They are closed when it is dropped.
#[derive(Debug, Default)]
struct Way {
    listening: Vec<AbortHandle>,
    socket: Option<PathBuf>,
    wires: Option<(Room, Vec<Wire>)>,
}

impl Drop for Way {
    fn drop(&mut self) {
        for listening in &self.listening {
            listening.abort();
        }
        if let Some(socket) = &self.socket {
            // Its directory may be gone already.
            let _ = std::fs::remove_file(socket);
        }
        if let Some((room, wires)) = self.wires.take() {
            on_host(&room, move || wires.iter().for_each(Wire::remove));
        }
    }
}

impl Ways {
    /// None yet.
    pub fn new(notices: Notices) -> Self {
        Self(Arc::new(Shared {
            notices,
            places: Mutex::default(),
        }))
    }

    /// Notes what an earlier daemon left up for this VM, which ran when it was seen last. To be called
    /// before anything else happens.
    pub fn take_over(&self, vm: &VmRecord) {
        let places = &mut *self.0.places.lock().unwrap_or_else(PoisonError::into_inner);
        let taps = vm.spec.nets.iter().map(|net| net.tap.clone());
        places.fenced.extend(taps.map(|tap| (tap, vm.name.clone())));
        places.left.insert(vm.name.clone());
    }

    /// Opens the ways of a VM that runs. Those that are open stay.
    pub fn open(&self, vm: &VmRecord, dir: &VmDir) {
        let places = &mut *self.0.places.lock().unwrap_or_else(PoisonError::into_inner);
        if places.open.contains_key(&vm.name) {
            return;
        }
        places.left.remove(&vm.name);
        // It runs, so its taps are its own.
        places.fence(vm, vm.spec.nets.iter().map(|net| net.tap.clone()).collect());
        let service = Service::new(Facts::of(vm), self.0.notices.clone());
        let mut way = Way::default();
        if vm.spec.vsock.is_some() {
            match vsock(dir) {
                Ok(listener) => {
                    let listening = tokio::spawn(service.clone().listen_unix(listener));
                    way.listening.push(listening.abort_handle());
                    way.socket = Some(dir.vsock_port(VSOCK_PORT));
                }
                Err(error) => {
                    tracing::warn!(vm = %vm.name, "no way to its metadata by vsock: {error}");
                }
            }
        }
        if !vm.spec.nets.is_empty() {
            match room(&mut places.room) {
                Ok(room) => wires(&mut way, room, vm, &service),
                Err(error) => no_way(&vm.name, &error),
            }
        }
        places.open.insert(vm.name.clone(), way);
    }

    /// Keeps a VM that is about to run from its host, but for what its owner opened. A tap that
    /// another VM has stays that one's: this one won't run.
    pub fn fence(&self, vm: &VmRecord) {
        let places = &mut *self.0.places.lock().unwrap_or_else(PoisonError::into_inner);
        let fenced = &places.fenced;
        let free = |tap: &str| fenced.get(tap).is_none_or(|owner| *owner == vm.name);
        let taps: Vec<_> = vm.spec.nets.iter().map(|net| net.tap.clone()).collect();
        let taps = taps.into_iter().filter(|tap| free(tap)).collect();
        places.fence(vm, taps);
    }

    /// Takes down the fences of a VM that does not run.
    pub fn unfence(&self, vm: &VmRecord) {
        let places = &mut *self.0.places.lock().unwrap_or_else(PoisonError::into_inner);
        places.unfence(vm);
    }

    /// Closes the ways of a VM that is over.
    pub fn close(&self, vm: &VmRecord) {
        let places = &mut *self.0.places.lock().unwrap_or_else(PoisonError::into_inner);
        places.open.remove(&vm.name);
        if places.left.remove(&vm.name) {
            // It ended while no daemon was there.
            let wires = vm.spec.nets.iter().map(|net| Wire::of(&net.tap));
            wires.flatten().for_each(|wire| wire.remove());
        }
        places.unfence(vm);
    }
}

impl Places {
    fn fence(&mut self, vm: &VmRecord, taps: Vec<String>) {
        // Of a daemon before there were fences: as it was.
        let Some(reach) = &vm.profile.reach else {
            return;
        };
        for tap in taps {
            if let Err(error) = fence::put_up(&tap, reach) {
                tracing::warn!(
                    vm = %vm.name, %tap,
                    "it is not kept from this host, whose kernel refuses a filter: {error}; what it \
                     can reach is for the host's own rules"
                );
            }
            self.fenced.insert(tap, vm.name.clone());
        }
    }

    fn unfence(&mut self, vm: &VmRecord) {
        for net in &vm.spec.nets {
            if self.fenced.get(&net.tap) != Some(&vm.name) {
                continue;
            }
            self.fenced.remove(&net.tap);
            if let Err(error) = fence::take_down(&net.tap) {
                tracing::debug!(vm = %vm.name, tap = %net.tap, "its fence stays: {error}");
            }
        }
    }
}

fn no_way(vm: &VmName, error: &WireError) {
    tracing::warn!(%vm, "no way to its metadata by its tap: {error}");
}

fn room(room: &mut Option<Room>) -> Result<Room, WireError> {
    if let Some(room) = room {
        return Ok(room.clone());
    }
    let new = Room::open()?;
    *room = Some(new.clone());
    Ok(new)
}

/// Does it on a thread of the host's network, after what the room was told before, and before what
/// it is told later: what is set up is not taken down by an order that was given earlier.
fn on_host(room: &Room, job: impl FnOnce() + Send + 'static) {
    let host = std::thread::Builder::new().name("wires".into());
    let (begin, begun) = std::sync::mpsc::channel::<()>();
    let spawned = host.spawn(move || {
        if begun.recv().is_ok() {
            job();
        }
    });
    match spawned {
        Ok(thread) => room.run(move || {
            let _ = begin.send(());
            let _ = thread.join();
        }),
        Err(error) => tracing::error!("guests' wires stay as they are: {error}"),
    }
}

/// Sets up a wire from each of the VM's taps, and serves it.
fn wires(way: &mut Way, room: Room, vm: &VmRecord, service: &Arc<Service>) {
    let mut made = Vec::new();
    for net in &vm.spec.nets {
        let wire = match Wire::of(&net.tap) {
            Ok(wire) => wire,
            Err(error) => {
                no_way(&vm.name, &error);
                continue;
            }
        };
        let (listener, listening) = oneshot::channel::<TcpListener>();
        let (in_room, on_tap) = (wire.clone(), wire.clone());
        let (runtime, name) = (Handle::current(), vm.name.clone());
        room.run(move || {
            let _runtime = runtime.enter();
            match in_room.make().and_then(|()| in_room.listen()) {
                // Nobody waits for it: the VM is over already.
                Ok(new) => drop(listener.send(new)),
                Err(error) => no_way(&name, &error),
            }
        });
        let name = vm.name.clone();
        on_host(&room, move || {
            if let Err(error) = on_tap.lead() {
                no_way(&name, &error);
            }
        });
        let service = service.clone();
        let serving = tokio::spawn(async move {
            if let Ok(listener) = listening.await {
                service.listen_tcp(listener).await;
            }
        });
        way.listening.push(serving.abort_handle());
        made.push(wire);
    }
    way.wires = Some((room, made));
}

/// Where the VMM connects for a guest that connects to port 80 of the host.
fn vsock(dir: &VmDir) -> std::io::Result<UnixListener> {
    let path = dir.vsock_port(VSOCK_PORT);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        // Of a daemon before this one: there is one at a time.
        _ => {}
    }
    UnixListener::bind(&path)
}

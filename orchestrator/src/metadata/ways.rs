//! The ways by which guests reach the service, one for each wire: set up when a VM runs, taken down
//! when it is over, untouched by its swaps.
//!
//! A VM whose way can't be set up runs all the same, and the log says why.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::UnixListener;
use tokio::task::AbortHandle;

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
    open: Mutex<HashMap<VmName, Way>>,
}

/// The open ways of one VM. They are closed when it is dropped.
#[derive(Debug, Default)]
struct Way {
    listening: Vec<AbortHandle>,
    socket: Option<PathBuf>,
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
    }
}

impl Ways {
    /// None yet.
    pub fn new(notices: Notices) -> Self {
        Self(Arc::new(Shared {
            notices,
            open: Mutex::default(),
        }))
    }

    /// Opens the ways of a VM that runs. Those that are open stay.
    pub fn open(&self, vm: &VmRecord, dir: &VmDir) {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.contains_key(&vm.name) {
            return;
        }
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
        open.insert(vm.name.clone(), way);
    }

    /// Closes the ways of a VM that is over.
    pub fn close(&self, vm: &VmName) {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.remove(vm);
    }
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

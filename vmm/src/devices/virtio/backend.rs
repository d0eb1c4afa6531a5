//! What a device is made of on the host: a disk image, a tap, a socket.
//!
//! Opened once, at the boot of a machine, before any guest code runs. At a swap, and when a guest
//! resets itself, the very same descriptions are handed on ([`lend`](crate::handover::lend)):
//! nothing is opened or locked a second time.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use stillpoint_control::spec::{DiskSpec, MachineSpec, NetSpec, VsockSpec};
use stillpoint_state::{StateError, Unclaimed};

use super::Kind;
use super::blk::Blk;
use super::blk::image::{Image, ImageError};
use super::net::Net;
use super::net::tap::{Tap, TapError};
use super::rng::Rng;
use super::slot::Place;
use super::vsock::{self, Vsock};
use crate::doors::DoorError;
use crate::handover::lend::{Borrowed, Missing};
use crate::irq::{IrqError, Kick};

/// Why a device's files on the host can't be had.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// They did not come from the predecessor.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// A socket in the guest's directory.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// No eventfd to be had.
    #[error(transparent)]
    Kick(#[from] IrqError),
    /// A disk that can't be had.
    #[error(transparent)]
    Disk(#[from] ImageError),
    /// A network interface's tap.
    #[error(transparent)]
    Tap(#[from] TapError),
}

/// What a device is made of.
#[derive(Debug)]
pub enum Backend {
    /// An image or block device.
    Disk(Image),
    /// A tap, and the guest's MAC address.
    Net(Tap, [u8; 6]),
    /// Unix sockets in the guest's directory.
    Vsock {
        /// The guest's context id.
        cid: u32,
        /// Where host programs connect.
        listener: OwnedFd,
        /// The guest's directory.
        dir: PathBuf,
    },
    /// The host's entropy.
    Rng,
}

/// A device before it has moved into its place.
#[derive(Debug)]
pub struct Plug {
    /// Its name in the machine, for ever: `disk0`, `net1`, `vsock`, `rng`.
    pub name: String,
    /// Where it will lie.
    pub place: Place,
    /// What it is made of.
    pub backend: Backend,
    /// One for each of its queues.
    pub kicks: Vec<Kick>,
}

/// A device as the spec wants it.
#[derive(Clone, Copy, Debug)]
enum Wanted<'s> {
    Disk(&'s DiskSpec),
    Net(&'s NetSpec, [u8; 6]),
    Vsock(VsockSpec),
    Rng,
}

/// All devices of `spec` with their names, in the order of their places.
fn wanted(spec: &MachineSpec) -> Vec<(String, Wanted<'_>)> {
    let disks = spec.disks.iter().enumerate();
    let disks = disks.map(|(number, disk)| (format!("disk{number}"), Wanted::Disk(disk)));
    let nets = spec.nets.iter().enumerate().map(|(number, net)| {
        let mac = spec.mac(number).unwrap_or_default();
        (format!("net{number}"), Wanted::Net(net, mac))
    });
    let vsock = spec
        .vsock
        .map(|vsock| ("vsock".to_owned(), Wanted::Vsock(vsock)));
    let rng = spec.rng.then(|| ("rng".to_owned(), Wanted::Rng));
    disks.chain(nets).chain(vsock).chain(rng).collect()
}

/// Places of all devices of `spec`, without opening anything.
pub fn places(spec: &MachineSpec) -> Vec<Place> {
    (0..wanted(spec).len()).map(Place::nth).collect()
}

/// Opens everything that `spec` names. `dir` is the guest's directory.
pub fn open(spec: &MachineSpec, dir: &Path) -> Result<Vec<Plug>, BackendError> {
    plugs(spec, |name, wanted| {
        let backend = match wanted {
            Wanted::Disk(disk) => Backend::Disk(Image::open(&spec.name, name, disk)?),
            Wanted::Vsock(VsockSpec { cid }) => Backend::Vsock {
                cid,
                listener: vsock::listen(dir)?,
                dir: dir.to_owned(),
            },
            Wanted::Net(net, mac) => Backend::Net(Tap::open(net)?, mac),
            Wanted::Rng => Backend::Rng,
        };
        let kicks = (0..backend.queues()).map(|_| Kick::new());
        let kicks = kicks.collect::<Result<_, _>>()?;
        Ok((backend, kicks))
    })
}

/// Takes everything from what a predecessor lends, but what came with the guest itself: that is
/// taken with the guest's state.
pub fn adopt(
    spec: &MachineSpec,
    dir: &Path,
    from: &mut Borrowed,
) -> Result<Vec<Plug>, BackendError> {
    plugs(spec, |name, wanted| {
        let backend = match wanted {
            Wanted::Disk(disk) => {
                let fd = from.take(&format!("{name}/image"))?;
                Backend::Disk(Image::adopt(&spec.name, name, disk, fd)?)
            }
            Wanted::Vsock(VsockSpec { cid }) => Backend::Vsock {
                cid,
                listener: from.take(&format!("{name}/listener"))?,
                dir: dir.to_owned(),
            },
            Wanted::Net(net, mac) => {
                let queues =
                    (0..net.queue_pairs).map(|pair| from.take(&format!("{name}/tap{pair}")));
                Backend::Net(Tap::adopt(queues.collect::<Result<_, _>>()?), mac)
            }
            Wanted::Rng => Backend::Rng,
        };
        let kicks = (0..backend.queues()).map(|queue| from.take(&format!("{name}/kick{queue}")));
        let kicks = kicks.map(|kick| kick.map(Kick::adopt));
        let kicks = kicks.collect::<Result<_, _>>()?;
        Ok((backend, kicks))
    })
}

/// As [`adopt`], for a guest that begins anew on the same files. What it had of its own, such as
/// connections, ends.
pub fn begin_anew(
    spec: &MachineSpec,
    dir: &Path,
    from: &mut Borrowed,
) -> Result<Vec<Plug>, BackendError> {
    let plugs = adopt(spec, dir, from)?;
    for plug in &plugs {
        if let Backend::Vsock { .. } = plug.backend {
            vsock::end_lent(&plug.name, from);
        }
    }
    Ok(plugs)
}

/// Whether [`open`] would find the disks that these have: by their paths, and the same ones. Nothing is locked, and
/// nothing kept. Taps and sockets are made anew by then.
pub fn would_open(spec: &MachineSpec, plugs: &[Plug]) -> Result<(), BackendError> {
    // Disks come first, in the spec's order.
    for (disk, plug) in spec.disks.iter().zip(plugs) {
        if let Backend::Disk(image) = &plug.backend {
            image.is_found_by(disk)?;
        }
    }
    Ok(())
}

fn plugs(
    spec: &MachineSpec,
    mut make: impl FnMut(&str, Wanted<'_>) -> Result<(Backend, Vec<Kick>), BackendError>,
) -> Result<Vec<Plug>, BackendError> {
    let all = wanted(spec).into_iter().enumerate();
    all.map(|(number, (name, wanted))| {
        let (backend, kicks) = make(&name, wanted)?;
        Ok(Plug {
            name,
            place: Place::nth(number),
            backend,
            kicks,
        })
    })
    .collect()
}

impl Backend {
    /// How many queues the device has.
    fn queues(&self) -> usize {
        match self {
            Self::Disk(_) | Self::Rng => 1,
            Self::Net(tap, _) => 2 * tap.pairs() + 1,
            Self::Vsock { .. } => 3,
        }
    }

    /// A fresh device.
    pub fn fresh(self) -> Box<dyn Kind> {
        match self {
            Self::Disk(image) => Box::new(Blk::new(image)),
            Self::Vsock { cid, listener, dir } => Box::new(Vsock::new(cid, listener, &dir)),
            Self::Net(tap, mac) => Box::new(Net::new(tap, mac)),
            Self::Rng => Box::new(Rng),
        }
    }

    /// A device from its saved section.
    pub fn restore(
        self,
        instance: &str,
        from: &mut Unclaimed,
        late: &mut Borrowed,
    ) -> Result<Box<dyn Kind>, StateError> {
        Ok(match self {
            Self::Disk(image) => Box::new(Blk::restore(image, instance, from)?),
            Self::Vsock { cid, listener, dir } => {
                let vsock = Vsock::restore(cid, listener, &dir, instance, from, late)?;
                Box::new(vsock)
            }
            Self::Net(tap, mac) => Box::new(Net::restore(tap, mac, instance, from)?),
            Self::Rng => Box::new(Rng::restore(instance, from)?),
        })
    }
}

//! The host's side of a network interface: a tap, one file for each pair of queues.
//!
//! The interface exists before the machine does: whoever made it owns its name, its place in a
//! bridge and its MTU, and it stays when the machine ends. Here it is only attached to, once, at
//! boot; the files then travel from process to process, and with them what belongs to the
//! interface: the size of the header before each frame, and the offloads.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use stillpoint_control::spec::NetSpec;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BS;

use super::link::{self, Link};
use super::{HEADER, offload};
use crate::raw;

const TUN: &str = "/dev/net/tun";

// Flags of TUNSETIFF (include/uapi/linux/if_tun.h).
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_MULTI_QUEUE: u16 = 0x0100;

/// Frames thrown away at once by [`Tap::empty`]: more than a tap's queue holds.
const EMPTY: usize = 4096;

/// Why a tap can't be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No interface of that name.
    #[error(
        "machine spec: field `nets.tap`: this host has no interface `{tap}`; make it first: {}",
        make(tap, *pairs)
    )]
    Missing {
        /// Its name.
        tap: String,
        /// Queue pairs wanted.
        pairs: u8,
    },
    /// Some other interface.
    #[error(
        "machine spec: field `nets.tap`: `{0}` is an interface of another kind, not a tap; make a \
         tap, and connect the two by a bridge"
    )]
    OtherKind(String),
    /// It belongs to somebody.
    #[error(
        "machine spec: field `nets.tap`: another process is attached to `{0}`, and a tap serves \
         one guest; stop that process or make another tap"
    )]
    Taken(String),
    /// Made for one queue.
    #[error(
        "machine spec: field `nets.queue_pairs`: `{tap}` was made with one queue, not {pairs}; ask \
         for one, or delete it and make it anew: {}",
        make(tap, *pairs)
    )]
    OneQueue {
        /// Its name.
        tap: String,
        /// Queue pairs wanted.
        pairs: u8,
    },
    /// Not ours to open.
    #[error(
        "machine spec: field `nets.tap`: uid {uid} may not attach to `{tap}`; delete it and make \
         it anew for that user: {}",
        make(tap, *pairs)
    )]
    NotOurs {
        /// Its name.
        tap: String,
        /// Queue pairs wanted.
        pairs: u8,
        /// Who asks.
        uid: u32,
    },
    /// The host's tap driver.
    #[error("cannot open {TUN}, which machine spec field `nets` needs: {source}; {}", tun_remedy(*source))]
    NoTun {
        /// Why not.
        source: Errno,
    },
    /// The kernel refused.
    #[error("machine spec: field `nets.tap`: cannot {what} `{tap}`: {source}")]
    Refused {
        /// What was to be done.
        what: &'static str,
        /// With which interface.
        tap: String,
        /// Why not.
        source: Errno,
    },
}

fn make(tap: &str, pairs: u8) -> String {
    let several = if pairs > 1 { " multi_queue" } else { "" };
    format!("`ip tuntap add dev {tap} mode tap{several} user NAME`, then `ip link set {tap} up`")
}

fn tun_remedy(error: Errno) -> &'static str {
    match error {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => "load the `tun` module: `modprobe tun`",
        Errno::ACCESS | Errno::PERM => "give this user the right to read and write it",
        _ => "look at the kernel's log",
    }
}

/// A tap with this process's queues.
#[derive(Debug)]
pub struct Tap {
    queues: Vec<OwnedFd>,
}

impl Tap {
    /// Attaches to an interface that exists and nobody is attached to.
    pub fn open(spec: &NetSpec) -> Result<Self, TapError> {
        let name = &spec.tap;
        let tap = || name.clone();
        let pairs = spec.queue_pairs;
        let refused = |what| {
            move |source| TapError::Refused {
                what,
                tap: tap(),
                source,
            }
        };
        let found = link::find(name).map_err(refused("look for"))?;
        let Some(link) = found else {
            return Err(TapError::Missing { tap: tap(), pairs });
        };
        let flags = judge(spec, link)?;
        let open = || {
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
            rustix::fs::open(TUN, flags, Mode::empty()).map_err(|source| TapError::NoTun { source })
        };
        let mut queues = Vec::with_capacity(pairs.into());
        for _ in 0..pairs {
            let queue = open()?;
            raw::tap::attach(&queue, name, flags).map_err(|source| match source {
                Errno::BUSY => TapError::Taken(tap()),
                Errno::PERM => TapError::NotOurs {
                    tap: tap(),
                    pairs,
                    uid: rustix::process::geteuid().as_raw(),
                },
                source => refused("attach to")(source),
            })?;
            raw::tap::set_header_size(&queue, HEADER as i32)
                .map_err(refused("set the header of"))?;
            queues.push(queue);
        }
        Ok(Self { queues })
    }

    /// The files of one that is attached to already, one for each pair of queues.
    pub fn adopt(queues: Vec<OwnedFd>) -> Self {
        Self { queues }
    }

    /// How many pairs of queues it has.
    pub fn pairs(&self) -> usize {
        self.queues.len()
    }

    /// Its files.
    pub(super) fn queues(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.queues.iter().map(AsFd::as_fd)
    }

    /// The interface's MTU, as this process's network namespace knows it.
    pub(super) fn mtu(&self) -> Option<u16> {
        let name = raw::tap::name(self.queues.first()?).ok()?;
        let link = link::find(&name).ok()??;
        u16::try_from(link.mtu).ok()
    }

    /// Tries what the kernel can hand out, as `TUN_F_*` flags; leaves all of it switched off.
    pub(super) fn probe(&self) -> u32 {
        let takes = |level: &&u32| self.set_offload(**level).is_ok();
        let best = offload::LEVELS.iter().find(takes).copied();
        let _ = self.set_offload(0);
        best.unwrap_or(0)
    }

    /// Sets what the guest takes. It belongs to the interface, so one of its files will do.
    pub(super) fn set_offload(&self, flags: u32) -> Result<(), Errno> {
        match self.queues.first() {
            Some(queue) => raw::tap::set_offload(queue, flags),
            None => Ok(()),
        }
    }

    /// Throws away what waits in its queues.
    pub(super) fn empty(&self) {
        for queue in &self.queues {
            let nowhere: [VolatileSlice<'_, BS<'_, ()>>; 0] = [];
            let mut header = [0; HEADER];
            // Reading a part of a frame takes all of it away.
            for _ in 0..EMPTY {
                if raw::tap::read(queue, &nowhere, &mut header).is_err() {
                    break;
                }
            }
        }
    }

    /// Takes the next frame of a queue, see [`raw::tap::read`]. `AGAIN`: there is none.
    pub(super) fn read(
        &self,
        queue: usize,
        room: &[VolatileSlice<'_, BS<'_, ()>>],
        spill: &mut [u8],
    ) -> Result<usize, Errno> {
        raw::tap::read(&self.queues[queue], room, spill)
    }

    /// Sends a frame through a queue. Never waits.
    pub(super) fn write(
        &self,
        queue: usize,
        frame: &[VolatileSlice<'_, BS<'_, ()>>],
    ) -> Result<usize, Errno> {
        raw::tap::write(&self.queues[queue], frame)
    }
}

/// Judges an interface before it is opened; gives the flags to open it with.
fn judge(spec: &NetSpec, link: Link) -> Result<u16, TapError> {
    let tap = spec.tap.clone();
    let Some(found) = link.tap else {
        return Err(TapError::OtherKind(tap));
    };
    if found.queues > 0 {
        return Err(TapError::Taken(tap));
    }
    let pairs = spec.queue_pairs;
    if pairs > 1 && !found.multi_queue {
        return Err(TapError::OneQueue { tap, pairs });
    }
    if !link.up {
        tracing::warn!(
            tap,
            "the tap is down: no frame gets through; `ip link set {tap} up`"
        );
    }
    // The kernel wants the flag exactly if the interface was made with it.
    let several = if found.multi_queue {
        IFF_MULTI_QUEUE
    } else {
        0
    };
    Ok(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | several)
}

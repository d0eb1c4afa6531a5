//! Memfds that live update keeps for the next kernel: each guest's, and one with the directory.
//!
//! ```text
//!  this kernel:  preserve (guests run: holes are filled) ─▶ records, directory ─▶ the jump, with the session held
//!  the next:     the session by its name ─▶ the directory ─▶ every guest's memfd ─▶ systemd's fd store ─▶ finish
//!                                             ─▶ adopted: its VMM has the memfd, and it is let go here
//! ```
//!
//! What must be true: the session is finished only when all that it holds is in hand, as what is not is freed
//! then. Between that and a guest's adoption this process, and systemd where there is one, are all that holds
//! its RAM: without systemd it ends with this process.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags};
use stillpoint_carveout::area::{Area, AreaError};
use stillpoint_carveout::directory::{Directory, Entry};
use stillpoint_carveout::layout::{DIRECTORY, Extent};
use stillpoint_carveout::map::Device;
use stillpoint_control::spec::{CarveOutSpec, LIVE_UPDATE};
use stillpoint_liveupdate::{Error, Incoming, LiveUpdate, Outgoing};

use super::{CarveOut, Opened};
use crate::agent::custody::{self, Keeping};

/// The session's name.
const SESSION: &str = "stillpoint";
/// The directory's token; guests have those behind it.
const DIRECTORY_TOKEN: u64 = 0;

/// Guests' memfds, and sessions.
#[derive(Debug, Default)]
pub(super) struct Memfds {
    came: Mutex<BTreeMap<String, Came>>,
    going: Mutex<Option<Outgoing>>,
    /// Of the kernel before, with something in it that could not be retrieved: held, so that it is not freed.
    unfinished: Mutex<Option<Incoming>>,
}

/// A guest's memfd that came from the kernel before, and was not let go yet.
#[derive(Debug)]
enum Came {
    Here(OwnedFd),
    Lost(String),
}

/// A guest that is to be preserved.
#[derive(Debug)]
pub struct Guest {
    /// Its name.
    pub vm: String,
    /// Where it lies.
    pub place: CarveOutSpec,
    /// Its memfd.
    pub memory: OwnedFd,
}

/// The memory that preserving takes, and that there is, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// The guests' size.
    pub size: u64,
    /// What of that isn't there yet, and what the kernel writes down of it.
    pub needed: u64,
    /// What the host has left.
    pub available: u64,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CarveOut {
    /// That of a kernel with live update: what came from the kernel before, or what an earlier daemon of this
    /// one left with systemd, or nothing yet.
    pub fn by_live_update(left: Vec<(Keeping, OwnedFd)>) -> Result<Self, Error> {
        let device = LiveUpdate::open()?;
        let opened = match device.retrieve(SESSION)? {
            Some(session) => Opened::came(session),
            None => Opened::left(left),
        };
        opened
            .map(|opened| Self(Ok(Arc::new(opened))))
            .map_err(|error| Error::Failed {
                what: format!("keep a directory: {error}"),
                errno: rustix::io::Errno::IO,
            })
    }

    /// Whether it is memfds.
    pub fn is_live_update(&self) -> bool {
        self.memfds().is_some()
    }

    fn memfds(&self) -> Option<&Memfds> {
        self.0.as_ref().ok()?.memfds.as_ref()
    }

    /// The memfd of a guest that came from the kernel before; `None` in a carve-out, which has none.
    pub fn memory_of(&self, entry: &Entry) -> Result<Option<OwnedFd>, String> {
        let (Some(memfds), Some(_)) = (self.memfds(), entry.token) else {
            return Ok(None);
        };
        match held(&memfds.came).get(&entry.vm) {
            Some(Came::Here(fd)) => fd.try_clone().map(Some).map_err(|e| e.to_string()),
            Some(Came::Lost(why)) => Err(why.clone()),
            None => Err(format!("`{}` has its memory itself", entry.vm)),
        }
    }

    /// A guest runs, and its VMM has its memory.
    pub fn let_go(&self, vm: &str) {
        if let Some(memfds) = self.memfds() {
            memfds.forget(vm);
        }
    }

    /// Why nothing more can be preserved: a guest from before may yet be run.
    pub fn waits(&self) -> Option<String> {
        let came = held(&self.memfds()?.came);
        let vm = came.keys().next()?;
        Some(format!(
            "`{vm}` came from the kernel before and does not run yet: `stillpoint adopt --retry {vm}` tries, \
             `stillpoint adopt --forget {vm}` gives it up"
        ))
    }

    /// Has the kernel keep these guests' memfds, and the directory that names them, until [`CarveOut::release`]. Blocks, and
    /// may take seconds: guests run meanwhile. Of a carve-out there is nothing to do.
    pub fn preserve(&self, guests: &[Guest]) -> Result<(), String> {
        let Some(memfds) = self.memfds() else {
            return Ok(());
        };
        if let Some(why) = self.waits() {
            return Err(why);
        }
        let entries: Vec<_> = guests.iter().zip(1..).map(entry).collect();
        self.change(|directory| {
            (directory.entries, directory.jump) = (entries, None);
            Ok(())
        })?;
        let session = self.session(guests).map_err(|e| e.to_string());
        if session.is_err() {
            drop(self.release());
        }
        *held(&memfds.going) = Some(session?);
        Ok(())
    }

    fn session(&self, guests: &[Guest]) -> Result<Outgoing, Error> {
        let session = LiveUpdate::open()?.create(SESSION)?;
        if let Ok(opened) = &self.0 {
            session.preserve(opened.area.device(), DIRECTORY_TOKEN)?;
        }
        for (guest, token) in guests.iter().zip(1..) {
            session.preserve(&guest.memory, token)?;
        }
        Ok(session)
    }

    /// There is no jump: the guests' memfds are as any others when the session is dropped, which gives pages back one
    /// by one and takes its time.
    pub fn release(&self) -> Option<Outgoing> {
        let memfds = self.memfds()?;
        let session = held(&memfds.going).take();
        let forgotten = self.change(|directory| {
            let came = held(&memfds.came);
            directory
                .entries
                .retain(|entry| came.contains_key(&entry.vm));
            Ok(())
        });
        if let Err(error) = forgotten {
            tracing::warn!("guests stay in the directory of what live update keeps: {error}");
        }
        session
    }
}

impl Memfds {
    pub(super) fn forget(&self, vm: &str) {
        if held(&self.came).remove(vm).is_some() {
            custody::let_go(&Keeping::Guest(vm.to_owned()));
        }
    }

    pub(super) fn forget_all(&self) {
        for vm in std::mem::take(&mut *held(&self.came)).into_keys() {
            custody::let_go(&Keeping::Guest(vm));
        }
        drop(held(&self.unfinished).take());
    }

    /// Whether a guest's VMM has taken its memfd over: it does so only once its record is consumed.
    pub(super) fn is_let_go(&self, entry: &Entry) -> bool {
        entry.token.is_some() && !held(&self.came).contains_key(&entry.vm)
    }
}

impl Opened {
    fn of(area: Area, directory: Result<Directory, String>, memfds: Memfds) -> Self {
        Self {
            path: LIVE_UPDATE.into(),
            area,
            directory: Mutex::new(directory),
            memfds: Some(memfds),
        }
    }

    /// With nothing in it.
    fn new() -> Result<Self, AreaError> {
        let area = Area::of(directory_file()?)?;
        let mut directory = Directory::default();
        area.write(&mut directory)?;
        Ok(Self::of(area, Ok(directory), Memfds::default()))
    }

    /// What the kernel before left for this one.
    fn came(session: Incoming) -> Result<Self, AreaError> {
        let area = session.retrieve(DIRECTORY_TOKEN).map_err(|e| e.to_string());
        let area = area.and_then(|fd| area_of(fd).map_err(|e| e.to_string()));
        let read = area.and_then(|area| {
            let directory = area.read().map_err(|e| e.to_string())?;
            Ok((area, directory))
        });
        let memfds = Memfds::default();
        let (area, directory) = match read {
            Ok(read) => read,
            Err(why) => {
                *held(&memfds.unfinished) = Some(session);
                let why = format!(
                    "what came by live update has no directory that can be read: {why}; it is held as it is \
                     until this daemon ends, and no guest is run from it. `stillpoint adopt --forget-all` \
                     gives it up"
                );
                return Ok(Self::of(Area::of(directory_file()?)?, Err(why), memfds));
            }
        };
        custody::keep_for_later(&Keeping::Directory, area.device());
        let mut all = true;
        for entry in &directory.entries {
            let came = match entry.token.map(|token| session.retrieve(token)) {
                Some(Ok(fd)) => {
                    custody::keep_for_later(&Keeping::Guest(entry.vm.clone()), &fd);
                    Came::Here(fd)
                }
                Some(Err(error)) => Came::Lost(error.to_string()),
                None => Came::Lost("it lies in a carve-out, which is not this daemon's".into()),
            };
            all &= matches!(came, Came::Here(_));
            held(&memfds.came).insert(entry.vm.clone(), came);
        }
        if !all {
            *held(&memfds.unfinished) = Some(session);
        } else if let Err((session, error)) = session.finish() {
            tracing::warn!("{error}; it is held until this daemon ends");
            *held(&memfds.unfinished) = Some(session);
        }
        Ok(Self::of(area, Ok(directory), memfds))
    }

    /// What an earlier daemon gave to systemd; guests that aren't there run, or were given up.
    fn left(left: Vec<(Keeping, OwnedFd)>) -> Result<Self, AreaError> {
        let (mut area, memfds) = (None, Memfds::default());
        for (what, fd) in left {
            match what {
                Keeping::Directory => area = Some(area_of(fd)?),
                Keeping::Guest(vm) => {
                    held(&memfds.came).insert(vm, Came::Here(fd));
                }
            }
        }
        let Some(area) = area else {
            return Self::new();
        };
        let directory = area.read().map_err(|e| e.to_string());
        Ok(Self::of(area, directory, memfds))
    }
}

fn area_of(fd: OwnedFd) -> Result<Area, AreaError> {
    Area::of(Device::of(Path::new(LIVE_UPDATE), fd)?)
}

/// A memfd for the directory.
fn directory_file() -> Result<Device, AreaError> {
    let made = || {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("stillpoint-directory", flags)?;
        rustix::fs::ftruncate(&fd, DIRECTORY)?;
        let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals)?;
        Ok::<_, rustix::io::Errno>(fd)
    };
    let fd = made().map_err(|source| stillpoint_carveout::map::MapError::Open {
        path: LIVE_UPDATE.into(),
        source,
    })?;
    Ok(Device::of(Path::new(LIVE_UPDATE), fd)?)
}

fn entry((guest, token): (&Guest, u64)) -> Entry {
    let place = &guest.place;
    Entry {
        vm: guest.vm.clone(),
        ram: Extent {
            start: place.ram,
            len: place.record,
        },
        record: Extent {
            start: place.record,
            len: place.record_len,
        },
        token: Some(token),
        kept: String::new(),
    }
}

impl Room {
    /// What preserving these takes.
    pub fn of(guests: &[Guest]) -> Result<Self, String> {
        let text = std::fs::read_to_string("/proc/meminfo").map_err(|e| e.to_string())?;
        let available = available(&text).ok_or("/proc/meminfo tells no MemAvailable")?;
        let mut room = Self {
            size: 0,
            needed: 0,
            available,
        };
        for guest in guests {
            room.add(guest.memory.as_fd()).map_err(|e| e.to_string())?;
        }
        Ok(room)
    }

    fn add(&mut self, file: impl AsFd) -> Result<(), rustix::io::Errno> {
        let found = rustix::fs::fstat(file)?;
        let (size, there) = (
            u64::try_from(found.st_size).unwrap_or(0),
            u64::try_from(found.st_blocks).unwrap_or(0) * 512,
        );
        self.size += size;
        // Of each page the kernel writes down 24 bytes, and has a pointer meanwhile: less than one in 100.
        self.needed += size.saturating_sub(there) + size / 100;
        Ok(())
    }

    /// Whether there is enough.
    pub fn is_enough(&self) -> bool {
        self.needed <= self.available
    }
}

fn available(meminfo: &str) -> Option<u64> {
    let mut lines = meminfo.lines();
    let line = lines.find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests;

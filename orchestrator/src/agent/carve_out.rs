//! What of this host outlives its kernel, and who has which part of it: a carve-out, or memfds that live
//! update keeps (`live_update`). Both have the same directory, and the same records; of a carve-out all
//! that is given out is in it, of memfds only what goes to another kernel or came from one.
//!
//! What must be true: a guest's memory is given to nobody else while the guest's record may still be run.
//! Must never: look into saved state.

mod live_update;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stillpoint_carveout::area::{Area, AreaError, Place};
use stillpoint_carveout::directory::{Directory, DirectoryError, Entry};
use stillpoint_carveout::map::Device;
use stillpoint_carveout::mark::Mark;
use stillpoint_carveout::record::{self, Label};
use stillpoint_control::spec::{CarveOutSpec, MachineSpec};

use live_update::Memfds;
pub use live_update::{Guest, Room};

/// See the module. Without one, why there is none.
#[derive(Clone, Debug)]
pub struct CarveOut(Result<Arc<Opened>, Arc<str>>);

#[derive(Debug)]
struct Opened {
    path: PathBuf,
    area: Area,
    directory: Mutex<Result<Directory, String>>,
    /// Those of guests, where they have memfds of their own.
    memfds: Option<Memfds>,
}

const NONE: &str = "no memory of this host outlives its kernel: it has no carve-out that the daemon was told of \
                    (`stillpointd --carve-out /dev/dax0.0`), and";
const PREPARE: &str = "`stillpoint host prepare` says what is missing";

impl CarveOut {
    /// Opens it. One without a directory gets one, unless this kernel was jumped into: then there must
    /// have been one, and nothing is written over what is left of it.
    pub fn open(path: &Path, came_by_jump: bool) -> Result<Self, AreaError> {
        let area = Area::open(path)?;
        let directory = match area.read() {
            Err(AreaError::Directory {
                source: DirectoryError::Absent,
                ..
            }) if !came_by_jump => {
                let mut new = Directory::new(area.device().size());
                area.write(&mut new)?;
                Ok(new)
            }
            Err(AreaError::Directory { path, source }) => Err(format!(
                "the carve-out {path}: {source}; what lies in it is left alone, and no guest is run \
                 from it. `stillpoint adopt --forget-all` begins it anew"
            )),
            other => Ok(other?),
        };
        Ok(Self(Ok(Arc::new(Opened {
            path: path.to_owned(),
            area,
            directory: Mutex::new(directory),
            memfds: None,
        }))))
    }

    /// None, as there is no live update for this reason either.
    pub fn none(why: &str) -> Self {
        Self(Err(format!("{NONE} {why}; {PREPARE}").into()))
    }

    fn opened(&self) -> Result<&Opened, String> {
        self.0.as_deref().map_err(|why| why.to_string())
    }

    /// Its path, if there is one.
    pub fn path(&self) -> Option<&Path> {
        self.0.as_ref().ok().map(|opened| opened.path.as_path())
    }

    /// The directory as it is.
    pub fn directory(&self) -> Result<Directory, String> {
        let opened = self.opened()?;
        opened.lock().clone()
    }

    /// Why what lies in it would not outlive the kernel; `None` if it would.
    pub fn is_lost_by_kexec(&self) -> Option<String> {
        let opened = self.0.as_ref().ok()?;
        match opened.memfds {
            Some(_) => None,
            None => opened.area.device().is_lost_by_kexec(),
        }
    }

    /// Changes the directory; what `change` refuses is not written.
    pub fn change<T>(
        &self,
        change: impl FnOnce(&mut Directory) -> Result<T, String>,
    ) -> Result<T, String> {
        let opened = self.opened()?;
        let mut held = opened.lock();
        let mut next = held.clone()?;
        let done = change(&mut next)?;
        opened.area.write(&mut next).map_err(|e| e.to_string())?;
        *held = Ok(next);
        Ok(done)
    }

    /// Begins it anew, with nothing in it.
    pub fn forget_all(&self) -> Result<(), String> {
        let opened = self.opened()?;
        if let Some(memfds) = &opened.memfds {
            memfds.forget_all();
        }
        let mut held = opened.lock();
        let mut new = opened.empty();
        // Twice: whatever is left of an old one may not be the newest.
        new.generation = held.as_ref().map_or(1 << 32, |old| old.generation);
        for _ in 0..2 {
            opened.area.write(&mut new).map_err(|e| e.to_string())?;
        }
        *held = Ok(new);
        Ok(())
    }

    /// The place of a machine: its own, or a new one. Nothing that may be run is in it afterwards.
    pub fn place(&self, spec: &MachineSpec) -> Result<CarveOutSpec, String> {
        let (name, size) = (spec.name.as_str(), spec.memory.size);
        let room = record::room(spec.cpus);
        if self.opened()?.memfds.is_some() {
            self.give_back(name, false)?;
            return Ok(CarveOutSpec::memfd(size, room));
        }
        if let Some(entry) = self.directory()?.entry(name) {
            if let Some(why) = self.open_fate(entry) {
                return Err(why);
            }
            if entry.ram.len != size || entry.record.len < room {
                return Err(format!(
                    "`{name}` has {} MiB in the carve-out, and {} MiB are wanted now; `stillpoint rm \
                     {name}` gives them back",
                    entry.ram.len >> 20,
                    size >> 20
                ));
            }
        } else {
            self.change(|directory| {
                let added = directory.allocate(name, size, room, String::new());
                added.map(drop).map_err(|e| e.to_string())
            })?;
        }
        let directory = self.directory()?;
        let entry = directory.entry(name).ok_or("its place is gone again")?;
        self.record(entry)?.clear().map_err(|e| e.to_string())?;
        Ok(self.spec_of(entry))
    }

    /// An entry as a spec tells it.
    pub fn spec_of(&self, entry: &Entry) -> CarveOutSpec {
        CarveOutSpec {
            path: self.path().unwrap_or(Path::new("")).to_owned(),
            ram: entry.ram.start,
            record: entry.record.start,
            record_len: entry.record.len,
        }
    }

    /// Why a machine's memory can't be given to anybody: its guest may yet be run.
    fn open_fate(&self, entry: &Entry) -> Option<String> {
        let stored = self.mark(entry) == Ok(Mark::Stored);
        let name = &entry.vm;
        stored.then(|| {
            format!(
                "`{name}` is stored for another kernel and may yet be run from there: `stillpoint adopt --retry \
                 {name}` does, `stillpoint adopt --forget {name}` gives it up"
            )
        })
    }

    /// Gives a machine's memory back. With `anyhow` also that of one which may yet be run.
    pub fn give_back(&self, vm: &str, anyhow: bool) -> Result<bool, String> {
        if self.0.is_err() {
            return Ok(false);
        }
        let directory = self.directory()?;
        let Some(entry) = directory.entry(vm) else {
            return Ok(false);
        };
        if let Some(why) = self.open_fate(entry).filter(|_| !anyhow) {
            return Err(why);
        }
        match (&self.opened()?.memfds, entry.token) {
            (Some(memfds), Some(_)) => memfds.forget(vm),
            _ => self.record(entry)?.clear().map_err(|e| e.to_string())?,
        }
        self.change(|directory| Ok(directory.free_of(vm)))
    }

    fn record(&self, entry: &Entry) -> Result<Place, String> {
        let opened = self.opened()?;
        let place = match self.memory_of(entry)? {
            None => Place::of(opened.area.device(), entry.record),
            Some(memfd) => {
                Device::of(&opened.path, memfd).and_then(|device| Place::of(&device, entry.record))
            }
        };
        place.map_err(|e| e.to_string())
    }

    /// What the mark of a machine's record says.
    pub fn mark(&self, entry: &Entry) -> Result<Mark, String> {
        match &self.opened()?.memfds {
            Some(memfds) if memfds.is_let_go(entry) => Ok(Mark::Consumed),
            _ => Ok(self.record(entry)?.mark()),
        }
    }

    /// What is said of a machine's record.
    pub fn label(&self, entry: &Entry) -> Result<Label, String> {
        let read = self.record(entry)?.read();
        read.map(|record| record.label).map_err(|e| e.to_string())
    }
}

impl Opened {
    /// A directory with nothing in it.
    fn empty(&self) -> Directory {
        match self.memfds {
            Some(_) => Directory::default(),
            None => Directory::new(self.area.device().size()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Result<Directory, String>> {
        self.directory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, mib: u64) -> MachineSpec {
        let text = format!(
            r#"{{"name":"{name}","kernel":{{"path":"/k"}},"memory":{{"size":{},"survive":"kernel"}}}}"#,
            mib << 20
        );
        MachineSpec::from_json(&text).expect("a spec")
    }

    fn carve_out(mib: u64) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("carve-out");
        let file = std::fs::File::create(&path).expect("a file");
        file.set_len(mib << 20).expect("sized");
        (dir, path)
    }

    #[test]
    fn a_machine_keeps_its_place_until_it_is_removed() {
        let (_dir, path) = carve_out(64);
        let carve_out = CarveOut::open(&path, false).expect("opened");
        let first = carve_out.place(&spec("a", 16)).expect("room");
        assert_eq!(carve_out.place(&spec("a", 16)), Ok(first.clone()));
        let other = carve_out.place(&spec("a", 18)).expect_err("another size");
        assert!(other.contains("stillpoint rm a"), "{other}");
        let full = carve_out.place(&spec("b", 64)).expect_err("too much");
        assert!(full.contains("MiB left"), "{full}");
        drop(carve_out);
        let carve_out = CarveOut::open(&path, true).expect("opened again");
        assert_eq!(carve_out.place(&spec("a", 16)), Ok(first));
        assert_eq!(carve_out.give_back("a", false), Ok(true));
        assert_eq!(carve_out.give_back("a", false), Ok(false));
    }

    #[test]
    fn a_directory_that_should_be_there_is_not_made_anew() {
        let (_dir, path) = carve_out(64);
        let carve_out = CarveOut::open(&path, true).expect("opened");
        let why = carve_out.place(&spec("a", 16)).expect_err("no directory");
        assert!(
            why.contains("no directory") && why.contains("--forget-all"),
            "{why}"
        );
        carve_out.forget_all().expect("as asked");
        carve_out.place(&spec("a", 16)).expect("a new one");
    }

    #[test]
    fn without_one_nothing_is_promised() {
        let none = CarveOut::none("this kernel has no live update");
        let why = none.place(&spec("a", 16)).expect_err("none");
        assert!(
            why.contains("--carve-out") && why.contains("no live update"),
            "{why}"
        );
        assert_eq!(none.give_back("a", false), Ok(false));
    }
}

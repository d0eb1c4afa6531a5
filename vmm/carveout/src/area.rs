//! The directory and the records in the memory.
//!
//! Must never: write a directory without its lock, or a record whose mark says *stored*.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use crate::directory::{COPY, Directory, DirectoryError};
use crate::layout::{DIRECTORY, Extent};
use crate::map::{Device, MapError, Mapping};
use crate::mark::Mark;
use crate::record::{BODY_AT, HEADER, HEADER_AT, Header, MARK_AT, Record, RecordError};

/// For the lock of one who let go of it: a process that it forked has it too until it executes its program.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two tries.
const GLANCE: Duration = Duration::from_millis(5);

/// Why the carve-out can't be used.
#[derive(Debug, thiserror::Error)]
pub enum AreaError {
    /// The memory.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The directory.
    #[error("the carve-out {path}: {source}")]
    Directory {
        /// Which.
        path: String,
        /// Why not.
        source: DirectoryError,
    },
    /// Somebody else writes it.
    #[error("another stillpointd uses the carve-out {0}; end it, or give this one another")]
    Locked(String),
    /// Too small.
    #[error("the carve-out {path} has {size} bytes, too few for a directory and a guest")]
    TooSmall {
        /// Which.
        path: String,
        /// Its size.
        size: u64,
    },
}

/// A carve-out with its directory, held by the one who may write it.
#[derive(Debug)]
pub struct Area {
    device: Device,
    mapping: Mapping,
}

impl Area {
    /// Opens it for the one who writes it. The lock ends with the process.
    pub fn open(path: &Path) -> Result<Self, AreaError> {
        let device = Device::open(path)?;
        match device.size() {
            size if size < 4 * DIRECTORY => Err(AreaError::TooSmall {
                path: path.display().to_string(),
                size,
            }),
            _ => Self::of(device),
        }
    }

    /// One that was opened by somebody else; it may be a file that holds the directory alone.
    pub fn of(device: Device) -> Result<Self, AreaError> {
        let shown = device.path().display().to_string();
        let deadline = Instant::now() + PATIENCE;
        let lock = || rustix::fs::flock(&device, FlockOperation::NonBlockingLockExclusive);
        while lock().is_err() {
            if Instant::now() >= deadline {
                return Err(AreaError::Locked(shown));
            }
            std::thread::sleep(GLANCE);
        }
        let mapping = device.map(Extent {
            start: 0,
            len: DIRECTORY,
        })?;
        Ok(Self { device, mapping })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Reads the directory.
    pub fn read(&self) -> Result<Directory, AreaError> {
        let copy = |slot: usize| {
            let mut bytes = vec![0; COPY];
            self.mapping.read((slot * COPY) as u64, &mut bytes);
            bytes
        };
        let copies = [copy(0), copy(1)];
        Directory::newest([&copies[0], &copies[1]]).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: DirectoryError) -> AreaError {
        AreaError::Directory {
            path: self.device.path().display().to_string(),
            source,
        }
    }

    /// Writes it, as the next generation. Whatever cuts this off leaves the one before.
    pub fn write(&self, directory: &mut Directory) -> Result<(), AreaError> {
        let mut next = directory.clone();
        next.generation += 1;
        let bytes = next.encode().map_err(|source| self.failed(source))?;
        let at = (next.slot() * COPY) as u64;
        // The older copy stops being one before it is written over.
        self.mapping.write(at, &[0; 8]);
        self.mapping.flush(at, 8)?;
        self.mapping.write(at + 8, &bytes[8..]);
        self.mapping.flush(at + 8, bytes.len() - 8)?;
        self.mapping.write(at, &bytes[..8]);
        self.mapping.flush(at, 8)?;
        *directory = next;
        Ok(())
    }
}

/// The place of one guest's record.
#[derive(Debug)]
pub struct Place {
    mapping: Mapping,
}

/// Why a record was not stored, withdrawn or consumed.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The memory.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Its mark is not what it must be.
    #[error("its record is marked as {found}, not as {wanted}")]
    Mark {
        /// What it is.
        found: Mark,
        /// What it must be.
        wanted: Mark,
    },
}

impl Place {
    /// The record's place of this extent.
    pub fn of(device: &Device, extent: Extent) -> Result<Self, MapError> {
        let mapping = device.map(extent)?;
        Ok(Self { mapping })
    }

    /// What its mark says.
    pub fn mark(&self) -> Mark {
        Mark::of(self.mapping.load(MARK_AT))
    }

    /// Says that there is nothing here.
    pub fn clear(&self) -> Result<(), MapError> {
        self.mapping.store(MARK_AT, Mark::Empty.word())
    }

    /// Stores a record: from here on the guest may be run under the next kernel.
    pub fn store(&self, record: &Record) -> Result<(), PlaceError> {
        let (header, body) = record.encode(self.mapping.len())?;
        self.clear()?;
        self.mapping.write(BODY_AT, &body);
        self.mapping.write(HEADER_AT, &header);
        self.mapping.flush(BODY_AT, body.len())?;
        self.mapping.flush(HEADER_AT, header.len())?;
        self.exchange(Mark::Empty, Mark::Stored)
    }

    /// Reads the record, whatever its mark says.
    pub fn read(&self) -> Result<Record, RecordError> {
        let mut header = [0; HEADER];
        self.mapping.read(HEADER_AT, &mut header);
        let header = Header::decode(&header, self.mapping.len())?;
        let mut body = vec![0; header.body_len()];
        self.mapping.read(BODY_AT, &mut body);
        Record::decode(&header, &body)
    }

    /// Its guest is to run on where it is: nobody may run it from the record any more.
    pub fn withdraw(&self) -> Result<(), PlaceError> {
        self.exchange(Mark::Stored, Mark::Withdrawn)
    }

    /// Its guest is ours: nobody may run it from the record any more.
    pub fn consume(&self) -> Result<(), PlaceError> {
        self.exchange(Mark::Stored, Mark::Consumed)
    }

    fn exchange(&self, wanted: Mark, new: Mark) -> Result<(), PlaceError> {
        let done = self.mapping.exchange(MARK_AT, wanted.word(), new.word())?;
        done.map_err(|found| PlaceError::Mark {
            found: Mark::of(found),
            wanted,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::record;

    fn carve_out() -> (tempfile::TempDir, Area) {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("carve-out");
        let file = std::fs::File::create(&path).expect("a file");
        file.set_len(64 << 20).expect("sized");
        let area = Area::open(&path).expect("opened");
        (dir, area)
    }

    #[test]
    fn the_directory_survives_whoever_wrote_it() {
        let (dir, area) = carve_out();
        let path = dir.path().join("carve-out");
        let absent = area.read().expect_err("a new one").to_string();
        assert!(absent.contains("no directory in it yet"), "{absent}");
        let mut directory = Directory::new(area.device().size());
        for generation in 1..5 {
            area.write(&mut directory).expect("written");
            assert_eq!(area.read().expect("read").generation, generation);
        }
        let busy = Area::open(&path).expect_err("locked").to_string();
        assert!(busy.contains("another stillpointd"), "{busy}");
        drop(area);
        let area = Area::open(&path).expect("free again");
        assert_eq!(area.read().expect("read"), directory);
        // The newest copy is lost: the one before it counts.
        area.mapping
            .write((directory.slot() * COPY + 60) as u64, b"xx");
        assert_eq!(area.read().expect("the other").generation, 3);
        let other = 1 - directory.slot();
        area.mapping.write((other * COPY + 60) as u64, b"xx");
        let damaged = area.read().expect_err("neither").to_string();
        assert!(damaged.contains("damaged in both copies"), "{damaged}");
    }

    #[test]
    fn a_record_is_run_once_at_most() {
        let (_dir, area) = carve_out();
        let extent = Extent {
            start: 4 << 20,
            len: 4 << 20,
        };
        let place = || Place::of(area.device(), extent).expect("mapped");
        let (ours, theirs) = (place(), place());
        assert!(matches!(ours.mark(), Mark::Unknown(0)));
        ours.consume().expect_err("nothing is stored");
        ours.store(&record()).expect("stored");
        assert_eq!(theirs.read(), Ok(record()));
        theirs.consume().expect("it is stored");
        let late = ours.withdraw().expect_err("it was taken").to_string();
        assert!(late.contains("consumed, not as stored"), "{late}");
        theirs.consume().expect_err("once");
        ours.store(&record()).expect("another time");
        ours.withdraw().expect("the guest runs on");
        theirs.consume().expect_err("it runs elsewhere");
        assert_eq!(theirs.mark(), Mark::Withdrawn);
    }
}

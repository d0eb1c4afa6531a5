//! The directory: whose extents these are, and which jump is under way.
//!
//! It lies in the carve-out twice, each copy with a generation and a digest over all of it. A new one
//! is written over the older copy, so whatever cuts the writing off, the other is whole. Written by the
//! daemon alone, under a lock. Pure: bytes to values and back.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::layout::{self, DIRECTORY, Extent};
use crate::wall::Carried;

/// Room for one copy.
pub const COPY: usize = (DIRECTORY / 2) as usize;
const MAGIC: [u8; 8] = *b"STLPDIR\x01";
const HEADER: usize = 56;

/// What lies where.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Directory {
    /// Counts up with every writing.
    #[serde(skip)]
    pub generation: u64,
    /// Bytes of the carve-out when this was first written.
    pub size: u64,
    /// The jump that is under way: set when every guest of it is stored, right before it.
    #[serde(default)]
    pub jump: Option<Jump>,
    /// One for each guest with memory here.
    #[serde(default)]
    pub entries: Vec<Entry>,
}

/// A jump into another kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Jump {
    /// On the next kernel's command line too; adoption needs both to be the same.
    pub nonce: String,
    /// Id of the swap of the host.
    pub swap: String,
    /// `uname -r` of the kernel that was left.
    pub from: String,
    /// The kernel that was jumped into has found it, and has set the host's wall clock by it.
    #[serde(default)]
    pub arrived: bool,
    /// The host's wall clock, as it was carried along.
    pub wall: Option<Carried>,
    /// The daemon's record of the swap, in its own words.
    #[serde(default)]
    pub kept: String,
}

/// A guest's memory here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The machine's name.
    pub vm: String,
    /// Its RAM.
    pub ram: Extent,
    /// Its record.
    pub record: Extent,
    /// The token by which live update keeps the memfd that both lie in, the guest's own; absent where they lie
    /// in a carve-out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<u64>,
    /// The daemon's record of the machine, in its own words.
    #[serde(default)]
    pub kept: String,
}

impl Entry {
    /// Whether RAM and record are a file with nothing else in it.
    fn is_a_file(&self) -> bool {
        let whole = |extent: &Extent| {
            extent.len > 0
                && extent.len.is_multiple_of(layout::ALIGN)
                && extent.start.is_multiple_of(layout::ALIGN)
        };
        self.ram.start == 0
            && self.ram.end() == Some(self.record.start)
            && self.record.end().is_some()
            && whole(&self.ram)
            && whole(&self.record)
    }
}

/// Why there is no directory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DirectoryError {
    /// Never written, as far as can be told.
    #[error("there is no directory in it yet")]
    Absent,
    /// Written once, and neither copy is whole.
    #[error("its directory is damaged in both copies ({0})")]
    Damaged(String),
    /// It does not fit.
    #[error("its directory would be {0} bytes, more than the {COPY} it has room for")]
    TooLarge(usize),
}

/// Why there is no room.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// Not enough of it.
    #[error(
        "the carve-out has {} MiB left, in pieces; {} MiB in one are needed, and {} MiB beside it",
        free >> 20, ram >> 20, record >> 20
    )]
    Full {
        /// What is left, bytes.
        free: u64,
        /// RAM, bytes.
        ram: u64,
        /// Record, bytes.
        record: u64,
    },
    /// The name is taken.
    #[error("`{0}` has memory in the carve-out already")]
    Taken(String),
}

impl Directory {
    /// An empty one for a carve-out of this size.
    pub fn new(size: u64) -> Self {
        Self {
            size: size / layout::ALIGN * layout::ALIGN,
            ..Self::default()
        }
    }

    /// The entry of this machine.
    pub fn entry(&self, vm: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.vm == vm)
    }

    /// Extents of the carve-out itself.
    fn taken(&self) -> Vec<Extent> {
        let of = |entry: &Entry| [entry.ram, entry.record];
        let carved = self.entries.iter().filter(|entry| entry.token.is_none());
        carved.flat_map(of).collect()
    }

    /// Bytes that nobody has.
    pub fn free(&self) -> u64 {
        layout::free(self.size, &self.taken())
    }

    /// Finds room for a machine.
    pub fn allocate(
        &mut self,
        vm: &str,
        ram: u64,
        record: u64,
        kept: String,
    ) -> Result<&Entry, NoRoom> {
        if self.entry(vm).is_some() {
            return Err(NoRoom::Taken(vm.to_owned()));
        }
        let full = NoRoom::Full {
            free: self.free(),
            ram,
            record: layout::rounded(record),
        };
        let mut taken = self.taken();
        let ram = layout::find_room(self.size, &taken, ram).ok_or_else(|| full.clone())?;
        taken.push(ram);
        let record = layout::find_room(self.size, &taken, record).ok_or(full)?;
        self.entries.push(Entry {
            vm: vm.to_owned(),
            ram,
            record,
            token: None,
            kept,
        });
        Ok(&self.entries[self.entries.len() - 1])
    }

    /// Gives a machine's room back; whether it had any.
    pub fn free_of(&mut self, vm: &str) -> bool {
        let before = self.entries.len();
        self.entries.retain(|entry| entry.vm != vm);
        self.entries.len() < before
    }

    /// What is wrong with it, if anything is: names twice, extents that overlap or can't be.
    fn problem(&self) -> Option<String> {
        let taken = self.taken();
        if let Some(bad) = taken.iter().find(|extent| !extent.is_sound(self.size)) {
            return Some(format!("an extent that can't be: {bad:?}"));
        }
        for (number, extent) in taken.iter().enumerate() {
            if taken[..number].iter().any(|other| other.overlaps(extent)) {
                return Some(format!("two extents overlap at {:#x}", extent.start));
            }
        }
        for (number, entry) in self.entries.iter().enumerate() {
            let others = &self.entries[..number];
            if others.iter().any(|other| other.vm == entry.vm) {
                return Some(format!("`{}` is there twice", entry.vm));
            }
            let same = |other: &Entry| entry.token.is_some() && other.token == entry.token;
            if others.iter().any(same) {
                return Some(format!("`{}` has the token of another", entry.vm));
            }
            if entry.token.is_some() && !entry.is_a_file() {
                return Some(format!("`{}` has a memfd that can't be", entry.vm));
            }
        }
        None
    }

    /// As one copy: header and body, in the order in which they lie.
    pub fn encode(&self) -> Result<Vec<u8>, DirectoryError> {
        let body = serde_json::to_vec(self).unwrap_or_default();
        let len = HEADER + body.len();
        if len > COPY {
            return Err(DirectoryError::TooLarge(len));
        }
        let mut bytes = Vec::with_capacity(len);
        bytes.extend(MAGIC);
        bytes.extend((body.len() as u64).to_le_bytes());
        bytes.extend(self.generation.to_le_bytes());
        bytes.extend(digest(self.generation, &body));
        bytes.extend(body);
        Ok(bytes)
    }

    /// One copy, if it is whole.
    fn decode(copy: &[u8]) -> Result<Self, DirectoryError> {
        let damaged = |why: &str| DirectoryError::Damaged(why.to_owned());
        let (header, rest) = copy
            .split_at_checked(HEADER)
            .ok_or(DirectoryError::Absent)?;
        if header[..8] != MAGIC {
            return Err(DirectoryError::Absent);
        }
        let number = |at: usize| {
            let bytes = header[at..at + 8].try_into().unwrap_or([0; 8]);
            u64::from_le_bytes(bytes)
        };
        let (len, generation) = (number(8), number(16));
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let body = rest
            .get(..len)
            .ok_or_else(|| damaged("a length beyond its room"))?;
        if digest(generation, body) != header[24..HEADER] {
            return Err(damaged("its digest is another"));
        }
        let read: Self =
            serde_json::from_slice(body).map_err(|e| DirectoryError::Damaged(e.to_string()))?;
        match read.problem() {
            Some(problem) => Err(DirectoryError::Damaged(problem)),
            None => Ok(Self { generation, ..read }),
        }
    }

    /// The newest whole one of two copies.
    pub fn newest(copies: [&[u8]; 2]) -> Result<Self, DirectoryError> {
        match copies.map(Self::decode) {
            [Ok(a), Ok(b)] if b.generation > a.generation => Ok(b),
            [Ok(a), _] => Ok(a),
            [_, Ok(b)] => Ok(b),
            [Err(DirectoryError::Absent), Err(error)] | [Err(error), _] => Err(error),
        }
    }

    /// The copy that this generation is written over.
    pub fn slot(&self) -> usize {
        usize::from(self.generation % 2 == 1)
    }
}

fn digest(generation: u64, body: &[u8]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(generation.to_le_bytes());
    hasher.update((body.len() as u64).to_le_bytes());
    hasher.update(body);
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;

    fn directory(generation: u64) -> Directory {
        let mut directory = Directory::new(256 * M + 4096);
        directory
            .allocate("a", 64 * M, M, "{}".into())
            .expect("room");
        directory
            .allocate("b", 32 * M, M, String::new())
            .expect("room");
        directory.generation = generation;
        directory
    }

    #[test]
    fn it_comes_back_as_it_was() {
        let written = directory(7);
        let bytes = written.encode().expect("it fits");
        assert_eq!(Directory::newest([&bytes, &[]]), Ok(written.clone()));
        assert_eq!(Directory::newest([&[0; COPY], &bytes]), Ok(written));
        assert_eq!(
            Directory::newest([&[0; COPY], &[0; COPY]]),
            Err(DirectoryError::Absent)
        );
    }

    #[test]
    fn a_writing_that_is_cut_off_anywhere_leaves_the_one_before() {
        let (old, new) = (directory(6), directory(7));
        let old_bytes = old.encode().expect("it fits");
        let mut new = new;
        assert!(new.free_of("b"));
        let new_bytes = new.encode().expect("it fits");
        let stale = directory(5).encode().expect("it fits");
        for cut in 0..new_bytes.len() {
            let mut torn = stale.clone();
            torn.resize(torn.len().max(new_bytes.len()), 0);
            torn[..cut].copy_from_slice(&new_bytes[..cut]);
            let read = Directory::newest([&torn, &old_bytes]).expect("one is whole");
            assert_eq!(read, old, "cut off after {cut} bytes");
        }
        let read = Directory::newest([&new_bytes, &old_bytes]);
        assert_eq!(read, Ok(new));
    }

    #[test]
    fn a_byte_that_changed_is_seen_wherever_it_is() {
        let bytes = directory(3).encode().expect("it fits");
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            let error = Directory::newest([&bad, &bad]).expect_err("not whole");
            let seen = matches!(error, DirectoryError::Damaged(_));
            assert!(seen || at < 8, "byte {at}: {error}");
        }
    }

    #[test]
    fn a_directory_that_can_not_be_is_damaged_however_whole_its_bytes_are() {
        let mut overlapping = directory(1);
        overlapping.entries[1].ram = overlapping.entries[0].ram;
        let mut outside = directory(1);
        outside.entries[0].ram.len = 1 << 40;
        let mut twice = directory(1);
        twice.entries[1].vm = "a".into();
        for (bad, word) in [
            (overlapping, "overlap"),
            (outside, "can't be"),
            (twice, "twice"),
        ] {
            let bytes = bad.encode().expect("it fits");
            let error = Directory::newest([&bytes, &[]]).expect_err("refused");
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn memfds_lie_in_no_carve_out_and_have_a_token_each() {
        let entry = |vm: &str, token| Entry {
            vm: vm.into(),
            ram: Extent {
                start: 0,
                len: 64 * M,
            },
            record: Extent {
                start: 64 * M,
                len: 4 * M,
            },
            token: Some(token),
            kept: String::new(),
        };
        let mut directory = Directory::new(0);
        directory.entries = vec![entry("a", 1), entry("b", 2)];
        let bytes = directory.encode().expect("it fits");
        assert_eq!(Directory::newest([&bytes, &[]]), Ok(directory.clone()));
        let mut same = directory.clone();
        same.entries[1].token = Some(1);
        let mut apart = directory;
        apart.entries[0].record.start = 66 * M;
        for (bad, word) in [(same, "token of another"), (apart, "can't be")] {
            let bytes = bad.encode().expect("it fits");
            let error = Directory::newest([&bytes, &[]]).expect_err("refused");
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn room_is_given_once_and_taken_back() {
        let mut directory = directory(1);
        let taken = directory.allocate("a", M, M, String::new());
        assert_eq!(taken.expect_err("taken"), NoRoom::Taken("a".into()));
        let error = directory.allocate("c", 200 * M, M, String::new());
        let error = error.expect_err("full").to_string();
        assert!(
            error.contains("154 MiB left") && error.contains("200 MiB"),
            "{error}"
        );
        assert!(directory.free_of("a") && !directory.free_of("a"));
        directory
            .allocate("c", 64 * M, M, String::new())
            .expect("a's place");
        assert_eq!(directory.entry("c").map(|c| c.ram.start), Some(2 * M));
    }
}

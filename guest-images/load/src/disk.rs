//! Verified writes to a disk.
//!
//! Several threads, each with blocks of its own (block number modulo threads), so that every
//! block has one order of writes. A thread writes blocks at random, each with a sequence number;
//! after every few it syncs, and only then journals them as durable. Now and then it reads a
//! block that it knows back: it must be exactly what was written last.
//!
//! What was written and not yet journaled is not claimed: after the guest's end the disk may
//! hold it or not.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::fs::OFlags;
use serde::Serialize;

use crate::block::{Block, Found, SIZE};
use crate::journal::{Entry, Journal};
use crate::report::Report;
use crate::term;

/// A block is read back after one write in this many.
const READ_BACK: u32 = 4;

/// What to write where.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Block device or file; what is on it is overwritten.
    #[arg(long, value_name = "PATH")]
    pub(crate) device: PathBuf,
    /// Where the randomness comes from; without it, from anywhere.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// How long to write.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub(crate) duration: u64,
    /// How many writes, instead.
    #[arg(long, value_name = "N")]
    pub(crate) writes: Option<u64>,
    /// How many writes of a thread before it syncs.
    #[arg(long, value_name = "K", default_value_t = 16)]
    pub(crate) fsync_every: usize,
    /// Writes in flight.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub(crate) threads: u64,
    /// Uses no more than the first so many MiB.
    #[arg(long, value_name = "MIB")]
    pub(crate) span: Option<u64>,
    /// Where the journal goes: a file, vsock:CID:PORT, or - for standard output.
    #[arg(long, value_name = "TARGET", default_value = "-")]
    pub(crate) journal: String,
    /// Goes through the page cache.
    #[arg(long)]
    pub(crate) buffered: bool,
    /// Goes on after I/O errors, and counts them.
    #[arg(long)]
    pub(crate) keep_going: bool,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct DiskReport {
    load: &'static str,
    ok: bool,
    seed: u64,
    blocks: u64,
    /// Writes that were acknowledged.
    pub(crate) writes: u64,
    /// Of these, those that were made durable and journaled.
    pub(crate) durable: u64,
    syncs: u64,
    /// Blocks read back.
    pub(crate) reads: u64,
    /// Blocks that were not what was written last; the first few in words.
    pub(crate) wrong: u64,
    /// Writes, reads and syncs that failed.
    pub(crate) io_errors: u64,
    complaints: Vec<String>,
    longest_write_ms: u64,
    longest_sync_ms: u64,
    seconds: f64,
}

impl Report for DiskReport {
    fn ok(&self) -> bool {
        self.ok
    }

    fn sentence(&self) -> String {
        let Self {
            writes,
            durable,
            reads,
            wrong,
            io_errors,
            ..
        } = self;
        format!(
            "disk: {writes} writes, {durable} durable, {reads} read back, {wrong} of them wrong, \
             {io_errors} I/O errors"
        )
    }
}

/// Writes until the time or the number is up.
pub(crate) fn run(args: &Args) -> anyhow::Result<DiskReport> {
    let run = Run::open(args)?;
    let begun = Instant::now();
    let mut report = DiskReport {
        load: "disk",
        seed: run.seed,
        blocks: run.blocks,
        ..DiskReport::default()
    };
    let counts: anyhow::Result<Vec<DiskReport>> = std::thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = (0..args.threads)
            .map(|index| scope.spawn(move || Worker::new(run, index).run()))
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread
                .join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))
        };
        threads.into_iter().map(join).collect()
    });
    for count in counts? {
        report.add(count);
    }
    report.ok = report.wrong == 0 && report.io_errors == 0;
    report.seconds = begun.elapsed().as_secs_f64();
    if args.journal != "-" {
        run.journal
            .write(&Entry::Report(serde_json::to_value(&report)?))?;
    }
    Ok(report)
}

fn open(args: &Args) -> io::Result<File> {
    let flags = if args.buffered {
        OFlags::empty()
    } else {
        OFlags::DIRECT
    };
    let flags = i32::try_from(flags.bits()).unwrap_or_default();
    File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(&args.device)
}

impl DiskReport {
    fn add(&mut self, other: Self) {
        self.writes += other.writes;
        self.durable += other.durable;
        self.syncs += other.syncs;
        self.reads += other.reads;
        self.wrong += other.wrong;
        self.io_errors += other.io_errors;
        self.longest_write_ms = self.longest_write_ms.max(other.longest_write_ms);
        self.longest_sync_ms = self.longest_sync_ms.max(other.longest_sync_ms);
        self.complaints.extend(other.complaints);
        self.complaints.truncate(8);
    }
}

/// What the threads share.
struct Run<'a> {
    args: &'a Args,
    device: File,
    seed: u64,
    blocks: u64,
    journal: Journal,
    sequence: AtomicU64,
    /// A thread has failed: the others end as well.
    stop: AtomicBool,
    end: Instant,
}

impl<'a> Run<'a> {
    /// Opens disk and journal, and begins the journal.
    fn open(args: &'a Args) -> anyhow::Result<Self> {
        let some = args.threads > 0 && args.fsync_every > 0;
        ensure!(some, "neither --threads nor --fsync-every may be 0");
        let device = open(args).with_context(|| format!("opening {}", args.device.display()))?;
        let size = (&device)
            .seek(SeekFrom::End(0))
            .context("asking for the disk's size")?;
        let span = args
            .span
            .map_or(size, |mib| size.min(mib.saturating_mul(1 << 20)));
        let blocks = span / SIZE as u64;
        let name = args.device.display();
        ensure!(
            blocks >= args.threads,
            "{name} has fewer blocks of 4 KiB than there are threads"
        );
        let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
        let journal = Journal::open(&args.journal)?;
        journal.write(&Entry::Begin { seed, blocks })?;
        Ok(Self {
            args,
            device,
            seed,
            blocks,
            journal,
            sequence: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            end: Instant::now() + Duration::from_secs(args.duration),
        })
    }

    /// The next sequence number; they begin at 1. None when it is time to end.
    fn next(&self) -> Option<u64> {
        if self.stop.load(Ordering::Relaxed) {
            return None;
        }
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        let more = match self.args.writes {
            Some(writes) => sequence <= writes,
            None => term::goes_on(self.end),
        };
        more.then_some(sequence)
    }
}

/// A thread, with the blocks whose number is its own modulo threads.
struct Worker<'a> {
    run: &'a Run<'a>,
    index: u64,
    random: fastrand::Rng,
    block: Box<Block>,
    /// What was written last to each block.
    latest: HashMap<u64, u64>,
    written: Vec<u64>,
    /// Written since the last sync.
    pending: Vec<(u64, u64)>,
    count: DiskReport,
}

impl<'a> Worker<'a> {
    fn new(run: &'a Run<'a>, index: u64) -> Self {
        Self {
            run,
            index,
            random: fastrand::Rng::with_seed(run.seed.wrapping_add(index)),
            block: Block::new(),
            latest: HashMap::new(),
            written: Vec::new(),
            pending: Vec::new(),
            count: DiskReport::default(),
        }
    }

    fn run(mut self) -> anyhow::Result<DiskReport> {
        let done = self.work();
        if done.is_err() {
            self.run.stop.store(true, Ordering::Relaxed);
        }
        done.map(|()| self.count)
    }

    fn work(&mut self) -> anyhow::Result<()> {
        while let Some(sequence) = self.run.next() {
            self.write(sequence)?;
            if self.pending.len() >= self.run.args.fsync_every {
                self.sync()?;
            }
            if self.random.u32(..READ_BACK) == 0 {
                self.read_back();
            }
        }
        self.sync()
    }

    fn write(&mut self, sequence: u64) -> anyhow::Result<()> {
        let threads = self.run.args.threads;
        // As many as every thread has.
        let place = self.random.u64(..self.run.blocks / threads);
        let number = place * threads + self.index;
        self.block.fill(self.run.seed, number, sequence);
        let begun = Instant::now();
        let written = self
            .run
            .device
            .write_all_at(&self.block, number * SIZE as u64);
        longest(&mut self.count.longest_write_ms, begun);
        match written {
            Ok(()) => {
                self.count.writes += 1;
                self.pending.push((number, sequence));
                if self.latest.insert(number, sequence).is_none() {
                    self.written.push(number);
                }
            }
            Err(error) => {
                // It may hold what it held, or what was to be written, or a part of that.
                self.run.journal.write(&Entry::Unsure(vec![number]))?;
                self.pending.retain(|(pending, _)| *pending != number);
                self.latest.remove(&number);
                self.written.retain(|written| *written != number);
                self.failed(&format!("writing block {number}"), &error);
            }
        }
        Ok(())
    }

    fn sync(&mut self) -> anyhow::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        let synced = self.run.device.sync_data();
        longest(&mut self.count.longest_sync_ms, begun);
        let pending = std::mem::take(&mut self.pending);
        match synced {
            Ok(()) => {
                self.count.syncs += 1;
                self.count.durable += pending.len() as u64;
                self.run.journal.write(&Entry::Durable(pending))?;
            }
            // Then they are not durable, and are not claimed to be.
            Err(error) => self.failed("syncing", &error),
        }
        Ok(())
    }

    fn read_back(&mut self) {
        let Some(number) = self.random.choice(&self.written).copied() else {
            return;
        };
        let read = self
            .run
            .device
            .read_exact_at(&mut self.block, number * SIZE as u64);
        match read {
            Err(error) => self.failed(&format!("reading block {number}"), &error),
            Ok(()) => {
                self.count.reads += 1;
                let found = self.block.judge(self.run.seed, number);
                let expected = self.latest.get(&number).copied().unwrap_or_default();
                if found != Found::Ours(expected) {
                    self.count.wrong += 1;
                    self.complain(format!(
                        "block {number} was written as of {expected} and reads as {found:?}"
                    ));
                }
            }
        }
    }

    fn failed(&mut self, what: &str, error: &io::Error) {
        self.count.io_errors += 1;
        self.complain(format!("{what}: {error}"));
        if !self.run.args.keep_going {
            self.run.stop.store(true, Ordering::Relaxed);
        }
    }

    fn complain(&mut self, text: String) {
        if self.count.complaints.len() < 8 {
            self.count.complaints.push(text);
        }
    }
}

fn longest(longest_ms: &mut u64, begun: Instant) {
    let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    *longest_ms = (*longest_ms).max(took);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(directory: &std::path::Path) -> Args {
        let device = directory.join("image");
        File::create(&device).unwrap().set_len(1 << 20).unwrap();
        Args {
            device,
            seed: Some(1),
            duration: 0,
            writes: Some(10),
            fsync_every: 4,
            threads: 1,
            span: None,
            journal: directory.join("journal").display().to_string(),
            buffered: true,
            keep_going: true,
        }
    }

    #[test]
    fn a_disk_that_forgets_is_found_out_by_reading_back() {
        let directory = tempfile::tempdir().unwrap();
        let args = args(directory.path());
        let run = Run::open(&args).unwrap();
        let mut worker = Worker::new(&run, 0);
        worker.write(1).unwrap();
        worker.read_back();
        assert_eq!((worker.count.reads, worker.count.wrong), (1, 0));
        run.device.set_len(0).unwrap();
        worker.read_back();
        assert_eq!(worker.count.io_errors, 1);
        run.device.set_len(1 << 20).unwrap();
        worker.read_back();
        assert_eq!((worker.count.reads, worker.count.wrong), (2, 1));
    }

    /// A write that failed claims nothing, and takes back nothing that was claimed before.
    #[test]
    fn failed_writes_are_journaled_as_unsure() {
        let directory = tempfile::tempdir().unwrap();
        let args = args(directory.path());
        let mut run = Run::open(&args).unwrap();
        let mut worker = Worker::new(&run, 0);
        worker.write(1).unwrap();
        worker.sync().unwrap();
        let durable = worker.written.clone();
        drop(worker);
        // A description that can't be written to: every write fails.
        run.device = File::open(&args.device).unwrap();
        let mut worker = Worker::new(&run, 0);
        for sequence in 2..5 {
            worker.write(sequence).unwrap();
        }
        worker.sync().unwrap();
        assert_eq!((worker.count.io_errors, worker.count.durable), (3, 0));
        let claims = crate::journal::Claims::read(args.journal.as_ref()).unwrap();
        assert!(claims.durable.keys().eq(&durable));
        assert!(!claims.unsure.is_empty());
    }
}

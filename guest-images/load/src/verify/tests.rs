//! A disk is written and checked; then it is damaged in every way that must be seen.

use std::os::unix::fs::FileExt;
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::block::SIZE;
use crate::disk;

const BLOCKS: u64 = 64;

fn args(directory: &Path) -> disk::Args {
    disk::Args {
        device: directory.join("image"),
        seed: Some(42),
        duration: 0,
        writes: Some(400),
        fsync_every: 8,
        threads: 3,
        span: None,
        journal: directory.join("journal").display().to_string(),
        buffered: true,
        keep_going: false,
    }
}

fn written() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let image = File::create(directory.path().join("image")).unwrap();
    image.set_len(BLOCKS * SIZE as u64).unwrap();
    let report = disk::run(&args(directory.path())).unwrap();
    assert!(report.ok(), "{report:?}");
    assert_eq!((report.writes, report.durable), (400, 400));
    assert!(report.reads > 50);
    directory
}

fn verify(directory: &TempDir) -> VerifyReport {
    let image = directory.path().join("image");
    let journal = directory.path().join("journal");
    run(&Args { image, journal }).unwrap()
}

fn image(directory: &TempDir) -> File {
    File::options()
        .write(true)
        .open(directory.path().join("image"))
        .unwrap()
}

/// Some block that the journal claims, and as of when.
fn claimed(directory: &TempDir) -> (u64, u64) {
    let claims = Claims::read(&directory.path().join("journal")).unwrap();
    claims.durable.into_iter().next().unwrap()
}

#[test]
fn what_was_written_is_found() {
    let directory = written();
    let report = verify(&directory);
    assert!(report.ok() && report.ended, "{report:?}");
    assert!(
        report.durable > 40 && report.exact == report.durable,
        "{report:?}"
    );
}

#[test]
fn a_wrong_bit_is_seen() {
    let directory = written();
    let (block, _) = claimed(&directory);
    image(&directory)
        .write_all_at(b"?", block * SIZE as u64 + 3000)
        .unwrap();
    let report = verify(&directory);
    assert!(!report.ok() && report.torn == 1, "{report:?}");
}

#[test]
fn a_durable_write_that_was_dropped_is_seen() {
    let directory = written();
    let (number, sequence) = claimed(&directory);
    // What was there before: an earlier write of the same block, or nothing.
    let mut block = Block::new();
    block.fill(42, number, sequence - 1);
    image(&directory)
        .write_all_at(&block, number * SIZE as u64)
        .unwrap();
    assert_eq!(verify(&directory).lost, 1);
    image(&directory)
        .write_all_at(&[0; SIZE], number * SIZE as u64)
        .unwrap();
    let report = verify(&directory);
    assert!(!report.ok() && report.lost == 1, "{report:?}");
}

#[test]
fn a_later_write_is_no_loss() {
    let directory = written();
    let (number, sequence) = claimed(&directory);
    let mut block = Block::new();
    block.fill(42, number, sequence + 1000);
    image(&directory)
        .write_all_at(&block, number * SIZE as u64)
        .unwrap();
    let report = verify(&directory);
    assert!(report.ok() && report.later == 1, "{report:?}");
}

#[test]
fn a_write_that_went_elsewhere_is_seen() {
    let directory = written();
    let (number, sequence) = claimed(&directory);
    let mut block = Block::new();
    block.fill(42, number + 1, sequence);
    image(&directory)
        .write_all_at(&block, number * SIZE as u64)
        .unwrap();
    assert_eq!(verify(&directory).misplaced, 1);
}

#[test]
fn an_image_that_was_cut_off_has_lost_its_end() {
    let directory = written();
    image(&directory).set_len(BLOCKS * SIZE as u64 / 2).unwrap();
    let report = verify(&directory);
    assert!(!report.ok() && report.lost > 10, "{report:?}");
}

/// A guest that is cut off: its journal ends in the middle of a line.
#[test]
fn a_journal_that_was_cut_off_claims_less() {
    let directory = written();
    let path = directory.path().join("journal");
    let text = std::fs::read(&path).unwrap();
    std::fs::write(&path, &text[..text.len() / 2]).unwrap();
    let report = verify(&directory);
    assert!(
        report.ok() && !report.ended && report.later > 0,
        "{report:?}"
    );
}

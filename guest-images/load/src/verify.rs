//! Checks a disk image, on the host, against what the guest was told is durable.
//!
//! Of a block that is durable as of some write the image must hold that write or a later one,
//! whole. Every other block may hold what it likes, but no part of one of this run's writes: a
//! write of one block is never split by anything between the guest and the image.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use anyhow::Context;
use serde::Serialize;

use crate::block::{Block, Found};
use crate::journal::Claims;
use crate::report::Report;

/// What to check.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The disk's image.
    #[arg(long, value_name = "FILE")]
    pub(crate) image: PathBuf,
    /// The journal of the run that wrote it.
    #[arg(long, value_name = "FILE")]
    pub(crate) journal: PathBuf,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct VerifyReport {
    load: &'static str,
    ok: bool,
    seed: u64,
    /// Whether the run came to its own end; a guest that was cut off left a journal that didn't.
    pub(crate) ended: bool,
    /// Blocks that must be found.
    pub(crate) durable: u64,
    /// Of these, those found as they were journaled.
    pub(crate) exact: u64,
    /// Of these, those found as of a later write.
    pub(crate) later: u64,
    /// Blocks found that were not claimed: written, but not yet journaled.
    pub(crate) unclaimed: u64,
    /// Durable blocks that are not there.
    pub(crate) lost: u64,
    /// Blocks of which only a part is there, durable or not.
    pub(crate) torn: u64,
    /// Blocks in the wrong place.
    pub(crate) misplaced: u64,
    /// The first few of these three, in words.
    complaints: Vec<String>,
}

impl Report for VerifyReport {
    fn ok(&self) -> bool {
        self.ok
    }

    fn sentence(&self) -> String {
        let Self {
            durable,
            exact,
            later,
            lost,
            torn,
            misplaced,
            ..
        } = self;
        format!(
            "verify: of {durable} durable blocks {exact} are exact, {later} later, {lost} lost; \
             {torn} torn, {misplaced} misplaced"
        )
    }
}

/// Checks block by block.
pub(crate) fn run(args: &Args) -> anyhow::Result<VerifyReport> {
    let claims = Claims::read(&args.journal)?;
    let image = || format!("the image {}", args.image.display());
    let mut file = File::open(&args.image).with_context(image)?;
    let mut report = VerifyReport {
        load: "verify",
        seed: claims.seed,
        ended: claims.ended,
        durable: claims.durable.len() as u64,
        ..VerifyReport::default()
    };
    let mut block = Block::new();
    for number in 0..claims.blocks {
        match file.read_exact(&mut block) {
            Ok(()) => {}
            // It is shorter than it was. What should have been there counts as lost.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => block[..].fill(0),
            Err(error) => return Err(error).with_context(image),
        }
        report.judge(&claims, number, block.judge(claims.seed, number));
    }
    report.ok = report.lost == 0 && report.torn == 0 && report.misplaced == 0;
    Ok(report)
}

impl VerifyReport {
    fn judge(&mut self, claims: &Claims, number: u64, found: Found) {
        if claims.unsure.contains(&number) {
            return;
        }
        let durable = claims.durable.get(&number).copied();
        match (found, durable) {
            (Found::Ours(found), Some(durable)) if found == durable => self.exact += 1,
            (Found::Ours(found), Some(durable)) if found > durable => self.later += 1,
            (Found::Ours(_), None) => self.unclaimed += 1,
            (Found::Foreign, None) => {}
            (Found::Torn, _) => {
                self.torn += 1;
                self.complain(number, found, durable);
            }
            (Found::Misplaced(_), _) => {
                self.misplaced += 1;
                self.complain(number, found, durable);
            }
            (Found::Ours(_) | Found::Foreign, Some(_)) => {
                self.lost += 1;
                self.complain(number, found, durable);
            }
        }
    }

    fn complain(&mut self, number: u64, found: Found, durable: Option<u64>) {
        if self.complaints.len() < 8 {
            let durable = durable.map_or("nothing".to_owned(), |sequence| sequence.to_string());
            self.complaints.push(format!(
                "block {number}: durable as of {durable}, holds {found:?}"
            ));
        }
    }
}

#[cfg(test)]
mod tests;

//! The journal: what a writer was told is durable, as it was told.
//!
//! Lines of JSON. It is believed only as far as it is whole: a last line without its newline
//! was still on its way when the writer's guest ended, and claims nothing.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::endpoint;

/// A line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Entry {
    /// The first line.
    Begin {
        /// The run's seed.
        seed: u64,
        /// Blocks of the disk, of 4 KiB each.
        blocks: u64,
    },
    /// Blocks and the sequence numbers as of which they are durable.
    Durable(Vec<(u64, u64)>),
    /// Blocks of which a write failed: what they hold is unknown until they are durable again.
    Unsure(Vec<u64>),
    /// The run is over. Read for no more than that.
    Report(serde_json::Value),
}

/// Where a journal is written to. Several threads write whole lines.
pub(crate) struct Journal(Mutex<Box<dyn Write + Send>>);

impl Journal {
    /// Opens `-` (standard output), `vsock:CID:PORT` (a listener there), or a file.
    pub(crate) fn open(target: &str) -> anyhow::Result<Self> {
        let sink: Box<dyn Write + Send> = match (target, target.strip_prefix("vsock:")) {
            ("-", _) => Box::new(std::io::stdout()),
            (_, Some(address)) => Box::new(endpoint::vsock(address)?),
            (path, None) => {
                let file = std::fs::File::create(path);
                Box::new(file.with_context(|| format!("creating the journal {path}"))?)
            }
        };
        Ok(Self(Mutex::new(sink)))
    }

    /// Writes a line. Only when this has returned may what it says be relied upon.
    pub(crate) fn write(&self, entry: &Entry) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        let mut sink = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let written = sink.write_all(&line).and_then(|()| sink.flush());
        written.context("writing the journal")
    }
}

/// What a journal claims, all of it taken together.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Claims {
    /// The run's seed.
    pub(crate) seed: u64,
    /// Blocks of the disk.
    pub(crate) blocks: u64,
    /// Blocks and the sequence numbers as of which they are durable.
    pub(crate) durable: HashMap<u64, u64>,
    /// Blocks that may hold anything.
    pub(crate) unsure: HashSet<u64>,
    /// Whether the run came to its own end.
    pub(crate) ended: bool,
}

impl Claims {
    /// Reads a journal.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let file = std::fs::File::open(path)
            .with_context(|| format!("opening the journal {}", path.display()))?;
        Self::parse(std::io::BufReader::new(file))
            .with_context(|| format!("the journal {}", path.display()))
    }

    fn parse(mut journal: impl BufRead) -> anyhow::Result<Self> {
        let mut claims = Self::default();
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            journal.read_until(b'\n', &mut line)?;
            if line.pop() != Some(b'\n') {
                ensure!(number > 1, "it is empty");
                return Ok(claims);
            }
            let entry = serde_json::from_slice(&line).with_context(|| format!("line {number}"))?;
            match (number, entry) {
                (1, Entry::Begin { seed, blocks }) => (claims.seed, claims.blocks) = (seed, blocks),
                (1, _) => bail!("it doesn't begin with a line that says so"),
                (_, Entry::Begin { .. }) => bail!("line {number} begins another run"),
                (_, Entry::Durable(blocks)) => claims.is_durable(&blocks),
                (_, Entry::Unsure(blocks)) => claims.unsure.extend(blocks),
                (_, Entry::Report(_)) => claims.ended = true,
            }
        }
        Ok(claims)
    }

    fn is_durable(&mut self, blocks: &[(u64, u64)]) {
        for (block, sequence) in blocks {
            let latest = self.durable.entry(*block).or_default();
            *latest = (*latest).max(*sequence);
            self.unsure.remove(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN: &str = "{\"begin\":{\"seed\":5,\"blocks\":9}}\n";

    #[test]
    fn claims_are_put_together() {
        let text = format!(
            "{BEGIN}{{\"durable\":[[1,10],[2,11]]}}\n{{\"unsure\":[1,3]}}\n{{\"durable\":[[1,12]]}}\n\
             {{\"report\":{{}}}}\n"
        );
        let claims = Claims::parse(text.as_bytes()).unwrap();
        let durable = HashMap::from([(1, 12), (2, 11)]);
        let unsure = HashSet::from([3]);
        let expected = Claims {
            seed: 5,
            blocks: 9,
            durable,
            unsure,
            ended: true,
        };
        assert_eq!(claims, expected);
    }

    #[test]
    fn a_last_line_that_is_cut_claims_nothing_and_a_broken_one_is_an_error() {
        let claims = Claims::parse(format!("{BEGIN}{{\"durable\":[[1,10]]}}").as_bytes());
        assert_eq!(claims.unwrap().durable.len(), 0);
        assert!(Claims::parse(format!("{BEGIN}{{\"dur\n{BEGIN}").as_bytes()).is_err());
        assert!(Claims::parse(&b""[..]).is_err());
        assert!(Claims::parse(&b"{\"durable\":[]}\n"[..]).is_err());
    }
}

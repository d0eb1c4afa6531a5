//! Swaps of the floor: its program, started for each batch.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, ensure};
use serde::Deserialize;
use stillpoint_tests::releases;

use crate::sample::Sample;
use crate::scene::{Scene, WORK_MIB};

#[derive(Deserialize)]
struct Output {
    samples: Vec<Line>,
}

#[derive(Deserialize)]
struct Line {
    host_ns: u64,
    guest_ns: Vec<u64>,
}

/// Beside this program.
fn program() -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe()
        .context("find our own program")?
        .with_file_name("stillpoint-floor");
    ensure!(
        path.is_file(),
        "{} is not built; run `make bench`",
        path.display()
    );
    Ok(path)
}

/// Boots the same guest and swaps it so many times.
pub(crate) fn swaps(scene: &Scene, count: u32) -> anyhow::Result<Vec<Sample>> {
    let out = tempfile::NamedTempFile::new()?;
    let status = Command::new(program()?)
        .arg("--kernel")
        .arg(releases::pulse()?)
        .args(["--vcpus", &scene.vcpus.to_string()])
        .args(["--ram-mib", &scene.memory_mib.to_string()])
        .args(["--touch-mib", &WORK_MIB.to_string()])
        .args(["--append", &scene.words()])
        .args(["--swaps", &count.to_string()])
        .arg("--out")
        .arg(out.path())
        .status()
        .context("start the floor")?;
    ensure!(status.success(), "the floor ended with {status}");
    let output: Output =
        serde_json::from_slice(&std::fs::read(out.path())?).context("what the floor wrote")?;
    let sample = |line: Line| Sample {
        host_ns: line.host_ns,
        unqueued_ns: Vec::new(),
        guest_ns: line.guest_ns,
        phases: Vec::new(),
        brownout: BTreeMap::new(),
    };
    Ok(output.samples.into_iter().map(sample).collect())
}

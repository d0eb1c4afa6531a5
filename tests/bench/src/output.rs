//! Files under `target/bench`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use stillpoint_tests::releases;

use crate::markdown;
use crate::picture;
use crate::run::Measured;
use crate::verdict::Report;

/// What was written.
#[derive(Debug)]
pub(crate) struct Files {
    /// Where.
    pub(crate) dir: PathBuf,
    /// Names in there.
    pub(crate) names: Vec<&'static str>,
}

/// Writes the report, the pictures, and each series' samples.
pub(crate) fn write(report: &Report, measured: &Measured) -> anyhow::Result<Files> {
    let root = releases::root();
    let dir = root.canonicalize().unwrap_or(root).join("target/bench");
    let samples = dir.join("samples");
    // Samples of an earlier run with other options would pass for this one's.
    if samples.exists() {
        std::fs::remove_dir_all(&samples).context("clear old samples")?;
    }
    std::fs::create_dir_all(&samples).context("make target/bench/samples")?;
    for series in &measured.series {
        let who = series.who.name().to_lowercase().replace(' ', "-");
        let name = format!("{}-{who}.json", series.scene.id);
        put(&samples, &name, &serde_json::to_string_pretty(series)?)?;
    }
    put(&dir, "report.json", &serde_json::to_string_pretty(report)?)?;
    put(&dir, "blackout.svg", &picture::blackout(report, measured))?;
    put(&dir, "phases.svg", &picture::phases(report))?;
    put(&dir, "blackout.md", &markdown::render(report))?;
    let names = vec![
        "report.json",
        "blackout.md",
        "blackout.svg",
        "phases.svg",
        "samples/",
    ];
    Ok(Files { dir, names })
}

fn put(dir: &Path, name: &str, text: &str) -> anyhow::Result<()> {
    let path = dir.join(name);
    std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))
}

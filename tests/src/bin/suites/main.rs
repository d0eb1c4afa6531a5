//! `make test`: every suite in turn, with its time, and one count at the end.
//!
//! All tests are built beforehand, by two calls of cargo that leave lists of what they built in
//! `target/tests`: a call for each suite would build much of the workspace anew, with the features
//! that its package alone asks for. A suite runs with as many threads as its tests can share two
//! cores; its whole output goes to `target/test-logs/NAME.log`. A test that this machine can't run
//! says `SKIPPED name: reason` and is counted as skipped, not as passed.

mod plan;
mod programs;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use clap::builder::PossibleValuesParser;
use stillpoint_tests::releases::root;

use plan::{SUITES, Suite};
use programs::{Program, of_suite};

/// The most that a test program may take: one that hangs must not keep the others from being run and read.
const LIMIT: Duration = Duration::from_secs(1500);

/// Runs suites of tests in turn, and counts what passed.
#[derive(Debug, Parser)]
#[command(name = "suites")]
struct Options {
    /// Those to run; all, if none is named.
    #[arg(value_name = "SUITE", value_parser = PossibleValuesParser::new(SUITES.iter().map(|suite| suite.name)))]
    suites: Vec<String>,
}

/// How a suite ended.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
}

fn main() -> ExitCode {
    let Options { suites } = Options::parse();
    match run_all(&suites) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("suites: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_all(wanted: &[String]) -> anyhow::Result<bool> {
    let logs = root().join("target/test-logs");
    std::fs::create_dir_all(&logs)?;
    let programs = Program::all(&root().join("target/tests"), &root())?;
    let (mut all, mut good, began) = (Tally::default(), true, Instant::now());
    for suite in SUITES
        .iter()
        .filter(|s| wanted.is_empty() || wanted.iter().any(|w| w == s.name))
    {
        let log = logs.join(format!("{}.log", suite.name));
        print!("{:<10} ", suite.name);
        std::io::stdout().flush()?;
        let (tally, success, took) = run(suite, &programs, &log)?;
        let Tally {
            passed,
            failed,
            skipped,
        } = tally;
        println!(
            "{passed:>4} passed {failed:>3} failed {skipped:>3} skipped {:>7.1} s",
            took.as_secs_f64()
        );
        if !success {
            good = false;
            show(&log)?;
        }
        all.passed += passed;
        all.failed += failed + usize::from(!success && failed == 0);
        all.skipped += skipped;
    }
    println!("all suites in {:.0} s", began.elapsed().as_secs_f64());
    println!(
        "{} passed, {} failed, {} skipped",
        all.passed, all.failed, all.skipped
    );
    Ok(good)
}

fn run(suite: &Suite, all: &[Program], log: &Path) -> anyhow::Result<(Tally, bool, Duration)> {
    let mut file = File::create(log).with_context(|| log.display().to_string())?;
    let (began, mut success) = (Instant::now(), true);
    for program in of_suite(suite.of, all)? {
        writeln!(file, "\n== {}", program.path.display())?;
        let running = Command::new(&program.path)
            .arg("--show-output")
            .arg(format!("--test-threads={}", suite.threads))
            .current_dir(root().join(&program.package))
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file.try_clone()?)
            .spawn()
            .with_context(|| program.path.display().to_string())?;
        success &= ends_well(running, &mut file)?;
    }
    let text = std::fs::read_to_string(log)?;
    let tally = count(&text);
    for line in text.lines().filter(|line| line.starts_with("SKIPPED ")) {
        print!("\n  {line}\n           ");
    }
    Ok((tally, success, began.elapsed()))
}

/// Whether a test program succeeds; one that takes longer than [`LIMIT`] is ended, and its log says so.
fn ends_well(mut running: Child, log: &mut File) -> anyhow::Result<bool> {
    let began = Instant::now();
    loop {
        if let Some(status) = running.try_wait()? {
            return Ok(status.success());
        }
        if began.elapsed() > LIMIT {
            running.kill()?;
            running.wait()?;
            writeln!(log, "\nerror: not over after {} s", LIMIT.as_secs())?;
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Adds up the closing lines of all test programs; a skipped one counted itself as passed.
fn count(text: &str) -> Tally {
    let mut tally = Tally::default();
    for line in text.lines() {
        if let Some(counts) = line.strip_prefix("test result: ") {
            let number = |what: &str| {
                let part = counts
                    .split(';')
                    .find(|part| part.trim_end().ends_with(what));
                let words = part.map(|part| part.split_whitespace().collect::<Vec<_>>());
                words
                    .and_then(|w| w.get(w.len().checked_sub(2)?)?.parse().ok())
                    .unwrap_or(0)
            };
            tally.passed += number("passed");
            tally.failed += number("failed");
        } else if line.starts_with("SKIPPED ") {
            tally.skipped += 1;
        }
    }
    tally.passed = tally.passed.saturating_sub(tally.skipped);
    tally
}

/// The part of a log that a person wants to see: from the first failure on, or its end.
fn show(log: &Path) -> anyhow::Result<()> {
    const MOST: usize = 6000;
    let text = std::fs::read_to_string(log)?;
    let shown: String = match text.find("\nfailures:") {
        Some(begin) => text[begin..].chars().take(MOST).collect(),
        None => {
            let skipped = text.chars().count().saturating_sub(MOST);
            text.chars().skip(skipped).collect()
        }
    };
    println!("{shown}\n(whole output: {})", log.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_added_up() {
        let text = "SKIPPED a: no KVM\n\
            test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n\
            test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 1 filtered out\n";
        let Tally {
            passed,
            failed,
            skipped,
        } = count(text);
        assert_eq!((passed, failed, skipped), (3, 2, 1));
    }
}

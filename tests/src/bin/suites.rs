//! `make test`: every suite in turn, with its time, and one count at the end.
//!
//! Each suite is one `cargo test` with as many threads as its tests can share two cores; its
//! whole output goes to `target/test-logs/NAME.log`. A test that this machine can't run says
//! `SKIPPED name: reason` and is counted as skipped, not as passed.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use stillpoint_tests::releases::root;

/// A suite: its name, what cargo is told, threads.
struct Suite {
    name: &'static str,
    cargo: &'static [&'static str],
    threads: u8,
}

const fn scenario(name: &'static str, cargo: &'static [&'static str], threads: u8) -> Suite {
    Suite {
        name,
        cargo,
        threads,
    }
}

/// What lies on KVM runs a few at a time: guests share the cores with their own observers.
const SUITES: &[Suite] = &[
    scenario(
        "units",
        &["--workspace", "--exclude", "stillpoint", "--lib", "--bins"],
        2,
    ),
    scenario(
        "golden",
        &[
            "-p",
            "stillpoint-state",
            "--test",
            "golden",
            "--test",
            "bounds",
        ],
        2,
    ),
    scenario(
        "fuzz",
        &["--release", "-p", "stillpoint-fuzz", "--test", "bounded"],
        1,
    ),
    scenario("word", &["-p", "stillpoint-control", "--test", "word"], 2),
    scenario("model", &["--release", "-p", "stillpoint-model"], 1),
    scenario("daemon", &["-p", "stillpoint"], 2),
    scenario(
        "journal",
        &[
            "-p",
            "stillpoint",
            "--features",
            "fault-injection",
            "--test",
            "journal",
        ],
        1,
    ),
    scenario(
        "swap",
        &[
            "-p",
            "stillpoint-tests",
            "--test",
            "swap",
            "--test",
            "hurry",
        ],
        1,
    ),
    scenario("compat", &["-p", "stillpoint-tests", "--test", "compat"], 1),
    scenario("modes", &["-p", "stillpoint-tests", "--test", "modes"], 1),
    scenario(
        "several",
        &["-p", "stillpoint-tests", "--test", "several"],
        1,
    ),
    scenario(
        "lifecycle",
        &["-p", "stillpoint-tests", "--test", "lifecycle"],
        1,
    ),
    scenario("faults", &["-p", "stillpoint-tests", "--test", "faults"], 2),
    scenario("matrix", &["-p", "stillpoint-tests", "--test", "matrix"], 1),
    scenario(
        "safeguards",
        &[
            "-p",
            "stillpoint-tests",
            "--test",
            "preflight",
            "--test",
            "rehearsal",
            "--test",
            "jump_rehearsal",
            "--test",
            "way_back",
        ],
        2,
    ),
    scenario("budget", &["-p", "stillpoint-tests", "--test", "budget"], 1),
    scenario(
        "bad-input",
        &["-p", "stillpoint-tests", "--test", "bad_input"],
        2,
    ),
    scenario("host", &["-p", "stillpoint-tests", "--test", "host"], 1),
    scenario(
        "standstill",
        &["-p", "stillpoint-tests", "--test", "standstill"],
        1,
    ),
    scenario(
        "kvm-swap",
        &["-p", "stillpoint-tests", "--test", "kvm_swap"],
        1,
    ),
    scenario("kernel", &["-p", "stillpoint-tests", "--test", "kernel"], 1),
    scenario("virtio", &["-p", "stillpoint-tests", "--test", "virtio"], 1),
    scenario("disks", &["-p", "stillpoint-tests", "--test", "disks"], 1),
    scenario("taps", &["-p", "stillpoint-tests", "--test", "taps"], 1),
    scenario("events", &["-p", "stillpoint-tests", "--test", "events"], 1),
    scenario("clock", &["-p", "stillpoint-tests", "--test", "clock"], 1),
    scenario("linux", &["-p", "stillpoint-tests", "--test", "linux"], 1),
    scenario("rig", &["-p", "stillpoint-tests", "--test", "rig"], 1),
];

/// How a suite ended.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
}

fn main() -> ExitCode {
    match run_all() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("suites: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_all() -> anyhow::Result<bool> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let logs = root().join("target/test-logs");
    std::fs::create_dir_all(&logs)?;
    let (mut all, mut good, began) = (Tally::default(), true, Instant::now());
    for suite in SUITES
        .iter()
        .filter(|s| wanted.is_empty() || wanted.iter().any(|w| w == s.name))
    {
        let log = logs.join(format!("{}.log", suite.name));
        print!("{:<10} ", suite.name);
        std::io::stdout().flush()?;
        let (tally, success, took) = run(suite, &log)?;
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

fn run(suite: &Suite, log: &Path) -> anyhow::Result<(Tally, bool, Duration)> {
    let file = File::create(log).with_context(|| log.display().to_string())?;
    let began = Instant::now();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .arg("test")
        .args(suite.cargo)
        .args(["--no-fail-fast", "--", "--show-output"])
        .arg(format!("--test-threads={}", suite.threads))
        .current_dir(root())
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()?;
    let text = std::fs::read_to_string(log)?;
    let tally = count(&text);
    for line in text.lines().filter(|line| line.starts_with("SKIPPED ")) {
        print!("\n  {line}\n           ");
    }
    Ok((tally, status.success(), began.elapsed()))
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

/// The part of a log that a person wants to see: from the first failure on.
fn show(log: &Path) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(log)?;
    let begin = ["\nfailures:", "error"]
        .iter()
        .find_map(|mark| text.find(mark))
        .unwrap_or(0);
    println!("{}", text[begin..].chars().take(6000).collect::<String>());
    println!("(whole output: {})", log.display());
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

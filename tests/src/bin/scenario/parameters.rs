//! What a parameter of the command line is worth to a kernel that is jumped into: empty kexecs in turn into the same
//! kernel, with the same initramfs and modules, and in each round one on the base line and one with each of the
//! parameters. One is over when `/dev/kvm` can be opened. Rounds begin at another parameter each, and a last kexec is
//! on the base line: what comes between two of those is compared with both, as each kexec of an emulated host takes
//! somewhat longer than the one before.

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stillpoint_tests::ground;

use crate::stages::{self, Line};

const STATE: &str = "/scratch/parameters.json";
/// A parameter whose value is what the running kernel has found out.
const LPJ: &str = "lpj=";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The kernel to jump into, by its name below /jump; later stages know it.
    #[arg(long, value_name = "NAME", default_value = "bookworm")]
    into: String,
    /// How often each.
    #[arg(long, default_value_t = 6)]
    rounds: usize,
    /// Words that are added to the base line; a word that begins with `-` is taken out of it. `lpj=` gets its value
    /// from the running kernel.
    #[arg(long = "with", value_name = "WORDS", allow_hyphen_values = true)]
    with: Vec<String>,
    /// Words that all of them have, the base line too.
    #[arg(long, value_name = "WORDS", default_value = "")]
    also: String,
}

/// Where it stands.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    into: String,
    base: String,
    with: Vec<String>,
    rounds: usize,
    /// From when the last jump counts.
    line: Line,
    /// What each took so far, in the order in which they were.
    took: Vec<Value>,
}

pub(crate) fn tell(args: &Args) -> anyhow::Result<Value> {
    if let Some(reason) = ground::no_kvm() {
        bail!("{reason}");
    }
    let mut state = match stages::kept::<State>(STATE)? {
        None => begin(args)?,
        Some(mut state) => {
            let (round, words) = state.turn(state.took.len());
            let took = took(&state.line)?;
            println!(
                "scenario: {} of {}, `{words}`: {} ns",
                state.took.len() + 1,
                state.count(),
                took["total_ns"]
            );
            state.took.push(json!({
                "round": round, "words": words, "total_ns": took["total_ns"], "to_init_ns": took["to_init_ns"],
            }));
            state
        }
    };
    if state.took.len() == state.count() {
        let release = rustix::system::uname();
        let release = release.release().to_string_lossy().into_owned();
        return Ok(json!({
            "kernel": release, "base": state.base, "with": state.with, "rounds": state.rounds, "took": state.took,
        }));
    }
    let line = with_words(&state.base, &state.turn(state.took.len()).1)?;
    let into = state.into.clone();
    stages::jump_empty(&into, &line, |line| {
        state.line = line;
        stages::keep(STATE, &state)
    })
}

fn begin(args: &Args) -> anyhow::Result<State> {
    stages::lay_out()?;
    let line = std::fs::read_to_string("/proc/cmdline")?;
    Ok(State {
        into: args.into.clone(),
        base: format!("{} {}", line.trim(), args.also).trim().to_owned(),
        with: args.with.clone(),
        rounds: args.rounds,
        line: Line::from(stillpoint_carveout::wall::now()),
        took: Vec::new(),
    })
}

impl State {
    /// How many kexecs there are.
    fn count(&self) -> usize {
        self.rounds * (self.with.len() + 1) + 1
    }

    /// Of which round the kexec of this number is, and with which words.
    fn turn(&self, number: usize) -> (usize, String) {
        let (round, at) = (
            number / (self.with.len() + 1),
            number % (self.with.len() + 1),
        );
        let words = match at {
            0 => String::new(),
            at => self.with[(at - 1 + round) % self.with.len()].clone(),
        };
        (round, words)
    }
}

/// What the kexec took that led here.
fn took(line: &Line) -> anyhow::Result<Value> {
    let stamps = stages::stamps()?;
    let kvm = stamps.kvm.context("there is no /dev/kvm")?;
    let ns = |tsc| anyhow::Ok(u64::try_from(line.since(tsc)?.as_nanos())?);
    Ok(json!({"to_init_ns": ns(stamps.init)?, "total_ns": ns(kvm)?}))
}

/// The base line with these words, and without those that they take out.
fn with_words(base: &str, words: &str) -> anyhow::Result<String> {
    let mut line: Vec<String> = base.split_ascii_whitespace().map(str::to_owned).collect();
    for word in words.split_ascii_whitespace() {
        match word.strip_prefix('-') {
            Some(out) => {
                let before = line.len();
                line.retain(|word| word != out);
                ensure!(line.len() < before, "the base line has no `{out}`: {base}");
            }
            None if word == LPJ => line.push(format!("{LPJ}{}", lpj()?)),
            None => line.push(word.to_owned()),
        }
    }
    Ok(line.join(" "))
}

/// Loops of a delay for each jiffy, as the running kernel says at its start.
fn lpj() -> anyhow::Result<u64> {
    let said = std::process::Command::new("/bin/busybox")
        .arg("dmesg")
        .output()?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let (_, rest) = said.split_once("(lpj=").context("no lpj in dmesg")?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().with_context(|| format!("lpj={digits}"))
}

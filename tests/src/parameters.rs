//! What parameters of a kernel's command line are worth, as `scenario parameters` measured them: each kexec against
//! the base line's, and how far the rounds agree.

use std::fmt::Write;

use anyhow::{Context, ensure};
use serde::Serialize;
use serde_json::Value;

/// One parameter, or some together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Effect {
    /// The words that are added to the base line; those with a `-` are taken out of it.
    pub words: String,
    /// The middle one of its kexecs, in seconds.
    pub median_s: f64,
    /// What it takes longer than the base line's of its round, in seconds: the middle one of all rounds.
    pub longer_s: f64,
    /// The least and the most of these. For n rounds the median of what is measured lies between them with a
    /// probability of 1 - 2/2^n, whatever the times are distributed like.
    pub range_s: [f64; 2],
}

impl Effect {
    /// Whether all rounds agree on which is longer, and there are enough of them to tell that from chance.
    pub fn is_told(&self, rounds: usize) -> bool {
        let [least, most] = self.range_s;
        rounds >= 6 && (most < 0.0 || least > 0.0)
    }
}

/// All of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Parameters {
    /// The kernel that was jumped into, and from.
    pub kernel: String,
    /// What the rig ran on.
    pub ground: String,
    /// The base line.
    pub base: String,
    /// How often each was measured.
    pub rounds: usize,
    /// The base line's kexecs: the least, the middle one, the most, in seconds.
    pub base_s: [f64; 3],
    /// Each parameter.
    pub effects: Vec<Effect>,
}

impl Parameters {
    /// From the scenario's report.
    pub fn of(report: &Value) -> anyhow::Result<Self> {
        let took = report["took"].as_array().context("what was measured")?;
        let one = |took: &Value| {
            let ns = took["total_ns"].as_u64();
            let words = took["words"].as_str();
            let (ns, words) = ns.zip(words).with_context(|| format!("{took:#}"))?;
            anyhow::Ok((words.to_owned(), ns as f64 / 1e9))
        };
        let took = took.iter().map(one).collect::<anyhow::Result<Vec<_>>>()?;
        let text = |name: &str| report[name].as_str().unwrap_or("?").to_owned();
        let bases: Vec<_> = (0..took.len())
            .filter(|&at| took[at].0.is_empty())
            .collect();
        ensure!(
            bases.first() == Some(&0) && bases.last() == Some(&(took.len() - 1)),
            "the base line is not the first and the last"
        );
        let mut words: Vec<String> = Vec::new();
        for (one, _) in took.iter().filter(|(one, _)| !one.is_empty()) {
            if !words.contains(one) {
                words.push(one.clone());
            }
        }
        let effects = words.into_iter().map(|words| {
            let own = (0..took.len()).filter(|&at| took[at].0 == words);
            let own: Vec<_> = own.collect();
            let times = own.iter().map(|&at| took[at].1).collect();
            let longer: Vec<_> = own
                .iter()
                .map(|&at| took[at].1 - base_at(&took, &bases, at))
                .collect();
            Effect {
                median_s: sorted(times).1[1],
                longer_s: sorted(longer.clone()).1[1],
                range_s: {
                    let [least, _, most] = sorted(longer).1;
                    [least, most]
                },
                words,
            }
        });
        let effects = effects.collect();
        let all = bases.iter().map(|&at| took[at].1).collect();
        Ok(Self {
            kernel: text("kernel"),
            ground: text("ground"),
            base: text("base"),
            rounds: bases.len() - 1,
            base_s: sorted(all).1,
            effects,
        })
    }

    /// For a document.
    pub fn table(&self) -> String {
        let [least, median, most] = self.base_s;
        let mut text = format!(
            "{}, {}, {} rounds\nbase line: `{}`\n{median:.2} s to /dev/kvm ({least:.2} to {most:.2} s)\n\n\
             | parameter | median | longer than the base line beside it | least to most | told |\n|---|---|---|---|---|\n",
            self.kernel, self.ground, self.rounds, self.base
        );
        for effect in &self.effects {
            let [least, most] = effect.range_s;
            let told = match effect.is_told(self.rounds) {
                true => "yes",
                false => "no",
            };
            let _ = writeln!(
                text,
                "| `{}` | {:.2} s | {:+.2} s | {least:+.2} to {most:+.2} s | {told} |",
                effect.words, effect.median_s, effect.longer_s
            );
        }
        text
    }
}

/// What the base line would have taken in this place, by the line through the ones before and after it.
fn base_at(took: &[(String, f64)], bases: &[usize], at: usize) -> f64 {
    let after = bases.partition_point(|&base| base <= at);
    let (before, after) = (bases[after - 1], bases[after]);
    let part = (at - before) as f64 / (after - before) as f64;
    took[before].1 * (1.0 - part) + took[after].1 * part
}

/// Sorted, and the least, the middle one and the most. Of an even number the middle one lies between two.
fn sorted(mut all: Vec<f64>) -> (Vec<f64>, [f64; 3]) {
    all.sort_by(f64::total_cmp);
    let (last, half) = (all.len() - 1, all.len() / 2);
    let median = match all.len() % 2 {
        0 => (all[half - 1] + all[half]) / 2.0,
        _ => all[half],
    };
    let three = [all[0], median, all[last]];
    (all, three)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Rounds of a base line that grows by a tenth of a second with each kexec, `quick` that takes a second less than
    /// it would, and `noise` that takes as much more in one round as less in the other.
    fn report(rounds: usize) -> Value {
        let mut took = Vec::new();
        let mut say = |words: &str, more: f64| {
            let s = 10.0 + 0.1 * took.len() as f64 + more;
            took.push(json!({"words": words, "total_ns": (s * 1e9) as u64}));
        };
        for round in 0..rounds {
            say("", 0.0);
            say("quick", -1.0);
            say("noise", if round % 2 == 0 { 0.5 } else { -0.5 });
        }
        say("", 0.0);
        json!({"kernel": "6.1", "base": "quiet", "took": took})
    }

    #[test]
    fn what_grows_with_each_kexec_is_no_effect_and_what_a_parameter_does_is() {
        let told = Parameters::of(&report(6)).expect("a run");
        let [quick, noise] = &told.effects[..] else {
            panic!("{told:?}");
        };
        assert!((quick.longer_s + 1.0).abs() < 1e-6, "{quick:?}");
        assert!(quick.range_s.iter().all(|s| (s + 1.0).abs() < 1e-6));
        assert!(quick.is_told(told.rounds) && !noise.is_told(told.rounds));
        assert!((noise.longer_s).abs() < 1e-6, "{noise:?}");
        assert!(told.table().contains("| `quick` | "), "{}", told.table());
    }

    #[test]
    fn few_rounds_tell_nothing() {
        let told = Parameters::of(&report(5)).expect("a run");
        assert!(!told.effects[0].is_told(told.rounds));
        let mut cut = report(6);
        cut["took"].as_array_mut().map(Vec::pop);
        Parameters::of(&cut).expect_err("nothing to compare the last round with");
    }
}

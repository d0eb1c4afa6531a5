//! Gates of a rollout: what is asked before and after each step, beside how guests and hosts are.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use stillpoint_control::nanos;
use utoipa::ToSchema;

use super::moment::Moment;
use super::url::HttpUrl;

/// The longest a gate may take for its answer.
pub const MAX_GATE: Duration = Duration::from_secs(60);
/// The most gates of a rollout.
pub const MOST_GATES: usize = 16;

/// A gate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RolloutGate)]
pub struct GateSpec {
    /// What it is called.
    pub name: String,
    /// What is asked.
    pub ask: GateAsk,
    /// How long it may take for its answer, ns; one that takes longer gives none.
    #[serde(rename = "timeout_ns", with = "nanos")]
    #[schema(value_type = u64)]
    pub timeout: Duration,
}

/// What a gate asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum GateAsk {
    /// A command that lies in the gates' directory of the host that drives. It passes with exit code 0.
    Command {
        /// Its name there.
        program: String,
        /// Its arguments.
        #[serde(default)]
        args: Vec<String>,
    },
    /// A query of Prometheus. It passes if there is an answer and none of its values is 0.
    Prometheus {
        /// Where it is: `http://HOST:PORT`, or `https://` for TLS by a CA that the driving host trusts.
        url: String,
        /// The query: a comparison with `bool`.
        query: String,
    },
}

/// What a gate says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = GateVerdict)]
pub enum Gate {
    /// Go on.
    Pass,
    /// Something is bad.
    Fail,
    /// It gave no answer: no evidence of anything, so nothing begins and nothing is judged.
    Mute,
}

/// What a gate said last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GateSaid {
    /// Which.
    pub name: String,
    /// In a word.
    pub verdict: Gate,
    /// Why, where it doesn't pass.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// Since when it says so.
    #[serde(rename = "since_unix_ns")]
    pub since: Moment,
}

impl GateSaid {
    /// As a part of a sentence.
    pub fn words(&self) -> String {
        let Self { name, why, .. } = self;
        match self.verdict {
            Gate::Pass => format!("gate `{name}` passes"),
            Gate::Fail => format!("gate `{name}` fails: {why}"),
            Gate::Mute => format!("gate `{name}` gives no answer: {why}"),
        }
    }
}

/// A gate that could never pass.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GateError {
    /// Its name.
    #[error("`{0}` is no name of a gate: 1 to 48 of a-z A-Z 0-9 . _ -")]
    Name(String),
    /// Two of one name.
    #[error("two gates are called `{0}`; give each a name of its own")]
    Twice(String),
    /// Too many.
    #[error("{0} gates are too many; {MOST_GATES} are the most")]
    Many(usize),
    /// Its time.
    #[error("gate `{0}` has {1:?} for its answer; give more than 0 and at most {MAX_GATE:?}")]
    Time(String, Duration),
    /// Its command.
    #[error(
        "gate `{0}`: `{1}` is no command's name; it lies in the gates' directory of each host, and has no slash"
    )]
    Program(String, String),
    /// Its address.
    #[error(
        "gate `{0}`: `{1}` is no address of Prometheus; write http://HOST:PORT, or https://HOST:PORT"
    )]
    Url(String, String),
    /// Its query.
    #[error("gate `{0}` has no query")]
    Query(String),
}

fn is_plain(name: &str, most: usize) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !name.is_empty() && name.len() <= most && name.chars().all(plain) && !name.starts_with('.')
}

impl GateSpec {
    /// Whether these could ever pass.
    ///
    /// # Errors
    /// Says what stands in the way.
    pub fn check(all: &[Self]) -> Result<(), GateError> {
        if all.len() > MOST_GATES {
            return Err(GateError::Many(all.len()));
        }
        let mut names = std::collections::BTreeSet::new();
        for gate in all {
            let name = gate.name.clone();
            if !is_plain(&name, 48) {
                return Err(GateError::Name(name));
            }
            if !names.insert(&gate.name) {
                return Err(GateError::Twice(name));
            }
            if gate.timeout.is_zero() || gate.timeout > MAX_GATE {
                return Err(GateError::Time(name, gate.timeout));
            }
            match &gate.ask {
                GateAsk::Command { program, .. } if !is_plain(program, 255) => {
                    return Err(GateError::Program(name, program.clone()));
                }
                GateAsk::Prometheus { url, .. } if url.parse::<HttpUrl>().is_err() => {
                    return Err(GateError::Url(name, url.clone()));
                }
                GateAsk::Prometheus { query, .. } if query.trim().is_empty() => {
                    return Err(GateError::Query(name));
                }
                GateAsk::Command { .. } | GateAsk::Prometheus { .. } => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(name: &str, ask: GateAsk) -> GateSpec {
        GateSpec {
            name: name.into(),
            ask,
            timeout: Duration::from_secs(1),
        }
    }

    fn command(program: &str) -> GateAsk {
        GateAsk::Command {
            program: program.into(),
            args: Vec::new(),
        }
    }

    fn query(url: &str, query: &str) -> GateAsk {
        GateAsk::Prometheus {
            url: url.into(),
            query: query.into(),
        }
    }

    #[test]
    fn gates_that_could_never_pass_are_refused() {
        let good = [
            gate("a", command("check")),
            gate("b", query("http://p:9090/x/", "up")),
        ];
        GateSpec::check(&good).expect("good");
        let text = serde_json::to_string(&good).expect("JSON");
        assert_eq!(
            serde_json::from_str::<Vec<GateSpec>>(&text).expect(&text),
            good
        );
        let refused = |gate: GateSpec, why: &str| {
            let problem = GateSpec::check(&[gate]).expect_err(why).to_string();
            assert!(problem.contains(why), "{problem}");
        };
        refused(gate("a b", command("check")), "no name of a gate");
        for program in ["/bin/sh", "../x", "", ".hidden"] {
            refused(gate("a", command(program)), "the gates' directory");
        }
        for url in [
            "p:9090",
            "ftp://p:9090",
            "http://",
            "http://p:x",
            "http://p/a?b",
        ] {
            refused(gate("a", query(url, "up")), "http://HOST:PORT");
        }
        refused(gate("a", query("http://p", " ")), "has no query");
        let slow = GateSpec {
            timeout: Duration::from_secs(61),
            ..gate("a", command("check"))
        };
        refused(slow, "at most");
        let twice = GateSpec::check(&[good[0].clone(), good[0].clone()]);
        assert_eq!(twice, Err(GateError::Twice("a".into())));
    }
}

//! Asks one gate: runs a command, or queries Prometheus.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use hyper::Method;
use hyper::body::Bytes;
use serde_json::Value;
use tokio::process::Command;

use crate::execute::unix_ns;
use crate::fleet::record::RolloutId;
use crate::http::{self, Asked};
use crate::model::{Gate, GateAsk, GateSaid, GateSpec, HostName, HttpUrl, Moment, NoHttpUrl};

/// The most that Prometheus may answer.
const LARGEST: usize = 1 << 20;
/// How much of what a command printed is told.
const SHOWN: usize = 200;

type Said = (Gate, String);

/// Asks all of them at once.
pub(super) async fn all(
    specs: Vec<GateSpec>,
    dir: PathBuf,
    me: HostName,
    rollout: RolloutId,
    to: String,
) -> Vec<GateSaid> {
    let mut tasks = tokio::task::JoinSet::new();
    for (at, spec) in specs.into_iter().enumerate() {
        let (dir, me, rollout, to) = (dir.clone(), me.clone(), rollout.clone(), to.clone());
        tasks.spawn(async move {
            let (verdict, why) = match &spec.ask {
                GateAsk::Command { program, args } => {
                    let mut command = Command::new(dir.join(program));
                    command.args(args);
                    command.env("STILLPOINT_ROLLOUT", &rollout.0);
                    command.env("STILLPOINT_RELEASE", &to);
                    command.env("STILLPOINT_HOST", me.as_str());
                    match is_ours(&dir, program) {
                        Ok(()) => run(command, &spec).await,
                        Err(why) => (Gate::Mute, format!("{why} (on {me}, which drives)")),
                    }
                }
                GateAsk::Prometheus { url, query } => {
                    let asked = tokio::time::timeout(spec.timeout, ask(url, query));
                    match asked.await {
                        Ok(Ok(answer)) => judge(&answer),
                        Ok(Err(why)) => (Gate::Mute, why),
                        Err(_) => (
                            Gate::Mute,
                            format!("no answer of {url} in {:?}", spec.timeout),
                        ),
                    }
                }
            };
            let since = Moment(unix_ns());
            let name = spec.name;
            (
                at,
                GateSaid {
                    name,
                    verdict,
                    why,
                    since,
                },
            )
        });
    }
    let mut said: Vec<_> = tasks.join_all().await;
    said.sort_by_key(|(at, _)| *at);
    said.into_iter().map(|(_, said)| said).collect()
}

/// Whether a command is the operator's of this host, and nobody else could have changed it.
fn is_ours(dir: &Path, program: &str) -> Result<(), String> {
    let own = rustix::process::geteuid().as_raw();
    for path in [dir, &dir.join(program)] {
        let at = path.display();
        let found = std::fs::metadata(path).map_err(|e| format!("there is no gate {at}: {e}"))?;
        if ![0, own].contains(&found.uid()) || found.mode() & 0o022 != 0 {
            return Err(format!(
                "others can change {at}: `chown root {at}; chmod go-w {at}`"
            ));
        }
    }
    Ok(())
}

async fn run(mut command: Command, spec: &GateSpec) -> Said {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // In a group of its own, so that what it started ends with it.
    command.process_group(0).kill_on_drop(true);
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return (Gate::Mute, format!("it can't be run: {error}")),
    };
    let group = child.id().and_then(|id| i32::try_from(id).ok());
    let group = Group(group.and_then(rustix::process::Pid::from_raw));
    let output = match tokio::time::timeout(spec.timeout, child.wait_with_output()).await {
        Err(_) => return (Gate::Mute, format!("no end of it in {:?}", spec.timeout)),
        Ok(Err(error)) => return (Gate::Mute, error.to_string()),
        Ok(Ok(output)) => output,
    };
    drop(group);
    match (output.status.code(), output.status.signal()) {
        (Some(0), _) => (Gate::Pass, String::new()),
        (Some(code), _) => (Gate::Fail, format!("exit code {code}{}", printed(&output))),
        (None, signal) => (
            Gate::Mute,
            format!("it was ended by signal {}", signal.unwrap_or(0)),
        ),
    }
}

/// A process group, killed when nobody waits for it any more.
struct Group(Option<rustix::process::Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // It may have ended.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }
}

/// The last line that it printed, which is most likely to say why.
fn printed(output: &std::process::Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text);
    let last = text
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty());
    last.map_or(String::new(), |line| {
        let end = line.floor_char_boundary(SHOWN);
        format!(", and said: {}", &line[..end])
    })
}

async fn ask(url: &str, query: &str) -> Result<Value, String> {
    let at: HttpUrl = url.parse().map_err(|e: NoHttpUrl| e.to_string())?;
    let asked = Asked {
        method: Method::GET,
        path: format!("/api/v1/query?query={}", encoded(query)),
        kind: None,
        body: Bytes::new(),
    };
    let answered = http::ask(&at, asked, LARGEST).await;
    let (status, bytes) = answered.map_err(|e| format!("{url} does not answer: {e}"))?;
    let answer: Result<Value, _> = serde_json::from_slice(&bytes);
    match answer {
        Ok(answer) if answer["status"] == "success" => Ok(answer["data"].clone()),
        Ok(answer) if answer["error"].is_string() => Err(format!(
            "Prometheus can't answer: {}",
            answer["error"].as_str().unwrap_or_default()
        )),
        _ => Err(format!(
            "{url} answers {status}, and not as Prometheus does"
        )),
    }
}

fn encoded(text: &str) -> String {
    let one = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            char::from(byte).to_string()
        }
        other => format!("%{other:02X}"),
    };
    text.bytes().map(one).collect()
}

/// An answer of Prometheus: every value counts, and none of them may be 0.
fn judge(data: &Value) -> Said {
    let samples: Vec<(&Value, &Value)> = match data["resultType"].as_str() {
        Some("scalar") => vec![(&Value::Null, &data["result"][1])],
        Some("vector") => {
            let all = data["result"].as_array().map_or(&[][..], Vec::as_slice);
            all.iter()
                .map(|one| (&one["metric"], &one["value"][1]))
                .collect()
        }
        other => {
            let why = format!(
                "the query's answer is a {}, and a scalar or vector is wanted",
                other.unwrap_or("riddle")
            );
            return (Gate::Mute, why);
        }
    };
    if samples.is_empty() {
        return (
            Gate::Mute,
            "the query has no answer; compare with `bool`, which always has one".into(),
        );
    }
    for (metric, value) in samples {
        let number: Option<f64> = value.as_str().and_then(|text| text.parse().ok());
        let of = if metric.is_null() {
            String::new()
        } else {
            format!(" for {metric}")
        };
        match number {
            None => return (Gate::Mute, format!("{value} is no number{of}")),
            Some(number) if number.is_nan() => {
                return (Gate::Mute, format!("the query's answer is NaN{of}"));
            }
            Some(0.0) => return (Gate::Fail, format!("the query's answer is 0{of}")),
            Some(_) => {}
        }
    }
    (Gate::Pass, String::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_answer_is_no_evidence_and_a_zero_is() {
        let vector = |values: &[&str]| {
            let result: Vec<Value> = values
                .iter()
                .map(|value| serde_json::json!({ "metric": { "job": "web" }, "value": [1.0, value] }))
                .collect();
            judge(&serde_json::json!({ "resultType": "vector", "result": result })).0
        };
        assert_eq!(vector(&["1", "0.5"]), Gate::Pass);
        assert_eq!(vector(&["1", "0"]), Gate::Fail);
        assert_eq!(vector(&[]), Gate::Mute);
        assert_eq!(vector(&["NaN"]), Gate::Mute);
        assert_eq!(vector(&["?"]), Gate::Mute);
        let scalar = |value: &str| {
            judge(&serde_json::json!({ "resultType": "scalar", "result": [1.0, value] })).0
        };
        assert_eq!(
            (scalar("1"), scalar("0"), scalar("+Inf")),
            (Gate::Pass, Gate::Fail, Gate::Pass)
        );
        assert_eq!(
            judge(&serde_json::json!({ "resultType": "matrix", "result": [] })).0,
            Gate::Mute
        );
        assert_eq!(judge(&Value::Null).0, Gate::Mute);
    }
}

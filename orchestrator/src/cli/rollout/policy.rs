//! A rollout's policy, as it is typed.

use std::path::PathBuf;
use std::time::Duration;

use crate::cli::{format, io_problem};
use crate::model::{Amount, Code, GateAsk, GateSpec, Policy, Problem, Stage, Window};

/// How long a swap may take, and then until all is well: long enough for a guest's own notice.
const DEADLINE: Duration = Duration::from_secs(1800);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A policy as JSON; the other arguments change what it says.
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// VMs that go first and are watched before others follow: 1, or 10%; may be given again for further
    /// stages; 0 for none [1].
    #[arg(long = "canary", value_name = "AMOUNT")]
    canaries: Vec<Amount>,
    /// For how long each of these stages is watched [10min].
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    bake: Option<Duration>,
    /// Swaps at once, in all [1].
    #[arg(long, value_name = "N")]
    at_once: Option<u32>,
    /// Swaps at once on a host [1].
    #[arg(long, value_name = "N")]
    per_host: Option<u32>,
    /// Swaps at once in a fault domain.
    #[arg(long, value_name = "N")]
    per_rack: Option<u32>,
    /// Swaps at once in a zone.
    #[arg(long, value_name = "N")]
    per_zone: Option<u32>,
    /// Members of an availability set that may be away, whatever made them so [20%].
    #[arg(long, value_name = "AMOUNT")]
    set_budget: Option<Amount>,
    /// VMs of the fleet that may be away.
    #[arg(long, value_name = "AMOUNT")]
    fleet_budget: Option<Amount>,
    /// For how long guest and host must be well, before a swap and after it [30s].
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    well_for: Option<Duration>,
    /// How long before its pause each guest hears of it; 0s for not at all [each one's own].
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    notice: Option<Duration>,
    /// How long a swap may take with its notice, and then until all is well [30min].
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    deadline: Option<Duration>,
    /// Between two update domains of a set [0s].
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    between_domains: Option<Duration>,
    /// How often a swap is tried that did no harm [3].
    #[arg(long, value_name = "N")]
    tries: Option<u8>,
    /// Between two tries [60s].
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    retry_after: Option<Duration>,
    /// Swaps that may fail after the stages [0].
    #[arg(long, value_name = "AMOUNT")]
    failures: Option<Amount>,
    /// Stop where it is after a failure, and leave what was touched where it is.
    #[arg(long)]
    no_roll_back: bool,
    /// The longest blackout a swap may show.
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    max_blackout: Option<Duration>,
    /// The largest error of a guest's clock that one may show.
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    max_clock_error: Option<Duration>,
    /// The longest brownout that one may show.
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    max_brownout: Option<Duration>,
    /// A command that is asked before and after each step, with its arguments: it lies in the gates' directory of every
    /// host (`stillpointd --gate-dir`), and passes with exit code 0; may be given again.
    #[arg(long = "gate-command", value_name = "COMMAND")]
    gate_commands: Vec<String>,
    /// A query of Prometheus that is asked before and after each step, as `NAME=http://HOST:PORT QUERY`, or by https: it passes if
    /// there is an answer without a 0 in it, so compare with `bool`; may be given again.
    #[arg(long = "gate-query", value_name = "NAME=URL QUERY")]
    gate_queries: Vec<String>,
    /// How long a gate may take; nothing begins without its answer [10s].
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    gate_timeout: Option<Duration>,
    /// When swaps may begin, as `Sat,Sun 01:00 4h Europe/Berlin`; may be given again [at any time].
    #[arg(long = "window", value_name = "WINDOW")]
    windows: Vec<Window>,
}

/// How long a gate may take.
const GATE: Duration = Duration::from_secs(10);

fn command(text: &str, timeout: Duration) -> Result<GateSpec, Problem> {
    let mut words = text.split_whitespace().map(str::to_owned);
    let program = words.next().ok_or_else(|| {
        Problem::new(
            Code::BadRequest,
            "--gate-command: write a command's name, and its arguments",
        )
    })?;
    Ok(GateSpec {
        name: program.clone(),
        ask: GateAsk::Command {
            program,
            args: words.collect(),
        },
        timeout,
    })
}

fn query(text: &str, timeout: Duration) -> Result<GateSpec, Problem> {
    let parts = text
        .split_once('=')
        .and_then(|(name, rest)| Some((name, rest.split_once(' ')?)));
    let (name, (url, query)) = parts.ok_or_else(|| {
        let message = format!("--gate-query {text}: write NAME=http://HOST:PORT QUERY");
        Problem::new(Code::BadRequest, message)
    })?;
    Ok(GateSpec {
        name: name.to_owned(),
        ask: GateAsk::Prometheus {
            url: url.to_owned(),
            query: query.trim().to_owned(),
        },
        timeout,
    })
}

fn change<T>(place: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *place = given;
    }
}

impl Args {
    pub(super) fn policy(self) -> Result<Policy, Problem> {
        let mut policy = match &self.policy {
            None => Policy {
                deadline: DEADLINE,
                ..Policy::default()
            },
            Some(file) => {
                let text = std::fs::read(file);
                let text =
                    text.map_err(|e| io_problem(format_args!("read {}", file.display()), &e))?;
                serde_json::from_slice(&text).map_err(|e| {
                    let message = format!("the policy {} can't be read: {e}", file.display());
                    Problem::new(Code::BadRequest, message)
                })?
            }
        };
        if !self.canaries.is_empty() {
            let bake = policy.stages.first().map(|stage| stage.bake);
            let bake = bake.unwrap_or(Duration::from_secs(600));
            let some = |size: &Amount| size.at_least(u32::MAX) > 0;
            let sizes = self.canaries.into_iter().filter(some);
            policy.stages = sizes.map(|size| Stage { size, bake }).collect();
        }
        if let Some(bake) = self.bake {
            policy.stages.iter_mut().for_each(|stage| stage.bake = bake);
        }
        change(&mut policy.at_once.total, self.at_once);
        change(&mut policy.at_once.per_host, self.per_host);
        change(&mut policy.set_budget, self.set_budget);
        change(&mut policy.well_for, self.well_for);
        change(&mut policy.deadline, self.deadline);
        change(&mut policy.between_domains, self.between_domains);
        change(&mut policy.tries, self.tries);
        change(&mut policy.retry_after, self.retry_after);
        change(&mut policy.failures, self.failures);
        policy.at_once.per_rack = self.per_rack.or(policy.at_once.per_rack);
        policy.at_once.per_zone = self.per_zone.or(policy.at_once.per_zone);
        policy.fleet_budget = self.fleet_budget.or(policy.fleet_budget);
        policy.notice = self.notice.or(policy.notice);
        policy.limits.blackout = self.max_blackout.or(policy.limits.blackout);
        policy.limits.clock_error = self.max_clock_error.or(policy.limits.clock_error);
        policy.limits.brownout = self.max_brownout.or(policy.limits.brownout);
        policy.roll_back &= !self.no_roll_back;
        let timeout = self.gate_timeout.unwrap_or(GATE);
        for text in &self.gate_commands {
            policy.gates.push(command(text, timeout)?);
        }
        for text in &self.gate_queries {
            policy.gates.push(query(text, timeout)?);
        }
        if let Some(timeout) = self.gate_timeout {
            policy
                .gates
                .iter_mut()
                .for_each(|gate| gate.timeout = timeout);
        }
        if !self.windows.is_empty() {
            policy.windows = self.windows;
        }
        Ok(policy)
    }
}

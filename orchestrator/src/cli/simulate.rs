//! `stillpoint simulate`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;

use super::{Desk, format, io_problem, say, say_json};
use crate::model::{Amount, Code, Problem, Rung, Stage};
use crate::simulate::charts::{self, grouped};
use crate::simulate::cost::{self, Cost};
use crate::simulate::{self, Outcome, Scenario, Size};

/// Rollouts of releases that break ever more guests are simulated on a fleet no larger than this.
const BLAST: Size = Size {
    hosts: 1_000,
    vms: 10_000,
};
/// Each so often: one course of events says little.
const BLAST_SEEDS: u32 = 5;
const SHARES: [f64; 9] = [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0];
/// The sizes that a simulation's numbers hold.
const MOST: u32 = 10_000_000;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Hosts of the fleet.
    #[arg(long, default_value_t = 1_000)]
    hosts: u32,
    /// VMs of the fleet, spread evenly.
    #[arg(long, default_value_t = 10_000)]
    vms: u32,
    /// What is swapped: vmm, guest by guest; kvm or kernel, with all guests of a host together.
    #[arg(long, value_name = "COMPONENT", default_value_t = Rung::Vmm)]
    component: Rung,
    /// What everything random follows from: the same seed is the same run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Simulates one rollout, of a release that breaks this share of guests, such as 2%, and not
    /// the set of scenarios.
    #[arg(long, value_name = "SHARE")]
    breaks: Option<Amount>,
    /// How many are canaries, such as 10 or 0.1%, in the rollout of --breaks.
    #[arg(long, value_name = "AMOUNT", requires = "breaks")]
    canaries: Option<Amount>,
    /// How many swaps are under way at once, in the rollout of --breaks.
    #[arg(long, value_name = "N", requires = "breaks")]
    at_once: Option<u32>,
    /// Measures the planner too, and draws charts into this directory.
    #[arg(long, value_name = "DIR")]
    charts: Option<PathBuf>,
}

/// What is printed with `--json`.
#[derive(Debug, Serialize)]
struct Told<'a> {
    outcomes: &'a [Outcome],
    #[serde(skip_serializing_if = "Option::is_none")]
    planner: Option<&'a [Cost]>,
}

pub(super) fn run(desk: &Desk, args: &Args) -> Result<ExitCode, Problem> {
    let scenarios = scenarios(args)?;
    let outcomes = simulate::run_all(&scenarios);
    let costs = match &args.charts {
        Some(dir) => Some(draw(dir, args, &outcomes)?),
        None => None,
    };
    if desk.json {
        say_json(&Told {
            outcomes: &outcomes,
            planner: costs.as_deref(),
        })?;
    } else {
        say(&text(args, &outcomes, costs.as_deref()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn scenarios(args: &Args) -> Result<Vec<Scenario>, Problem> {
    let size = Size {
        hosts: args.hosts,
        vms: args.vms,
    };
    let wrong = |text: String| Problem::new(Code::BadRequest, text);
    if size.hosts == 0 || size.hosts > MOST || size.vms > MOST {
        let text = format!("a fleet has 1 to {MOST} hosts and at most {MOST} VMs");
        return Err(wrong(text));
    }
    let Some(breaks) = args.breaks else {
        let all = simulate::standard(size, args.seed).into_iter();
        return Ok(all.map(|scenario| scenario.of(args.component)).collect());
    };
    let Amount::Share(share) = breaks else {
        return Err(wrong(format!(
            "--breaks {breaks}: give a share of guests, such as 2%"
        )));
    };
    let name = format!("breaks {breaks}");
    let ordinary = Scenario::ordinary(size, args.seed).of(args.component);
    let scenario = ordinary.but(&name, |scenario| {
        scenario.release.breaks = f64::from(share) / 10_000.0;
        if let Some(at_once) = args.at_once {
            scenario.policy.at_once.total = at_once;
        }
        if let Some(size) = args.canaries {
            let bake = scenario.policy.stages.first().map(|stage| stage.bake);
            scenario.policy.stages = vec![Stage {
                size,
                bake: bake.unwrap_or_default(),
            }];
        }
    });
    scenario
        .policy
        .check()
        .map_err(|error| wrong(error.to_string()))?;
    Ok(vec![scenario])
}

fn draw(dir: &Path, args: &Args, outcomes: &[Outcome]) -> Result<Vec<Cost>, Problem> {
    std::fs::create_dir_all(dir)
        .map_err(|e| io_problem(format!("create {}", dir.display()), &e))?;
    let largest = Size {
        hosts: args.hosts,
        vms: args.vms,
    };
    let costs = cost::measure(largest)
        .map_err(|error| Problem::new(Code::Failed, format!("cannot measure: {error}")))?;
    let mut pictures = vec![("patched.svg", charts::patched(outcomes))];
    if let Some(first) = outcomes.first() {
        pictures.push(("held.svg", charts::held(first)));
    }
    let [staged, unstaged] = blasts(args.seed);
    pictures.push(("blast.svg", charts::blast(&staged, &unstaged, BLAST.vms)));
    if costs.len() > 1 {
        pictures.push(("planner.svg", charts::cost(&costs)));
    }
    for (name, svg) in pictures {
        let path = dir.join(name);
        std::fs::write(&path, svg)
            .map_err(|e| io_problem(format!("write {}", path.display()), &e))?;
    }
    Ok(costs)
}

/// How many guests are broken on average by releases that break ever more, with stages and without.
fn blasts(seed: u64) -> [Vec<(f64, f64)>; 2] {
    let scenarios = |share: f64| {
        let seeds = (0..BLAST_SEEDS).map(move |n| seed.wrapping_add(n.into()));
        seeds.map(move |seed| {
            Scenario::ordinary(BLAST, seed).but("blast", |s| s.release.breaks = share)
        })
    };
    let with: Vec<Scenario> = SHARES.into_iter().flat_map(scenarios).collect();
    let without = with
        .iter()
        .cloned()
        .map(|scenario| scenario.without_stages("blast"));
    let broken = |scenarios: &[Scenario]| {
        let outcomes = simulate::run_all(scenarios);
        let of_share = outcomes.chunks(BLAST_SEEDS as usize);
        let mean = of_share.map(|of_share| {
            let broken: u32 = of_share.iter().map(|outcome| outcome.broken).sum();
            f64::from(broken) / f64::from(BLAST_SEEDS)
        });
        SHARES.into_iter().zip(mean).collect()
    };
    [broken(&with), broken(&without.collect::<Vec<_>>())]
}

fn text(args: &Args, outcomes: &[Outcome], costs: Option<&[Cost]>) -> String {
    let mut text = format!(
        "{} hosts, {} VMs, seed {}\n\n",
        grouped(args.hosts),
        grouped(args.vms),
        args.seed
    );
    let head = [
        "SCENARIO",
        "ENDED",
        "HOURS",
        "HALF",
        "99%",
        "TOUCHED",
        "BROKEN",
        "VM-H LOST",
        "MOST HELD",
        "PLANS",
        "CPU MS A PLAN",
        "WORST",
        "CPU",
    ];
    let rows: Vec<Vec<String>> = outcomes.iter().map(row).collect();
    let right: Vec<usize> = (2..head.len()).collect();
    text.push_str(&format::table(&head, &right, &rows));
    if let Some(costs) = costs.filter(|costs| !costs.is_empty()) {
        let rows: Vec<Vec<String>> = costs
            .iter()
            .map(|cost| {
                let each = cost.worst_ms * 1e6 / f64::from(cost.vms.max(1));
                vec![
                    grouped(cost.vms),
                    format!("{:.2}", cost.usual_ms),
                    format!("{:.2}", cost.worst_ms),
                    format!("{each:.0}"),
                ]
            })
            .collect();
        text.push('\n');
        let head = [
            "VMS",
            "CPU MS, 1% AT ONCE",
            "CPU MS, ALL LOOKED INTO",
            "NS A VM",
        ];
        text.push_str(&format::table(&head, &[0, 1, 2, 3], &rows));
    }
    text
}

fn row(outcome: &Outcome) -> Vec<String> {
    let hours = |hours: Option<f64>| hours.map_or("never".into(), |hours| format!("{hours:.1}"));
    vec![
        outcome.name.clone(),
        outcome.ended.clone(),
        format!("{:.1}", outcome.hours),
        hours(outcome.hours_to[0]),
        hours(outcome.hours_to[2]),
        grouped(outcome.touched),
        grouped(outcome.broken),
        format!("{:.1}", outcome.vm_hours_lost),
        grouped(outcome.most_held),
        outcome.plans.to_string(),
        format!("{:.1}", outcome.plan_ms[0]),
        format!("{:.1}", outcome.plan_ms[1]),
        format!("{:.1} s", outcome.took_s),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> Args {
        Args {
            component: Rung::Vmm,
            hosts: 10,
            vms: 100,
            seed: 1,
            breaks: None,
            canaries: None,
            at_once: None,
            charts: None,
        }
    }

    #[test]
    fn what_can_not_be_simulated_is_refused_with_the_reason() {
        let refused = |change: fn(&mut Args)| {
            let mut args = args();
            change(&mut args);
            scenarios(&args).expect_err("refused").message
        };
        assert!(refused(|a| a.hosts = 0).contains("1 to 10000000 hosts"));
        assert!(refused(|a| a.vms = u32::MAX).contains("at most"));
        assert!(refused(|a| a.breaks = Some(Amount::Count(3))).contains("such as 2%"));
        let nothing_at_once = |a: &mut Args| {
            a.breaks = Some(Amount::percent(1));
            a.at_once = Some(0);
        };
        assert!(refused(nothing_at_once).contains("nothing could ever begin"));
    }

    #[test]
    fn charts_are_drawn_and_the_planner_is_measured() {
        let dir = tempfile::tempdir().expect("a directory");
        let args = Args {
            vms: 4_000,
            hosts: 400,
            breaks: Some(Amount::percent(100)),
            charts: Some(dir.path().join("charts")),
            ..args()
        };
        let outcomes = simulate::run_all(&scenarios(&args).expect("one scenario"));
        let costs = draw(&dir.path().join("charts"), &args, &outcomes).expect("charts");
        for name in ["patched.svg", "held.svg", "blast.svg", "planner.svg"] {
            let svg = std::fs::read_to_string(dir.path().join("charts").join(name)).expect(name);
            assert!(svg.contains("<svg") && !svg.contains("NaN"), "{name}");
        }
        let told = text(&args, &outcomes, Some(&costs));
        assert!(
            told.contains("rolled back") && told.contains("NS A VM"),
            "{told}"
        );
    }
}

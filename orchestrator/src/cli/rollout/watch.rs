//! Watches a rollout: a bar for each update domain.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{get, is_at_rest, tables};
use crate::cli::{Desk, say, say_json};
use crate::fleet::explain::RolloutView;
use crate::fleet::record::UnitRecord;
use crate::model::{Code, Problem};
use crate::plan::rollout::State;
use crate::plan::rollout::seen::Phase;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);
/// How long a daemon may stay away before the command stops waiting for it.
const DAEMON_PATIENCE: Duration = Duration::from_secs(60);

/// Watches until it is over, or waits for a hand.
pub(super) async fn watch(desk: &Desk, id: &str) -> Result<ExitCode, Problem> {
    let mut bars = Bars::new(desk.json);
    let mut seen = Instant::now();
    let view = loop {
        match get(desk, id).await {
            Ok(view) => {
                seen = Instant::now();
                bars.show(&view);
                if is_at_rest(view.rollout.state) {
                    break view;
                }
            }
            // It goes on: another daemon may drive, and this one when it is back.
            Err(problem) if problem.code == Code::NoDaemon && seen.elapsed() < DAEMON_PATIENCE => {}
            Err(problem) => return Err(problem),
        }
        tokio::time::sleep(LOOK).await;
    };
    bars.clear();
    match desk.json {
        true => say_json(&view)?,
        false => say(&tables::of_view(&view))?,
    }
    Ok(match view.rollout.state {
        State::Finished => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// A bar for each update domain, and a line above them.
struct Bars {
    all: MultiProgress,
    head: ProgressBar,
    domains: BTreeMap<(String, u16), ProgressBar>,
}

impl Bars {
    fn new(quiet: bool) -> Self {
        let target = match quiet {
            true => ProgressDrawTarget::hidden(),
            false => ProgressDrawTarget::stderr(),
        };
        let all = MultiProgress::with_draw_target(target);
        let head = all.add(ProgressBar::new_spinner());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}  {elapsed}") {
            head.set_style(style);
        }
        head.enable_steady_tick(Duration::from_millis(100));
        Self {
            all,
            head,
            domains: BTreeMap::new(),
        }
    }

    fn show(&mut self, view: &RolloutView) {
        self.head.set_message(tables::headline(view));
        let mut domains: BTreeMap<(String, u16), Vec<&UnitRecord>> = BTreeMap::new();
        for unit in &view.rollout.units {
            for (set, domain) in unit.domains() {
                let set = set.unwrap_or("no set").to_owned();
                domains.entry((set, domain)).or_default().push(unit);
            }
        }
        for (domain, units) in domains {
            let bar = self.domains.entry(domain.clone()).or_insert_with(|| {
                let bar = self.all.add(ProgressBar::new(units.len() as u64));
                let template = "  {prefix:<20} {bar:24} {pos}/{len} {msg}";
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style);
                }
                bar.set_prefix(format!("{} {}", domain.0, domain.1));
                bar
            });
            let is = |phase: fn(Phase) -> bool| units.iter().filter(move |unit| phase(unit.phase));
            bar.set_position(is(|phase| phase == Phase::Done).count() as u64);
            let failed = is(Phase::is_failure).count();
            let moving = is(Phase::is_in_flight);
            let moving: Vec<&str> = moving.map(|unit| unit.short()).collect();
            let failed = match failed {
                0 => String::new(),
                failed => format!("{failed} failed  "),
            };
            bar.set_message(format!("{failed}{}", moving.join(" ")));
        }
    }

    fn clear(&self) {
        // Fails only if nobody looks.
        let _ = self.all.clear();
        self.head.finish_and_clear();
    }
}

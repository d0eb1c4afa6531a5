//! What a monitoring system reads: Prometheus' text format, made anew for each reader.
//!
//! Nothing of swaps is counted on the side. What was done is in the store, and is added up when it is asked for:
//! so figures survive the daemon, and can't tell of anything else than the records do. Pure.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use crate::fleet::explain::HostView;
use crate::fleet::record::RolloutRecord;
use crate::model::{HOST, KVM, SwapState, VMM, VmState};
use crate::plan::rollout::seen::Phase;
use crate::traces::SpanCounts;

/// Upper bounds of blackouts and brownouts, in seconds.
const TIMES: [f64; 12] = [
    0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 10.0, 30.0,
];
/// Upper bounds of clock errors, in seconds.
const ERRORS: [f64; 8] = [10e-9, 25e-9, 50e-9, 100e-9, 1e-6, 10e-6, 100e-6, 1e-3];

/// How swaps end.
const OUTCOMES: [SwapState; 4] = [
    SwapState::Moved,
    SwapState::Kept,
    SwapState::Resumed,
    SwapState::Crashed,
];
/// What guests are.
const GUESTS: [VmState; 7] = [
    VmState::Starting,
    VmState::Running,
    VmState::Swapping,
    VmState::Stopped,
    VmState::Crashed,
    VmState::Failed,
    VmState::Lost,
];

/// A swap that is over, as far as it is counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwapFigures {
    /// What was swapped.
    pub component: String,
    /// How it ended.
    pub state: SwapState,
    /// Its blackout.
    pub blackout: Option<Duration>,
    /// Its brownout.
    pub brownout: Option<Duration>,
    /// How wrong the guest's clock was after it.
    pub clock_error: Option<Duration>,
}

/// All that is told.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Swaps of this host that are over.
    pub swaps: Vec<SwapFigures>,
    /// Guests of this host.
    pub guests: Vec<VmState>,
    /// Guests of this host that were not well after their last swap.
    pub unwell: usize,
    /// What became of spans, since this daemon began.
    pub spans: SpanCounts,
    /// Rollouts of the fleet that aren't over, and the last one that is.
    pub rollouts: Vec<RolloutRecord>,
    /// Hosts of the fleet; none if its store is away.
    pub hosts: Option<Vec<HostView>>,
}

/// The figures as Prometheus reads them.
pub fn text(figures: &Figures) -> String {
    let mut page = Page::default();
    page.swaps(&figures.swaps);
    page.guests(figures);
    page.fleet(figures.hosts.as_deref());
    page.rollouts(&figures.rollouts);
    page.spans(figures.spans);
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String can't fail; so with all lines below.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(key, value)| format!("{key}=\"{}\"", escaped(value)))
            .collect();
        let labels = match labels.is_empty() {
            true => String::new(),
            false => format!("{{{}}}", labels.join(",")),
        };
        let _ = writeln!(self.text, "{name}{labels} {value}");
    }

    fn swaps(&mut self, swaps: &[SwapFigures]) {
        let name = "stillpoint_swaps_total";
        self.head(name, "counter", "Swaps that are over, by how they ended.");
        // All from the start, at 0: what appears with its first event has no increase to be alerted of.
        let mut counts: BTreeMap<(&str, String), u64> = BTreeMap::new();
        for component in [VMM, KVM, HOST] {
            for outcome in OUTCOMES {
                counts.insert((component, outcome.to_string()), 0);
            }
        }
        for swap in swaps {
            let key = (swap.component.as_str(), swap.state.to_string());
            *counts.entry(key).or_default() += 1;
        }
        for ((component, outcome), count) in &counts {
            let labels = [("component", *component), ("outcome", outcome.as_str())];
            self.line(name, &labels, count);
        }
        let of = |pick: fn(&SwapFigures) -> Option<Duration>| swaps.iter().filter_map(pick);
        self.histogram(
            "stillpoint_blackout_seconds",
            "From the last guest instruction before a swap to the first after it.",
            &TIMES,
            of(|swap| swap.blackout),
        );
        self.histogram(
            "stillpoint_brownout_seconds",
            "Work beside a guest that runs, for its swap.",
            &TIMES,
            of(|swap| swap.brownout),
        );
        self.histogram(
            "stillpoint_clock_error_seconds",
            "How wrong the guest's clock was after a swap.",
            &ERRORS,
            of(|swap| swap.clock_error),
        );
    }

    fn histogram(
        &mut self,
        name: &str,
        help: &str,
        bounds: &[f64],
        values: impl Iterator<Item = Duration>,
    ) {
        self.head(name, "histogram", help);
        let values: Vec<f64> = values.map(|value| value.as_secs_f64()).collect();
        let bucket = format!("{name}_bucket");
        for bound in bounds {
            let within = values.iter().filter(|value| *value <= bound).count();
            self.line(&bucket, &[("le", &bound.to_string())], within);
        }
        self.line(&bucket, &[("le", "+Inf")], values.len());
        // The sum of nothing is -0.
        let sum = values.iter().sum::<f64>() + 0.0;
        self.line(&format!("{name}_sum"), &[], sum);
        self.line(&format!("{name}_count"), &[], values.len());
    }

    fn guests(&mut self, figures: &Figures) {
        let name = "stillpoint_guests";
        self.head(name, "gauge", "Guests of this host, by what they are.");
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        counts.extend(GUESTS.map(|state| (state.to_string(), 0)));
        for state in &figures.guests {
            *counts.entry(state.to_string()).or_default() += 1;
        }
        for (state, count) in &counts {
            self.line(name, &[("state", state)], count);
        }
        let name = "stillpoint_guests_unwell";
        let help =
            "Guests of this host that were not well after their last swap, and are still there.";
        self.head(name, "gauge", help);
        self.line(name, &[], figures.unwell);
    }

    fn fleet(&mut self, hosts: Option<&[HostView]>) {
        let name = "stillpoint_fleet_store_up";
        self.head(
            name,
            "gauge",
            "Whether the store that the fleet shares answers.",
        );
        self.line(name, &[], u8::from(hosts.is_some()));
        let hosts = hosts.unwrap_or_default();
        let name = "stillpoint_host_heard";
        self.head(name, "gauge", "Whether a host's daemon is heard.");
        for host in hosts {
            self.line(name, &[("host", host.name.as_str())], u8::from(host.alive));
        }
        let name = "stillpoint_host_cordoned";
        self.head(name, "gauge", "Whether a host is to be left alone.");
        for host in hosts {
            let labels = [("host", host.name.as_str())];
            self.line(name, &labels, u8::from(host.cordon.is_some()));
        }
        let name = "stillpoint_drives";
        self.head(
            name,
            "gauge",
            "Whether this daemon drives the fleet's rollouts.",
        );
        let drives = hosts.iter().any(|host| host.is_this && host.drives);
        self.line(name, &[], u8::from(drives));
        let name = "stillpoint_driver_elected";
        self.head(name, "gauge", "Whether any daemon does.");
        let elected = hosts.iter().any(|host| host.drives);
        self.line(name, &[], u8::from(elected));
    }

    fn spans(&mut self, spans: SpanCounts) {
        let name = "stillpoint_spans_total";
        let help = "Spans of this daemon, by whether the collector took them or they were dropped.";
        self.head(name, "counter", help);
        for (became, count) in [("sent", spans.sent), ("dropped", spans.dropped)] {
            self.line(name, &[("became", became)], count);
        }
    }

    fn rollouts(&mut self, rollouts: &[RolloutRecord]) {
        let name = "stillpoint_rollout_state";
        self.head(name, "gauge", "1 for what a rollout is.");
        for rollout in rollouts {
            let state = rollout.state.to_string();
            let labels = [
                ("rollout", rollout.id.0.as_str()),
                ("to", &rollout.to),
                ("state", &state),
            ];
            self.line(name, &labels, 1);
        }
        let name = "stillpoint_rollout_units";
        self.head(
            name,
            "gauge",
            "Units of a rollout, guests or hosts with all theirs, by how far they are.",
        );
        for rollout in rollouts {
            let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
            counts.extend(Phase::ALL.map(|phase| (phase.words(), 0)));
            for unit in &rollout.units {
                *counts.entry(unit.phase.words()).or_default() += 1;
            }
            for (phase, count) in counts {
                let id = rollout.id.0.as_str();
                self.line(name, &[("rollout", id), ("phase", phase)], count);
            }
        }
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn swap(state: SwapState, blackout_us: Option<u64>) -> SwapFigures {
        SwapFigures {
            component: "vmm".into(),
            state,
            blackout: blackout_us.map(Duration::from_micros),
            brownout: None,
            clock_error: blackout_us.map(Duration::from_nanos),
        }
    }

    #[test]
    fn buckets_hold_all_up_to_their_bound_and_the_last_holds_everything() {
        let figures = Figures {
            swaps: vec![
                swap(SwapState::Moved, Some(400)),
                swap(SwapState::Moved, Some(2_000)),
                swap(SwapState::Moved, Some(40_000_000)),
                swap(SwapState::Kept, None),
            ],
            ..Figures::default()
        };
        let text = text(&figures);
        for line in [
            r#"stillpoint_swaps_total{component="vmm",outcome="kept"} 1"#,
            r#"stillpoint_swaps_total{component="vmm",outcome="moved"} 3"#,
            r#"stillpoint_blackout_seconds_bucket{le="0.0005"} 1"#,
            r#"stillpoint_blackout_seconds_bucket{le="0.0025"} 2"#,
            r#"stillpoint_blackout_seconds_bucket{le="30"} 2"#,
            r#"stillpoint_blackout_seconds_bucket{le="+Inf"} 3"#,
            "stillpoint_blackout_seconds_count 3",
            r#"stillpoint_clock_error_seconds_bucket{le="0.000001"} 1"#,
            "stillpoint_fleet_store_up 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }

    /// A counter that appears with its first event shows no increase, and its alert stays silent.
    #[test]
    fn all_samples_are_there_at_zero_from_the_start() {
        let text = text(&Figures::default());
        let mut lines = text.lines();
        for line in [
            r#"stillpoint_swaps_total{component="vmm",outcome="crashed"} 0"#,
            r#"stillpoint_swaps_total{component="host",outcome="resumed"} 0"#,
            r#"stillpoint_swaps_total{component="kvm",outcome="kept"} 0"#,
            r#"stillpoint_guests{state="crashed"} 0"#,
            "stillpoint_guests_unwell 0",
            "stillpoint_drives 0",
            r#"stillpoint_spans_total{became="dropped"} 0"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(
            lines.all(|line| line.starts_with('#') || line.ends_with(" 0")),
            "{text}"
        );
    }

    /// A figure that was renamed would leave an alert that never fires.
    #[test]
    fn what_the_dashboard_and_the_alerts_ask_for_is_told() {
        let told = text(&Figures::default());
        let asked = [
            include_str!("../../docs/monitoring/grafana.json"),
            include_str!("../../docs/monitoring/alerts.yml"),
        ]
        .concat();
        let plain = |c: char| c.is_ascii_lowercase() || c == '_';
        let mut names: Vec<&str> = asked.split(|c| !plain(c)).collect();
        names.retain(|name| name.starts_with("stillpoint_"));
        assert!(names.len() > 20, "{names:?}");
        for name in names {
            let family = name.trim_end_matches("_bucket");
            let head = format!("# TYPE {family} ");
            assert!(told.contains(&head), "{name} is told by nobody");
        }
        let states = ["stopped", "stuck", "rolling back", "rolled back"];
        use crate::plan::rollout::State;
        let words = [
            State::Stopped,
            State::Stuck,
            State::RollingBack,
            State::RolledBack,
        ];
        assert_eq!(words.map(|state| state.to_string()), states);
    }

    #[test]
    fn labels_can_not_break_out_of_their_quotes() {
        let mut page = Page::default();
        page.line("m", &[("k", "a\"b\\c\nd")], 1);
        assert_eq!(page.text, "m{k=\"a\\\"b\\\\c\\nd\"} 1\n");
    }
}

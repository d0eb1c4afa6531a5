//! The metrics. Names follow Prometheus' rules: base units, `_total` for what only grows. (The library puts the
//! full stop behind each help text.)

use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use stillpoint_control::report::SwapReport;

use crate::model::{
    HOST, HostSwap, HostSwapState, KVM, Pause, PauseState, SwapRecord, SwapState, VMM, VmRecord,
    VmState,
};

/// Of a pause, seconds: half a millisecond to the longest budget.
const PAUSES: [f64; 16] = [
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0,
    30.0,
];
/// Of a kvmclock's error, seconds: nanoseconds, as a rule.
const CLOCKS: [f64; 9] = [2e-9, 5e-9, 12e-9, 25e-9, 50e-9, 1e-6, 1e-5, 1e-4, 1e-3];
/// Of a wall clock's error, seconds.
const WALLS: [f64; 9] = [1e-6, 5e-6, 1e-5, 5e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0];
/// Of what goes on while the guest runs, seconds.
const BROWNOUTS: [f64; 10] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 30.0];

/// What is on record.
#[derive(Clone, Debug, Default)]
pub struct Records {
    /// Guests.
    pub vms: Vec<VmRecord>,
    /// Swaps, a guest's part of a swap of its host among them.
    pub swaps: Vec<SwapRecord>,
    /// Swaps of the host.
    pub host_swaps: Vec<HostSwap>,
    /// What guests are told.
    pub pauses: Vec<Pause>,
}

/// A word of ours as a label's value: as the API writes it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Word(String);

impl Word {
    fn of(value: impl serde::Serialize) -> Self {
        let value = serde_json::to_value(value).unwrap_or_default();
        Self(value.as_str().unwrap_or_default().to_owned())
    }
}

impl EncodeLabelValue for Word {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.0.as_str().encode(encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    component: Word,
    outcome: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    component: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct In {
    state: Word,
}

type Histograms = Family<Of, Histogram, fn() -> Histogram>;

/// All of them. What nobody has counted yet is there all the same, where its labels are known.
#[derive(Debug)]
struct Families {
    swaps: Family<Ended, Counter>,
    warned: Family<Of, Counter>,
    overrun: Family<Of, Counter>,
    blackout: Histograms,
    guest_blackout: Histograms,
    brownout: Histograms,
    clock: Histograms,
    wall: Histograms,
    host_swaps: Family<Ended, Counter>,
    vms: Family<In, Gauge>,
    pauses: Family<In, Gauge>,
}

impl Families {
    fn new() -> Self {
        let histograms = |make: fn() -> Histogram| Family::new_with_constructor(make);
        Self {
            swaps: Family::default(),
            warned: Family::default(),
            overrun: Family::default(),
            blackout: histograms(|| Histogram::new(PAUSES)),
            guest_blackout: histograms(|| Histogram::new(PAUSES)),
            brownout: histograms(|| Histogram::new(BROWNOUTS)),
            clock: histograms(|| Histogram::new(CLOCKS)),
            wall: histograms(|| Histogram::new(WALLS)),
            host_swaps: Family::default(),
            vms: Family::default(),
            pauses: Family::default(),
        }
    }

    /// All at zero. A sample that is not there yet has no rate when it comes: Prometheus sees an increase only
    /// of one that it knew.
    fn begin(&self) {
        for component in [VMM, HOST, KVM] {
            let of = Of {
                component: Word(component.to_owned()),
            };
            for family in [
                &self.blackout,
                &self.guest_blackout,
                &self.brownout,
                &self.clock,
                &self.wall,
            ] {
                drop(family.get_or_create(&of));
            }
            drop(self.warned.get_or_create(&of));
            drop(self.overrun.get_or_create(&of));
            let ended = |outcome| Ended {
                component: of.component.clone(),
                outcome,
            };
            for state in SwapState::ALL.into_iter().filter(|state| state.is_over()) {
                drop(self.swaps.get_or_create(&ended(Word::of(state))));
            }
            if component != VMM {
                for state in HostSwapState::ALL
                    .into_iter()
                    .filter(|state| state.is_over())
                {
                    drop(self.host_swaps.get_or_create(&ended(Word::of(state))));
                }
            }
        }
        for state in VmState::ALL.map(Word::of) {
            drop(self.vms.get_or_create(&In { state }));
        }
        for state in PauseState::ALL.map(Word::of) {
            drop(self.pauses.get_or_create(&In { state }));
        }
    }

    fn register(&self) -> Registry {
        let mut all = Registry::with_prefix("stillpoint");
        let version = vec![("version", env!("CARGO_PKG_VERSION"))];
        all.register("build", "The daemon", Info::new(version));
        all.register("vms", "Guests of this host, by state", self.vms.clone());
        all.register(
            "swaps",
            "Swaps that have ended, by component and outcome: moved, kept, resumed, crashed",
            self.swaps.clone(),
        );
        all.register(
            "swaps_warned",
            "Swaps whose report has a warning: a bound that was broken",
            self.warned.clone(),
        );
        all.register(
            "swaps_over_budget",
            "Swaps in which the guest stood still for longer than its budget",
            self.overrun.clone(),
        );
        all.register(
            "host_swaps",
            "Swaps of the host itself that have ended, by component and outcome",
            self.host_swaps.clone(),
        );
        all.register(
            "announced_pauses",
            "Pauses that guests were told of, by state",
            self.pauses.clone(),
        );
        let seconds = || Unit::Seconds;
        let mut histogram = |name, help, family: &Histograms| {
            all.register_with_unit(name, help, seconds(), family.clone());
        };
        histogram(
            "blackout",
            "How long a guest stood still: from the first vCPU's kick to the last one's entry",
            &self.blackout,
        );
        histogram(
            "guest_blackout",
            "The longest gap that a vCPU saw by itself, of guests that look",
            &self.guest_blackout,
        );
        histogram(
            "brownout",
            "What a swap took before the guest stood still",
            &self.brownout,
        );
        histogram(
            "clock_error",
            "Error of the guest's kvmclock after a swap, whichever way, by its own page",
            &self.clock,
        );
        histogram(
            "wall_clock_error",
            "By how much a swap moved the guest's wall clock against the host's, whichever way",
            &self.wall,
        );
        all
    }

    fn count(&self, swap: &SwapRecord) {
        if !swap.state.is_over() {
            return;
        }
        let component = Word(swap.component.clone());
        let outcome = Word::of(swap.state);
        let ended = Ended {
            component: component.clone(),
            outcome,
        };
        self.swaps.get_or_create(&ended).inc();
        if let Some(report) = &swap.report {
            self.measure(&Of { component }, report);
        }
    }

    fn measure(&self, of: &Of, report: &SwapReport) {
        let blackout = report.blackout.host;
        if !blackout.is_zero() {
            self.blackout
                .get_or_create(of)
                .observe(blackout.as_secs_f64());
        }
        if let Some(worst) = report.blackout.guest_worst() {
            self.guest_blackout
                .get_or_create(of)
                .observe(worst.as_secs_f64());
        }
        let before: Duration = report
            .phases
            .iter()
            .filter(|phase| !phase.in_blackout)
            .map(|phase| phase.duration)
            .sum();
        if !before.is_zero() {
            self.brownout
                .get_or_create(of)
                .observe(before.as_secs_f64());
        }
        if blackout > report.budget {
            self.overrun.get_or_create(of).inc();
        }
        if !report.warnings.is_empty() {
            self.warned.get_or_create(of).inc();
        }
        let Some(clock) = &report.clock else { return };
        if let Some(error) = clock.kvmclock_error_ns {
            self.clock.get_or_create(of).observe(nanoseconds(error));
        }
        let wall = &clock.wall_clock;
        if let (Some(before), Some(after)) = (wall.error_before_ns, wall.error_after_ns) {
            let moved = after.saturating_sub(before);
            self.wall.get_or_create(of).observe(nanoseconds(moved));
        }
    }
}

fn nanoseconds(error: i64) -> f64 {
    Duration::from_nanos(error.unsigned_abs()).as_secs_f64()
}

/// The text of a scrape.
pub fn render(records: &Records) -> String {
    let families = Families::new();
    families.begin();
    for vm in &records.vms {
        let state = Word::of(vm.state);
        families.vms.get_or_create(&In { state }).inc();
    }
    records.swaps.iter().for_each(|swap| families.count(swap));
    for swap in records
        .host_swaps
        .iter()
        .filter(|swap| swap.state.is_over())
    {
        let ended = Ended {
            component: Word(swap.component().to_owned()),
            outcome: Word::of(swap.state),
        };
        families.host_swaps.get_or_create(&ended).inc();
    }
    for pause in &records.pauses {
        let state = Word::of(pause.state);
        families.pauses.get_or_create(&In { state }).inc();
    }
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode(&mut text, &families.register());
    text
}

//! The report: ratios first, then whether targets are met, then what they were made of.

use serde::Serialize;

use crate::environment::Facts;
use crate::run::Measured;
use crate::sample::{Series, Who};
use crate::scene::{BASE, LARGE, PAIR, SMALL, Scene};
use crate::stats::{self, Ratio, Summary};

/// The guest-visible median may be so many times the floor's.
const MOST_OVER_FLOOR: f64 = 2.0;
/// The median may change by so much from 256 MiB to 8 GiB.
const MOST_BY_SIZE: f64 = 0.15;

/// `report.json`. The order of fields is part of the format.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// What counts.
    pub(crate) ratios: Ratios,
    /// The interval of each ratio that holds it with 95 %.
    pub(crate) intervals: Vec<Interval>,
    /// Targets, and whether they are met.
    pub(crate) targets: Vec<Target>,
    /// The machine.
    pub(crate) environment: Facts,
    /// What the machine does to a guest that nobody swaps, against what we add to the floor.
    pub(crate) noise: Vec<Noise>,
    /// Every series, summed up, ms.
    pub(crate) series: Vec<Row>,
    /// Where our time goes.
    pub(crate) phases: Vec<Phases>,
    /// What was left out, and why.
    pub(crate) left_out: Vec<String>,
    /// How long measuring took, s.
    pub(crate) took_s: f64,
}

/// Guest-visible blackout, one over the other.
#[derive(Debug, Serialize)]
pub(crate) struct Ratios {
    pub(crate) blackout_vs_floor_p50: Option<f64>,
    pub(crate) blackout_vs_floor_p99: Option<f64>,
    pub(crate) blackout_vs_floor_p50_2vcpu: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ram_8g_vs_256m_p50: Option<f64>,
    pub(crate) blackout_vs_floor_p99_2vcpu: Option<f64>,
    pub(crate) host_blackout_vs_floor_p50: Option<f64>,
}

/// A ratio with its interval.
#[derive(Debug, Serialize)]
pub(crate) struct Interval {
    /// Its name in [`Ratios`].
    pub(crate) name: &'static str,
    /// For people.
    pub(crate) title: &'static str,
    /// It.
    #[serde(flatten)]
    pub(crate) ratio: Ratio,
}

/// A target.
#[derive(Debug, Serialize)]
pub(crate) struct Target {
    /// For people.
    pub(crate) title: &'static str,
    /// Whether it is met by the figure itself.
    pub(crate) met: bool,
    /// Whether the whole interval says the same.
    pub(crate) sure: bool,
    /// The figure.
    pub(crate) value: f64,
    /// From here.
    pub(crate) least: f64,
    /// To here.
    pub(crate) most: f64,
}

/// Noise of one machine.
#[derive(Debug, Serialize)]
pub(crate) struct Noise {
    /// The machine.
    pub(crate) scene: &'static str,
    /// The longest gap in a window without a swap, ms.
    pub(crate) no_swap: Summary,
    /// What ours has over the floor, ms: median.
    pub(crate) effect_p50: f64,
    /// And p99.
    pub(crate) effect_p99: f64,
    /// Whether half of the windows without a swap hold a gap of half a swap of the floor or more.
    pub(crate) busy: bool,
    /// Whether the median's ratio could as well be 1.
    pub(crate) hides_p50: bool,
    /// Whether that of p99 could, or gaps of nobody's making reach what we add there.
    pub(crate) hides_p99: bool,
}

/// One series.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    /// The machine.
    pub(crate) scene: Scene,
    /// Who swapped.
    pub(crate) who: Who,
    /// Guest-visible blackout (worst vCPU).
    pub(crate) guest: Summary,
    /// The host's.
    pub(crate) host: Summary,
    /// Swaps whose gap was not found in the guest's log.
    pub(crate) unseen: usize,
    /// What the guest complained of.
    pub(crate) faults: Vec<String>,
}

/// Our phases on one machine.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Phases {
    /// The machine.
    pub(crate) scene: Scene,
    /// Median of each phase within the blackout, ms.
    pub(crate) medians: Vec<(String, f64)>,
    /// Median of what is in no phase: wake-ups between the processes.
    pub(crate) between: f64,
    /// Median of what the guest sees beyond the host's blackout: from the first entry to the first
    /// reading of a clock, faults and waits for a core among it.
    pub(crate) after: f64,
    /// Median of the host's blackout.
    pub(crate) host: f64,
    /// And of the guest's.
    pub(crate) guest: f64,
    /// Medians of the phases before it, while the guest runs.
    pub(crate) brownout: Vec<(String, f64)>,
}

/// Makes it.
pub(crate) fn report(measured: &Measured, environment: Facts) -> Report {
    let guest = |scene: &Scene, who| measured.get(scene, who).map(Series::guest);
    let over =
        |over: Option<Vec<u64>>, under: Option<Vec<u64>>, q| stats::ratio(&over?, &under?, q);
    let vs_floor = |scene, q| over(guest(scene, Who::Ours), guest(scene, Who::Floor), q);
    let host = |who| measured.get(&BASE, who).map(Series::host);
    let p50 = vs_floor(&BASE, 0.5);
    let p99 = vs_floor(&BASE, 0.99);
    let p50_pair = vs_floor(&PAIR, 0.5);
    let p99_pair = vs_floor(&PAIR, 0.99);
    let size = over(guest(&LARGE, Who::Ours), guest(&SMALL, Who::Ours), 0.5);
    let host_p50 = over(host(Who::Ours), host(Who::Floor), 0.5);
    let named = [
        (
            "blackout_vs_floor_p50",
            "1 vCPU: median over the floor's",
            p50,
        ),
        ("blackout_vs_floor_p99", "1 vCPU: p99 over the floor's", p99),
        (
            "blackout_vs_floor_p50_2vcpu",
            "2 vCPUs: median over the floor's",
            p50_pair,
        ),
        (
            "blackout_vs_floor_p99_2vcpu",
            "2 vCPUs: p99 over the floor's",
            p99_pair,
        ),
        (
            "ram_8g_vs_256m_p50",
            "8 GiB: median over that of 256 MiB",
            size,
        ),
        (
            "host_blackout_vs_floor_p50",
            "1 vCPU, host's blackout: median",
            host_p50,
        ),
    ];
    let interval = |(name, title, ratio): (_, _, Option<Ratio>)| {
        ratio.map(|ratio| Interval { name, title, ratio })
    };
    let value = |ratio: Option<Ratio>| ratio.map(|ratio| ratio.value);
    let least = 1.0 - MOST_BY_SIZE;
    Report {
        ratios: Ratios {
            blackout_vs_floor_p50: value(p50),
            blackout_vs_floor_p99: value(p99),
            blackout_vs_floor_p50_2vcpu: value(p50_pair),
            ram_8g_vs_256m_p50: value(size),
            blackout_vs_floor_p99_2vcpu: value(p99_pair),
            host_blackout_vs_floor_p50: value(host_p50),
        },
        intervals: named.into_iter().filter_map(interval).collect(),
        targets: [
            target(
                "1 vCPU: median at most 2.0 times the floor's",
                p50,
                0.0,
                MOST_OVER_FLOOR,
            ),
            target(
                "8 GiB: median within 15 % of that of 256 MiB",
                size,
                least,
                1.0 + MOST_BY_SIZE,
            ),
        ]
        .into_iter()
        .flatten()
        .collect(),
        noise: [BASE, PAIR]
            .iter()
            .filter_map(|s| noise(measured, s))
            .collect(),
        series: measured.series.iter().filter_map(row).collect(),
        phases: measured.series.iter().filter_map(phases).collect(),
        left_out: measured.left_out.clone(),
        took_s: measured.took.as_secs_f64(),
        environment,
    }
}

fn target(title: &'static str, ratio: Option<Ratio>, least: f64, most: f64) -> Option<Target> {
    let Ratio { value, low, high } = ratio?;
    let within = |value: f64| (least..=most).contains(&value);
    let met = within(value);
    let outside = high < least || low > most;
    let sure = if met {
        within(low) && within(high)
    } else {
        outside
    };
    Some(Target {
        title,
        met,
        sure,
        value,
        least,
        most,
    })
}

fn noise(measured: &Measured, scene: &Scene) -> Option<Noise> {
    let of = |who| {
        measured
            .get(scene, who)
            .and_then(|s| stats::summary(&s.guest()))
    };
    let (ours, floor, no_swap) = (of(Who::Ours)?, of(Who::Floor)?, of(Who::NoSwap)?);
    let guest = |who| measured.get(scene, who).map(Series::guest);
    let even = |q| {
        let (ours, floor) = (guest(Who::Ours), guest(Who::Floor));
        let ratio = ours
            .zip(floor)
            .and_then(|(ours, floor)| stats::ratio(&ours, &floor, q));
        ratio.is_none_or(|ratio| (ratio.low..=ratio.high).contains(&1.0))
    };
    let (effect_p50, effect_p99) = (ours.p50 - floor.p50, ours.p99 - floor.p99);
    Some(Noise {
        scene: scene.title,
        no_swap,
        effect_p50,
        effect_p99,
        busy: no_swap.p50 * 2.0 >= floor.p50,
        hides_p50: even(0.5),
        hides_p99: even(0.99) || no_swap.p99 >= effect_p99.abs(),
    })
}

fn row(series: &Series) -> Option<Row> {
    Some(Row {
        scene: series.scene,
        who: series.who,
        guest: stats::summary(&series.guest())?,
        host: stats::summary(&series.host())?,
        unseen: series.unseen,
        faults: series.faults.clone(),
    })
}

fn phases(series: &Series) -> Option<Phases> {
    let first = series.samples.first().filter(|s| !s.phases.is_empty())?;
    let of = |name: &str| -> Vec<u64> {
        let phases = series.samples.iter().flat_map(|sample| &sample.phases);
        phases.filter(|p| p.0 == name).map(|p| p.1).collect()
    };
    let before = |name: &str| -> Vec<u64> {
        let samples = series.samples.iter();
        samples
            .filter_map(|sample| sample.brownout.get(name).copied())
            .collect()
    };
    let between: Vec<u64> = series
        .samples
        .iter()
        .map(|s| s.host_ns.saturating_sub(s.phases.iter().map(|p| p.1).sum()))
        .collect();
    let after: Vec<u64> = series
        .samples
        .iter()
        .map(|s| s.guest().saturating_sub(s.host_ns))
        .collect();
    let medians = first
        .phases
        .iter()
        .map(|(name, _)| (name.clone(), stats::median(&of(name))));
    let brownout = first
        .brownout
        .keys()
        .map(|name| (name.clone(), stats::median(&before(name))));
    Some(Phases {
        scene: series.scene,
        medians: medians.collect(),
        between: stats::median(&between),
        after: stats::median(&after),
        host: stats::median(&series.host()),
        guest: stats::median(&series.guest()),
        brownout: brownout.collect(),
    })
}

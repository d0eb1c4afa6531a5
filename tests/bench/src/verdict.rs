//! The report: ratios first, then whether targets are met, then what they were made of.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::environment::Facts;
use crate::run::Measured;
use crate::sample::{Series, Who};
use crate::scene::{BASE, LARGE, MANY, PAIR, SMALL, Scene};
use crate::stats::{self, Ratio, Summary};

/// The guest-visible median may be so many times the floor's, if all of the state is loaded after the freeze.
const MOST_WHOLE: f64 = 1.3;
/// And if a rehearsed state was loaded ahead.
const MOST_AHEAD: f64 = 0.8;
/// QEMU's must be so many times ours.
const LEAST_QEMU: f64 = 4.0;
/// The median may change by so much from 256 MiB to 8 GiB.
const MOST_BY_SIZE: f64 = 0.10;
/// With eight vCPUs it may be so many times that of one.
const MOST_BY_VCPUS: f64 = 4.0;
/// A write pass over 1 GiB right after a swap may take so much longer, s.
const MOST_BROWNOUT_S: f64 = 0.3;
/// And p99 so many times its own median.
const MOST_TAIL: f64 = 3.0;

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
    /// The same for machines whose vCPUs may outnumber the cores.
    pub(crate) controls: Vec<Control>,
    /// Which QEMU it was.
    pub(crate) qemu: Option<String>,
    /// Every series, summed up, ms.
    pub(crate) series: Vec<Row>,
    /// A pass of writes over 1 GiB right after a swap, less the same pass again, ms: page tables filled before the
    /// freeze, left to faults, and what a pass takes.
    pub(crate) brownout: [Option<Summary>; 3],
    /// Where our time goes.
    pub(crate) phases: Vec<Phases>,
    /// What was left out, and why.
    pub(crate) left_out: Vec<String>,
    /// How long measuring took, s.
    pub(crate) took_s: f64,
}

/// Guest-visible blackout, one over the other; by name. Of what was not measured there is none.
pub(crate) type Ratios = BTreeMap<&'static str, f64>;

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

/// Whether a swap of a machine stands out from what its guest sees without one, ms.
#[derive(Debug, Serialize)]
pub(crate) struct Control {
    /// The machine.
    pub(crate) scene: &'static str,
    /// A swap's median.
    pub(crate) swap_p50: f64,
    /// The median of windows without one; 0 is below 0.1.
    pub(crate) no_swap_p50: f64,
    /// Whether the figure can be relied on.
    pub(crate) concludes: bool,
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
    /// Rehearsed or not.
    pub(crate) who: Who,
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

/// A ratio that is measured: its name, what it is called, and how it is come by.
type Measure = (&'static str, &'static str, Option<Ratio>);

fn measures(measured: &Measured) -> Vec<Measure> {
    let guest = |scene: &Scene, who| measured.get(scene, who).map(Series::guest);
    let over =
        |over: Option<Vec<u64>>, under: Option<Vec<u64>>, q| stats::ratio(&over?, &under?, q);
    let vs = |scene, who, other, q| over(guest(scene, who), guest(scene, other), q);
    let [one, .., eight] = &MANY;
    vec![
        (
            "delta_vs_floor_p50",
            "1 vCPU: median over the floor's",
            vs(&BASE, Who::Ours, Who::Floor, 0.5),
        ),
        (
            "delta_vs_floor_p50_2vcpu",
            "2 vCPUs: median over the floor's",
            vs(&PAIR, Who::Ours, Who::Floor, 0.5),
        ),
        (
            "blackout_vs_floor_p50",
            "1 vCPU, not rehearsed: over the floor's",
            vs(&BASE, Who::Whole, Who::Floor, 0.5),
        ),
        (
            "blackout_vs_floor_p50_2vcpu",
            "2 vCPUs, not rehearsed: over the floor's",
            vs(&PAIR, Who::Whole, Who::Floor, 0.5),
        ),
        (
            "blackout_vs_floor_p99",
            "1 vCPU: p99 over the floor's",
            vs(&BASE, Who::Ours, Who::Floor, 0.99),
        ),
        (
            "qemu_cpr_vs_ours_p50",
            "1 vCPU: QEMU cpr's median over ours",
            vs(&BASE, Who::Qemu, Who::Ours, 0.5),
        ),
        (
            "qemu_cpr_vs_ours_p50_2vcpu",
            "2 vCPUs: QEMU cpr's median over ours",
            vs(&PAIR, Who::Qemu, Who::Ours, 0.5),
        ),
        (
            "qemu_stop_vs_ours_p50",
            "1 vCPU: QEMU stop's median over ours",
            vs(&BASE, Who::QemuStop, Who::Ours, 0.5),
        ),
        (
            "brownout_populated_vs_not",
            "1 GiB after a swap: populated over not",
            over(
                Some(measured.brownout.populated.clone()),
                Some(measured.brownout.faulted.clone()),
                0.5,
            ),
        ),
        (
            "vcpu8_vs_vcpu1_p50",
            "8 resting vCPUs: median over that of 1",
            over(guest(eight, Who::Ours), guest(one, Who::Ours), 0.5),
        ),
        (
            "ram_8g_vs_256m_p50",
            "8 GiB: median over that of 256 MiB",
            over(guest(&LARGE, Who::Ours), guest(&SMALL, Who::Ours), 0.5),
        ),
    ]
}

fn targets(measured: &Measured, ratios: &[Measure]) -> Vec<Target> {
    let of = |wanted: &str| ratios.iter().find(|(name, ..)| *name == wanted)?.2;
    let bounds = [
        (
            "delta_vs_floor_p50",
            "1 vCPU: median at most 0.8 times the floor's",
            0.0,
            MOST_AHEAD,
        ),
        (
            "delta_vs_floor_p50_2vcpu",
            "2 vCPUs: median at most 0.8 times the floor's",
            0.0,
            MOST_AHEAD,
        ),
        (
            "blackout_vs_floor_p50",
            "1 vCPU, not rehearsed: at most 1.3 times",
            0.0,
            MOST_WHOLE,
        ),
        (
            "blackout_vs_floor_p50_2vcpu",
            "2 vCPUs, not rehearsed: at most 1.3 times",
            0.0,
            MOST_WHOLE,
        ),
        (
            "qemu_cpr_vs_ours_p50",
            "1 vCPU: QEMU cpr's median at least 4 times ours",
            LEAST_QEMU,
            f64::INFINITY,
        ),
        (
            "vcpu8_vs_vcpu1_p50",
            "8 resting vCPUs: median at most 4 times that of 1",
            0.0,
            MOST_BY_VCPUS,
        ),
        (
            "ram_8g_vs_256m_p50",
            "8 GiB: median within 10 % of that of 256 MiB",
            1.0 - MOST_BY_SIZE,
            1.0 + MOST_BY_SIZE,
        ),
    ];
    let tails = [
        (&BASE, "1 vCPU: p99 at most 3 times the median"),
        (&PAIR, "2 vCPUs: p99 at most 3 times the median"),
    ];
    let tails = tails.into_iter().filter_map(|(scene, title)| {
        let guest = measured.get(scene, Who::Ours)?.guest();
        target(title, stats::tail(&guest), 0.0, MOST_TAIL)
    });
    let bounds = bounds
        .into_iter()
        .filter_map(|(name, title, least, most)| target(title, of(name), least, most));
    let pass = stats::summary(&measured.brownout.populated);
    let pass = pass.map(|pass| Ratio {
        value: pass.p50 / 1e3,
        low: pass.min / 1e3,
        high: pass.max / 1e3,
    });
    let brownout = target(
        "1 GiB written after a swap: at most 0.3 s more",
        pass,
        0.0,
        MOST_BROWNOUT_S,
    );
    bounds.chain(tails).chain(brownout).collect()
}

/// Makes it.
pub(crate) fn report(measured: &Measured, environment: Facts) -> Report {
    let ratios = measures(measured);
    let interval =
        |&(name, title, ratio): &Measure| ratio.map(|ratio| Interval { name, title, ratio });
    Report {
        ratios: ratios
            .iter()
            .filter_map(|(name, _, ratio)| Some((*name, ratio.as_ref()?.value)))
            .collect(),
        intervals: ratios.iter().filter_map(interval).collect(),
        targets: targets(measured, &ratios),
        qemu: measured.qemu.clone(),
        noise: [BASE, PAIR]
            .iter()
            .filter_map(|s| noise(measured, s))
            .collect(),
        controls: MANY.iter().filter_map(|s| resting(measured, s)).collect(),
        series: measured.series.iter().filter_map(row).collect(),
        brownout: [
            stats::summary(&measured.brownout.populated),
            stats::summary(&measured.brownout.faulted),
            stats::summary(&measured.brownout.steady),
        ],
        phases: measured.series.iter().filter_map(phases).collect(),
        left_out: measured.left_out.clone(),
        took_s: measured.took.as_secs_f64(),
        environment,
    }
}

/// A control of a machine whose vCPUs may outnumber the cores: a gap of nobody's making must be a tenth of
/// what is said of a swap, or nothing is said.
fn resting(measured: &Measured, scene: &Scene) -> Option<Control> {
    let of = |who| stats::summary(&measured.get(scene, who)?.guest());
    let (swap, none) = (of(Who::Ours)?, of(Who::NoSwap)?);
    Some(Control {
        scene: scene.title,
        swap_p50: swap.p50,
        no_swap_p50: none.p50,
        concludes: none.p50 * 10.0 <= swap.p50.max(1.0),
    })
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
        who: series.who,
        medians: medians.collect(),
        between: stats::median(&between),
        after: stats::median(&after),
        host: stats::median(&series.host()),
        guest: stats::median(&series.guest()),
        brownout: brownout.collect(),
    })
}

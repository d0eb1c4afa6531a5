//! The report: ratios first, then whether targets are met, then what they were made of.

mod measures;
mod targets;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::brownout::{Brownout, Recoveries};
use crate::environment::Facts;
use crate::light::{Light, Weight};
use crate::many::{Figures, Many};
use crate::run::Measured;
use crate::sample::{Series, Who};
use crate::scene::{BASE, MANY, PAIR, Scene};
use crate::stats::{self, Ratio, Summary};
use measures::{Measure, measures};
use targets::targets;

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
    /// After swaps.
    pub(crate) brownout: Option<Afterwards>,
    /// Many guests on a host.
    pub(crate) many: Option<Crowd>,
    /// What a VMM weighs: ours, then QEMU's.
    pub(crate) weights: Vec<Weighed>,
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

/// A pass of writes over a guest's RAM right after a swap, less the same pass again, ms.
#[derive(Debug, Serialize)]
pub(crate) struct Afterwards {
    /// What is written, MiB.
    pub(crate) touched_mib: u64,
    /// Page tables filled before the freeze.
    pub(crate) filled: Summary,
    /// KVM's own left to faults, where the kernel can fill them.
    pub(crate) shallow: Option<Summary>,
    /// All left to faults.
    pub(crate) faulted: Summary,
    /// A pass with nothing to be filled.
    pub(crate) steady: Summary,
    /// What swaps of the first kind, and of the last, cost the guest after its pause.
    pub(crate) recoveries: [Option<Recovered>; 2],
}

/// What swaps cost a guest that writes all of its RAM again and again, after its pause, ms.
#[derive(Debug, Serialize)]
pub(crate) struct Recovered {
    /// By the swaps' reports.
    pub(crate) told: Summary,
    /// By the guest's own notes.
    pub(crate) noted: Summary,
    /// Swaps whose report gave no end of the slow time.
    pub(crate) not_seen: usize,
    /// Swaps around whose pause the guest's notes were not seen.
    pub(crate) not_noted: usize,
}

/// Many guests on a host.
#[derive(Debug, Serialize)]
pub(crate) struct Crowd {
    /// How many.
    pub(crate) guests: u32,
    /// Of one that was swapped alone among the others.
    pub(crate) lone: Stood,
    /// Of all, swapped by one command.
    pub(crate) all: Stood,
    /// Guests that did not move.
    pub(crate) stayed: usize,
    /// The longest such command, s.
    pub(crate) took_s: f64,
    /// Memory of the host that a guest takes, MiB: before the swaps, and after all of them.
    pub(crate) each_mib: [f64; 2],
    /// The most that the swaps took of it meanwhile, MiB.
    pub(crate) most_mib: f64,
}

/// Blackouts, ms.
#[derive(Debug, Serialize)]
pub(crate) struct Stood {
    /// The host's, waits for a core included.
    pub(crate) host: Summary,
    /// What the worst vCPU was out of its guest, less its waits for a core.
    pub(crate) unqueued: Summary,
}

/// What a VMM weighs, by medians.
#[derive(Debug, Serialize)]
pub(crate) struct Weighed {
    /// Whose.
    pub(crate) who: Who,
    /// From its start to the guest's first instruction, ms.
    pub(crate) boot: Summary,
    /// Resident memory beside the guest's RAM, MiB.
    pub(crate) beside_mib: f64,
    /// Of a core, while the guest sleeps, percent.
    pub(crate) idle_percent: f64,
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
    /// What each vCPU was out of its guest, less its waits for a core; of ours.
    pub(crate) unqueued: Option<Summary>,
    /// The same of the worst of each swap.
    pub(crate) unqueued_worst: Option<Summary>,
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
        brownout: afterwards(&measured.brownout),
        many: measured.many.as_ref().and_then(crowd),
        weights: weights(&measured.light),
        phases: measured.series.iter().filter_map(phases).collect(),
        left_out: measured.left_out.clone(),
        took_s: measured.took.as_secs_f64(),
        environment,
    }
}

fn afterwards(brownout: &Brownout) -> Option<Afterwards> {
    Some(Afterwards {
        touched_mib: brownout.touched_mib,
        filled: stats::summary(&brownout.populated)?,
        shallow: stats::summary(&brownout.shallow),
        faulted: stats::summary(&brownout.faulted)?,
        steady: stats::summary(&brownout.steady)?,
        recoveries: brownout.recoveries.each_ref().map(recovered),
    })
}

fn recovered(of: &Recoveries) -> Option<Recovered> {
    Some(Recovered {
        told: stats::summary(&of.told)?,
        noted: stats::summary(&of.noted)?,
        not_seen: of.not_seen,
        not_noted: of.not_noted,
    })
}

fn crowd(many: &Many) -> Option<Crowd> {
    let mib = |kib: u64| kib as f64 / 1024.0;
    let longest = many.took_ns.iter().max().copied().unwrap_or(0);
    Some(Crowd {
        guests: many.guests,
        lone: stood(&many.lone)?,
        all: stood(&many.all)?,
        stayed: many.stayed,
        took_s: longest as f64 / 1e9,
        each_mib: many.each_kib.map(mib),
        most_mib: mib(many.most_kib),
    })
}

fn stood(figures: &Figures) -> Option<Stood> {
    Some(Stood {
        host: stats::summary(&figures.host)?,
        unqueued: stats::summary(&figures.unqueued)?,
    })
}

fn weights(light: &Light) -> Vec<Weighed> {
    let weighed = |who, weight: &Weight| {
        Some(Weighed {
            who,
            boot: stats::summary(&weight.boot_ns)?,
            // The median is of millions: KiB to MiB, ns of a second to percent.
            beside_mib: stats::median(&weight.beside_kib) * 1e6 / 1024.0,
            idle_percent: stats::median(&weight.idle_ns) / 10.0,
        })
    };
    let ours = weighed(Who::Ours, &light.ours);
    let qemu = light.qemu.as_ref();
    let qemu = qemu.and_then(|qemu| weighed(Who::Qemu, qemu));
    ours.into_iter().chain(qemu).collect()
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
        unqueued: stats::summary(&series.unqueued()),
        unqueued_worst: stats::summary(&series.unqueued_worst()),
        unseen: series.unseen.len(),
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

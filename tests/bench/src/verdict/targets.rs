//! Targets, and whether they are met.

use super::Target;
use super::measures::Measure;
use crate::run::Measured;
use crate::sample::Who;
use crate::scene::{BASE, PAIR};
use crate::stats::{self, Ratio};

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
/// A report's figure of the slow time may be off the guest's own by so much.
const MOST_OFF: f64 = 0.2;
/// And p99 so many times its own median.
const MOST_TAIL: f64 = 3.0;
/// No guest of many that are swapped by one command may stand still for more than so many times what one does alone.
const MOST_AMONG_MANY: f64 = 2.0;
/// Resident memory of a VMM beside its guest's RAM, MiB.
const MOST_BESIDE_MIB: f64 = 5.0;
/// Of a core, while the guest sleeps.
const MOST_IDLE_PERCENT: f64 = 0.1;

/// All of which the figure was measured.
pub(super) fn targets(measured: &Measured, ratios: &[Measure]) -> Vec<Target> {
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
            "8 resting vCPUs, less waits for a core: median at most 4 times that of 1",
            0.0,
            MOST_BY_VCPUS,
        ),
        (
            "recovery_told_vs_noted_p50",
            "slow time after a swap: a report's figure within 20 % of the guest's",
            1.0 - MOST_OFF,
            1.0 + MOST_OFF,
        ),
        (
            "many_vs_lone_max",
            "all guests at once, less waits for a core: none above 2 times a lone swap's median",
            0.0,
            MOST_AMONG_MANY,
        ),
        (
            "boot_vs_qemu_p50",
            "start to first instruction: no slower than QEMU",
            0.0,
            1.0,
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
    let pass = plain(&measured.brownout.populated, 1e9);
    let light = &measured.light;
    let beside = plain(&light.ours.beside_kib, 1024.0);
    let beside = target(
        "RSS beside the guest's RAM: at most 5 MiB",
        beside,
        0.0,
        MOST_BESIDE_MIB,
    );
    let idle = plain(&light.ours.idle_ns, 1e7);
    let idle = target(
        "a guest asleep: at most 0.1 % of a core",
        idle,
        0.0,
        MOST_IDLE_PERCENT,
    );
    // The promise is of 1 GiB.
    let pass = pass.filter(|_| measured.brownout.touched_mib == 1024);
    let brownout = target(
        "1 GiB written after a swap: at most 0.3 s more",
        pass,
        0.0,
        MOST_BROWNOUT_S,
    );
    bounds
        .chain(tails)
        .chain(brownout)
        .chain(beside)
        .chain(idle)
        .collect()
}

/// A median as it is, with the least and the most that were seen.
fn plain(values: &[u64], unit: f64) -> Option<Ratio> {
    let of = stats::summary(values)?;
    let scale = 1e6 / unit;
    Some(Ratio {
        value: of.p50 * scale,
        low: of.min * scale,
        high: of.max * scale,
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

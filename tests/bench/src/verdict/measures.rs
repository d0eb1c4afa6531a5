//! Ratios: how each is come by.

use crate::many::Figures;
use crate::run::Measured;
use crate::sample::{Series, Who};
use crate::scene::{BASE, LARGE, MANY, PAIR, SMALL, Scene, VARIED};
use crate::stats::{self, Ratio};

/// A ratio that is measured: its name, what it is called, and how it is come by.
pub(super) type Measure = (&'static str, &'static str, Option<Ratio>);

/// All that were measured.
pub(super) fn measures(measured: &Measured) -> Vec<Measure> {
    let guest = |scene: &Scene, who| measured.get(scene, who).map(Series::guest);
    let of_host = |scene: &Scene, figures: fn(&Series) -> Vec<u64>| {
        let ours = |s: &&Series| s.scene.id == scene.id && s.who == Who::Ours;
        measured.series.iter().find(ours).map(figures)
    };
    let over =
        |over: Option<Vec<u64>>, under: Option<Vec<u64>>, q| stats::ratio(&over?, &under?, q);
    let vs = |scene, who, other, q| over(guest(scene, who), guest(scene, other), q);
    let [one, .., eight] = &MANY;
    let [unchanged, untouched, two_gib, thp, hugetlb] = &VARIED;
    let varied = |scene| over(guest(scene, Who::Ours), guest(unchanged, Who::Ours), 0.5);
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
            "RAM after a swap: populated over not",
            over(
                Some(measured.brownout.populated.clone()),
                Some(measured.brownout.faulted.clone()),
                0.5,
            ),
        ),
        (
            "recovery_told_vs_noted_p50",
            "slow time after a swap: by its report over by the guest",
            {
                // Where it is long: of a few milliseconds neither can tell.
                let [_, faulted] = &measured.brownout.recoveries;
                stats::ratio(&faulted.told, &faulted.noted, 0.5)
            },
        ),
        (
            "untouched_vs_touched_p50",
            "256 MiB untouched: median over that of 256 MiB",
            varied(untouched),
        ),
        (
            "ram_2g_vs_256m_p50",
            "2 GiB: median over that of 256 MiB",
            varied(two_gib),
        ),
        (
            "thp_vs_4k_p50",
            "transparent huge pages: median over that of 4 KiB ones",
            varied(thp),
        ),
        (
            "hugetlb_vs_4k_p50",
            "reserved pages of 2 MiB: median over that of 4 KiB ones",
            varied(hugetlb),
        ),
        (
            "vcpu8_vs_vcpu1_p50",
            "8 resting vCPUs: each out of the guest, less its waits for a core, over that of 1",
            // The host's figures: one that sleeps through its pause says nothing of it, and a single one mostly does.
            over(
                of_host(eight, Series::unqueued),
                of_host(one, Series::unqueued),
                0.5,
            ),
        ),
        (
            "vcpu8_vs_vcpu1_worst_p50",
            "the same of the worst of the 8",
            over(
                of_host(eight, Series::unqueued_worst),
                of_host(one, Series::unqueued_worst),
                0.5,
            ),
        ),
        (
            "vcpu8_vs_vcpu1_waits_included_p50",
            "8 resting vCPUs: the host's blackout, waits included, over that of 1",
            over(
                of_host(eight, Series::host),
                of_host(one, Series::host),
                0.5,
            ),
        ),
        (
            "many_vs_lone_max",
            "all guests at once: the worst, less waits for a core, over a lone one's median",
            many_vs_lone(measured, |figures| &figures.unqueued),
        ),
        (
            "many_vs_lone_waits_included_max",
            "all guests at once: the worst, waits included, over a lone one's median",
            many_vs_lone(measured, |figures| &figures.host),
        ),
        (
            "boot_vs_qemu_p50",
            "start to first instruction: over QEMU's",
            over(
                Some(measured.light.ours.boot_ns.clone()),
                measured
                    .light
                    .qemu
                    .as_ref()
                    .map(|qemu| qemu.boot_ns.clone()),
                0.5,
            ),
        ),
        (
            "ram_8g_vs_256m_p50",
            "8 GiB: median over that of 256 MiB",
            over(guest(&LARGE, Who::Ours), guest(&SMALL, Who::Ours), 0.5),
        ),
    ]
}

/// The longest blackout of all guests that were swapped by one command, over the median of one that was swapped
/// alone among them.
fn many_vs_lone(measured: &Measured, of: fn(&Figures) -> &Vec<u64>) -> Option<Ratio> {
    let many = measured.many.as_ref()?;
    let worst = of(&many.all).iter().max()?;
    stats::ratio(&[*worst], of(&many.lone), 0.5)
}

//! Windows without a swap, on the same guest: what the machine does to it anyway.

use std::collections::BTreeMap;

use stillpoint_tests::patience::PATIENCE;
use stillpoint_tests::vm::Vm;

use crate::ours::pause;
use crate::sample::Sample;

/// Between windows; long enough for the last to be over and for its gaps to be in the log.
const BETWEEN_MS: u64 = 11;
const SPREAD_MS: u64 = 13;

/// Looks at so many windows of `window_ns`, each judged as a swap is: by the longest gap that
/// overlaps it.
pub(crate) fn windows(
    vm: &Vm,
    count: u32,
    window_ns: u64,
    tsc_khz: u64,
) -> anyhow::Result<Vec<Sample>> {
    let window = window_ns * tsc_khz / 1_000_000;
    (0..count)
        .map(|number| {
            pause(BETWEEN_MS + u64::from(number) * 7 % SPREAD_MS);
            let from = vm.pulse.look()?.last_tsc;
            let over = |seen: &[u64]| {
                seen.iter()
                    .zip(&from)
                    .all(|(seen, from)| *seen > from + window)
            };
            vm.pulse
                .wait("a window to pass", PATIENCE, |seen| over(&seen.last_tsc))?;
            let longest = |(vcpu, &from): (usize, &u64)| {
                let gaps = vm.pulse.gaps(vcpu)?;
                let cycles = gaps
                    .iter()
                    .filter(|gap| gap.start < from + window && from < gap.end)
                    .map(|gap| gap.end.saturating_sub(gap.start))
                    .max();
                anyhow::Ok(cycles.unwrap_or(0) * 1_000_000 / tsc_khz.max(1))
            };
            Ok(Sample {
                host_ns: window_ns,
                unqueued_ns: Vec::new(),
                guest_ns: from
                    .iter()
                    .enumerate()
                    .map(longest)
                    .collect::<Result<_, _>>()?,
                phases: Vec::new(),
                brownout: BTreeMap::new(),
            })
        })
        .collect()
}

//! The report for a terminal.

use std::fmt::Write;

use crate::sample::Who;
use crate::stats::Summary;
use crate::verdict::{Noise, Report};

/// All of it.
pub(crate) fn render(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write_all(&mut text, report);
    text
}

fn write_all(to: &mut String, report: &Report) -> std::fmt::Result {
    let facts = &report.environment;
    writeln!(to, "\nHow long the guest stood still, ms (worst vCPU)\n")?;
    writeln!(
        to,
        "  {:<18} {:<13} {:>4} {:>8} {:>8} {:>8} {:>8} {:>10} {:>10}",
        "machine", "", "n", "median", "p90", "p99", "worst", "host's p50", "less waits"
    )?;
    let mut last = "";
    for row in &report.series {
        let id = row.scene.id;
        let title = if id == last { "" } else { row.scene.title };
        last = id;
        let Summary {
            n,
            p50,
            p90,
            p99,
            max,
            ..
        } = row.guest;
        let who = row.who.name();
        write!(to, "  {title:<18} {who:<13} {n:>4} ")?;
        for value in [p50, p90, p99, max] {
            write!(to, "{:>8} ", gap(value))?;
        }
        match row.who {
            // Of QEMU we know only when it said that it stopped.
            Who::NoSwap | Who::Qemu | Who::QemuStop => writeln!(to, "{:>10}", "")?,
            _ => {
                write!(to, "{:>10.2}", row.host.p50)?;
                let unqueued = row.unqueued_worst.as_ref();
                let unqueued = unqueued.map(|of| format!("{:>11.2}", of.p50));
                writeln!(to, "{}", unqueued.unwrap_or_default())?;
            }
        }
        if row.unseen > 0 {
            writeln!(
                to,
                "{:21}{} swaps left out: no gap in the guest's log",
                "", row.unseen
            )?;
        }
        for fault in &row.faults {
            writeln!(to, "{:21}the guest complains: {fault}", "")?;
        }
    }
    writeln!(to, "\nRatios (in brackets: where it lies with 95 %)\n")?;
    for interval in &report.intervals {
        let (title, ratio) = (interval.title, interval.ratio);
        let (value, low, high) = (ratio.value, ratio.low, ratio.high);
        writeln!(to, "  {title:<40} {value:>6.2}  [{low:.2} .. {high:.2}]")?;
    }
    writeln!(to, "\nTargets\n")?;
    for target in &report.targets {
        let word = if target.met {
            "target met"
        } else {
            "target missed"
        };
        let sure = if target.sure {
            ""
        } else {
            ", but noise could turn it"
        };
        writeln!(
            to,
            "  {word:<13}  {}: {:.2}{sure}",
            target.title, target.value
        )?;
    }
    phases(to, report)?;
    if let Some(after) = &report.brownout {
        let shallow = after.shallow.as_ref();
        let shallow =
            shallow.map(|of| format!("KVM's own page tables left to faults: {:.0} ms; ", of.p50));
        writeln!(
            to,
            "\nA write pass over {} MiB right after a swap takes {:.0} ms longer (n = {}; {}all left to faults: {:.0} ms) than \
             the same again, {:.0} ms",
            after.touched_mib,
            after.filled.p50,
            after.filled.n,
            shallow.unwrap_or_default(),
            after.faulted.p50,
            after.steady.p50
        )?;
        let kinds = ["filled", "left to faults"];
        for (of, kind) in after.recoveries.iter().zip(kinds) {
            let Some(of) = of else { continue };
            writeln!(
                to,
                "a guest that writes it again and again lost {:.0} ms by its own notes, {:.0} ms by the report (page tables {kind}, n = {}, {} not \
                 recovered in time, of {} no notes)",
                of.noted.p50, of.told.p50, of.told.n, of.not_seen, of.not_noted
            )?;
        }
    }
    if let Some(many) = &report.many {
        writeln!(
            to,
            "\n{} guests on this host, by one command: {:.2} ms in the middle, {:.2} at worst by the host's count, {:.2} less waits for \
             a core (one alone among them: {:.2} ms and {:.2}, n = {}); {:.1} s for all, {} did not move\n\
             memory: {:.1} MiB for each guest and its VMM before, {:.1} after; of the host at most {:.0} MiB more meanwhile",
            many.guests,
            many.all.host.p50,
            many.all.host.max,
            many.all.unqueued.max,
            many.lone.host.p50,
            many.lone.unqueued.p50,
            many.lone.host.n,
            many.took_s,
            many.stayed,
            many.each_mib[0],
            many.each_mib[1],
            many.most_mib,
        )?;
    }
    for weighed in &report.weights {
        writeln!(
            to,
            "{} from start to the guest's first instruction: {:.1} ms; beside the guest's RAM: {:.1} MiB; while it sleeps: \
             {:.2} % of a core",
            weighed.who.name(),
            weighed.boot.p50,
            weighed.beside_mib,
            weighed.idle_percent,
        )?;
    }
    writeln!(
        to,
        "\nNoise: the longest gap in as long a window without a swap, ms\n"
    )?;
    report
        .noise
        .iter()
        .try_for_each(|noise| noise_line(to, noise))?;
    for control in &report.controls {
        let so = match control.concludes {
            true => "",
            false => ": more than a tenth of a swap's, so nothing is concluded",
        };
        let none = gap(control.no_swap_p50);
        writeln!(to, "  {:<18} median {none}{so}", control.scene)?;
    }
    writeln!(to)?;
    for line in &report.left_out {
        writeln!(to, "  left out: {line}")?;
    }
    writeln!(
        to,
        "  {} cores, {}, kernel {}, {}, TSC {:.3} MHz; load {:.1} before, {:.1} after",
        facts.cores,
        facts.cpu,
        facts.kernel,
        facts.kvm,
        facts.tsc_khz as f64 / 1e3,
        facts.load_before,
        facts.load_after
    )?;
    writeln!(
        to,
        "  nothing pinned by the bench; every page of guest RAM touched before, where nothing else is said; {}{:.0} s",
        report
            .qemu
            .as_ref()
            .map(|qemu| format!("{qemu}; "))
            .unwrap_or_default(),
        report.took_s
    )
}

/// A gap; the guest logs none below 0.1 ms.
fn gap(ms: f64) -> String {
    if ms < 0.1 {
        "<0.10".into()
    } else {
        format!("{ms:.2}")
    }
}

fn phases(to: &mut String, report: &Report) -> std::fmt::Result {
    writeln!(to, "\nWhere our time goes, median ms\n")?;
    for phases in &report.phases {
        write!(to, "  {:<16} {:<13}", phases.scene.title, phases.who.name())?;
        for (name, ms) in &phases.medians {
            write!(to, " {name} {ms:.2} ")?;
        }
        writeln!(
            to,
            " between {:.2}  to the first reading {:.2}",
            phases.between, phases.after
        )?;
    }
    Ok(())
}

fn noise_line(to: &mut String, noise: &Noise) -> std::fmt::Result {
    let Summary { p50, p90, p99, .. } = noise.no_swap;
    let title = noise.scene;
    writeln!(
        to,
        "  {title:<18} median {}, p90 {}, p99 {}; we add {:+.2} to the floor's median, {:+.2} to its p99",
        gap(p50),
        gap(p90),
        gap(p99),
        noise.effect_p50,
        noise.effect_p99
    )?;
    if noise.busy {
        writeln!(
            to,
            "{:21}this machine is too busy: gaps like a swap's come without one",
            ""
        )?;
    }
    for (hidden, which) in [(noise.hides_p50, "medians"), (noise.hides_p99, "p99")] {
        if hidden {
            writeln!(
                to,
                "{:21}noise is larger than the effect on the {which}: no telling the two apart",
                ""
            )?;
        }
    }
    Ok(())
}

//! The report as Markdown, for the documentation to include.

use std::fmt::Write;

use crate::sample::Who;
use crate::verdict::{Report, Stood};

/// What a page that includes it says first.
const HEAD: &str = "<!-- Written by `make bench`; what it says was measured in one run. -->\n";

/// All of it.
pub(crate) fn render(report: &Report) -> String {
    let mut text = String::from(HEAD);
    // Writing to a string does not fail.
    let _ = write_all(&mut text, report);
    text
}

fn write_all(to: &mut String, report: &Report) -> std::fmt::Result {
    let facts = &report.environment;
    writeln!(
        to,
        "\n{} cores, {}, kernel {}, {}, TSC {:.3} MHz. Load {:.1} before and {:.1} after. {}\n",
        facts.cores,
        facts.cpu,
        facts.kernel,
        facts.kvm,
        facts.tsc_khz as f64 / 1e3,
        facts.load_before,
        facts.load_after,
        report.qemu.as_deref().unwrap_or("No QEMU."),
    )?;
    writeln!(
        to,
        "| machine | who | n | median, ms | p90 | p99 | worst |\n|---|---|--:|--:|--:|--:|--:|"
    )?;
    for row in &report.series {
        let guest = &row.guest;
        let shown = |ms: f64| match ms {
            small if small < 0.1 => "<0.1".to_owned(),
            ms => format!("{ms:.2}"),
        };
        writeln!(
            to,
            "| {} | {} | {} | {} | {} | {} | {} |",
            row.scene.title,
            who(row.who),
            guest.n,
            shown(guest.p50),
            shown(guest.p90),
            shown(guest.p99),
            shown(guest.max),
        )?;
    }
    writeln!(
        to,
        "\n| Stillpoint, by the host: median, ms | first kick to last entry | each vCPU's, less its waits for a core | the worst one's |\n|---|--:|--:|--:|"
    )?;
    for row in &report.series {
        if let (Who::Ours, Some(each), Some(worst)) = (row.who, &row.unqueued, &row.unqueued_worst)
        {
            let (title, host) = (row.scene.title, row.host.p50);
            let (each, worst) = (each.p50, worst.p50);
            writeln!(to, "| {title} | {host:.2} | {each:.2} | {worst:.2} |")?;
        }
    }
    writeln!(to, "\n| ratio | value | 95 % |\n|---|--:|---|")?;
    for interval in &report.intervals {
        let ratio = interval.ratio;
        writeln!(
            to,
            "| {} | {:.2} | {:.2} to {:.2} |",
            interval.title, ratio.value, ratio.low, ratio.high
        )?;
    }
    writeln!(to, "\n| target | | value |\n|---|---|--:|")?;
    for target in &report.targets {
        let word = match (target.met, target.sure) {
            (true, true) => "met",
            (true, false) => "met, but noise could turn it",
            (false, true) => "missed",
            (false, false) => "missed, but noise could turn it",
        };
        writeln!(to, "| {} | {word} | {:.2} |", target.title, target.value)?;
    }
    if let Some(after) = &report.brownout {
        let shallow = after.shallow.as_ref();
        let shallow = shallow.map(|of| {
            format!(
                "where KVM's own are left to faults, {:.0} ms longer; ",
                of.p50
            )
        });
        writeln!(
            to,
            "\nA write pass over {} MiB right after a swap takes {:.0} ms longer than the same pass again, {:.0} ms; {}where the \
             new process's page tables are left to be filled by faults, {:.0} ms longer (medians of {} swaps each).",
            after.touched_mib,
            after.filled.p50,
            after.steady.p50,
            shallow.unwrap_or_default(),
            after.faulted.p50,
            after.filled.n
        )?;
        let kinds = ["filled beforehand", "left to be filled"];
        for (of, kind) in after.recoveries.iter().zip(kinds) {
            let Some(of) = of else { continue };
            writeln!(
                to,
                "\nA guest that writes {} MiB again and again lost {:.0} ms after its pause by its own notes, {:.0} ms by the swap's report, with \
                 page tables {kind} (medians of {}; {} more had not recovered within the 2 s that a report looks, of {} the guest's notes were not seen).",
                after.touched_mib, of.noted.p50, of.told.p50, of.told.n, of.not_seen, of.not_noted
            )?;
        }
    }
    if let Some(many) = &report.many {
        writeln!(
            to,
            "\n| {} guests on a host | host's blackout, ms: median | p99 | worst | worst vCPU's, less its waits for a core: median | worst \
             |\n|---|--:|--:|--:|--:|--:|\n\
             {}\n{}\n\n\
             All of them took {:.1} s; {} did not move. Each guest with its VMM had {:.1} MiB of memory before the swaps and {:.1} \
             after; meanwhile at most {:.0} MiB more of the host's were taken in all.",
            many.guests,
            stood("one swapped alone among them", &many.lone),
            stood("all swapped by one command", &many.all),
            many.took_s,
            many.stayed,
            many.each_mib[0],
            many.each_mib[1],
            many.most_mib,
        )?;
    }
    if !report.weights.is_empty() {
        writeln!(
            to,
            "\n| | start to the guest's first instruction, ms | memory beside the guest's, MiB | of a core while the guest sleeps |\n\
             |---|--:|--:|--:|"
        )?;
    }
    for weighed in &report.weights {
        let name = match weighed.who {
            Who::Ours => "**Stillpoint**",
            _ => "QEMU, microvm",
        };
        writeln!(
            to,
            "| {name} | {:.1} | {:.1} | {:.2} % |",
            weighed.boot.p50, weighed.beside_mib, weighed.idle_percent
        )?;
    }
    for line in &report.left_out {
        writeln!(to, "\nLeft out: {line}.")?;
    }
    Ok(())
}

fn stood(who: &str, of: &Stood) -> String {
    let Stood { host, unqueued } = of;
    format!(
        "| {who}, n = {} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} |",
        host.n, host.p50, host.p99, host.max, unqueued.p50, unqueued.max
    )
}

fn who(who: Who) -> &'static str {
    match who {
        Who::Ours => "**Stillpoint**",
        Who::Whole => "Stillpoint, not rehearsed",
        Who::Floor => "floor: bare KVM calls",
        Who::Qemu => "QEMU cpr-transfer",
        Who::QemuStop => "QEMU stop; cont",
        Who::NoSwap => "no swap, as long a window",
    }
}

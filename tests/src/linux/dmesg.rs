//! What a guest's kernel logs.
//!
//! Anything of level *warning* or graver is a complaint, unless a stock KVM guest of the same kernel
//! logs it too, under a QEMU of the same generation; those are listed here by a part of their text, with the reason. And some
//! words are complaints at whatever level.

use stillpoint_agent::protocol::KernelLine;

use crate::ground::is_emulated_host;

/// `KERN_WARNING`.
const WARNING: u8 = 4;

/// Words that are bad news at any level.
const NEVER: &[&str] = &[
    "soft lockup",
    "hard LOCKUP",
    "rcu_sched self-detected stall",
    "rcu_preempt self-detected stall",
    "rcu: INFO",
    "hung_task",
    "blocked for more than",
    "check_tsc_sync_source failed",
    "due to clocksource watchdog",
    "Marking clocksource",
    "clocksource watchdog",
    "Switched to clocksource jiffies",
    "I/O error",
    "Buffer I/O error",
    "Call Trace",
    "WARNING:",
    "BUG:",
    "unable to handle",
    "general protection",
    "nobody cared",
    "NETDEV WATCHDOG",
    "timed out",
];

/// What a stock guest logs too, as seen of the same kernels on QEMU's microvm machine on the same
/// hosts.
const USUAL: &[&str] = &[
    // The emulated host's processor is one whose microcode nobody updated.
    "Speculative Return Stack Overflow:",
    // What newer kernels note at level *info* when the watchdog's question to another CPU took long,
    // as it does where CPUs are emulated; a clocksource that is doubted is told of otherwise.
    "clocksource: Watchdog remote CPU",
    // There is none, and the kernel looks for it all the same.
    "PCI: Fatal: No config space access function found",
    "PCI: System does not support PCI",
];

/// What a guest logs of an emulated host that got no time itself: an interrupt that took long once, and a look at its
/// clocks that came late. Guests' timers are judged by tests of their own.
const STARVED: &str = "hrtimer: interrupt took";
const LATE_LOOK: &str = "clocksource: Long readout interval, skipping watchdog check:";
/// Two clocks agree that are apart by less than this part of the time between two looks.
const AGREEMENT: u64 = 10_000;

/// The lines that are complaints.
pub fn complaints(lines: &[KernelLine]) -> Vec<String> {
    let starved = |line: &KernelLine| is_emulated_host() && is_starved(&line.text);
    let usual =
        |line: &KernelLine| USUAL.iter().any(|usual| line.text.contains(usual)) || starved(line);
    let bad = |line: &&KernelLine| {
        let never = NEVER.iter().any(|never| line.text.contains(never));
        (never || line.level <= WARNING) && !usual(line)
    };
    let shown = |line: &KernelLine| format!("<{}> {}", line.level, line.text);
    lines.iter().filter(bad).map(shown).collect()
}

/// Whether it says that nothing is wrong but that somebody got no time.
fn is_starved(text: &str) -> bool {
    text.contains(STARVED) || (text.contains(LATE_LOOK) && clocks_agree(text) == Some(true))
}

/// Of a late look: whether the clock that was looked at (`cs_nsec`) and the one that it was held against (`wd_nsec`) had gone
/// on alike.
fn clocks_agree(text: &str) -> Option<bool> {
    let of = |name: &str| {
        let (_, rest) = text.split_once(name)?;
        rest.split_whitespace().next()?.parse::<u64>().ok()
    };
    let (looked_at, held_against) = (of("cs_nsec:")?, of("wd_nsec:")?);
    Some(looked_at.abs_diff(held_against) <= held_against / AGREEMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(level: u8, text: &str) -> KernelLine {
        KernelLine {
            seq: 0,
            level,
            at_us: 0,
            text: text.into(),
        }
    }

    #[test]
    fn a_late_look_at_clocks_is_none_if_they_agree() {
        let late = |cs, wd| format!("{LATE_LOOK} cs_nsec: {cs} wd_nsec: {wd}");
        assert!(is_starved(&late(1_019_167_992, 1_019_167_576)));
        assert!(!is_starved(&late(1_019_167_992, 1_018_167_576)));
        assert!(!is_starved(LATE_LOOK));
        assert!(is_starved("hrtimer: interrupt took 5000000 ns"));
    }

    #[test]
    fn bad_news_at_any_level_and_warnings_are_complaints() {
        let lines = [
            line(6, "virtio_blk virtio0: [vda] 2048 512-byte logical blocks"),
            line(6, "watchdog: BUG: soft lockup - CPU#0 stuck for 26s!"),
            line(4, "something new"),
        ];
        let found = complaints(&lines);
        assert_eq!(found.len(), 2);
        assert!(found[0].contains("soft lockup") && found[1].contains("something new"));
    }
}

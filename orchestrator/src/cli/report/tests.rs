//! What people read of a swap, from what the API says of it.

use serde_json::{Value, json};

use super::summary;
use crate::model::SwapRecord;

/// A swap that moved, with this receipt and these warnings.
fn said(clock: Value, warnings: &[&str]) -> String {
    said_of(
        json!({ "host_ns": 940_000, "guest_ns": [1_530_000, 1_100_000] }),
        clock,
        warnings,
    )
}

/// The same, with this blackout.
fn said_of(blackout: Value, clock: Value, warnings: &[&str]) -> String {
    let release = |version: &str| json!({ "version": version, "sha256": "" });
    let report = json!({
        "swap": "7", "vm": "web-1", "component": "vmm",
        "from": release("0.1.0"), "to": release("0.2.0"),
        "outcome": "moved", "reason": null, "started_at_unix_ns": 0,
        "vcpus": 2, "memory_bytes": 268_435_456, "state_format": 2, "state_bytes": 15_000,
        "budget_ns": 100_000_000, "phases": [],
        "blackout": blackout,
        "clock": clock, "warnings": warnings,
    });
    let record = json!({
        "id": "00000000-0000-4000-8000-000000000007", "vm": "web-1", "component": "vmm",
        "from": release("0.1.0"), "to": release("0.2.0"),
        "state": "moved", "step": "done", "reason": null, "budget_ns": null, "successor": null,
        "epoch_before": 1, "asked_at_unix_ns": 0, "ended_at_unix_ns": 1, "report": report,
    });
    let record: SwapRecord = serde_json::from_value(record).expect("a record as the API has it");
    summary(&record)
}

/// An ordinary receipt.
fn receipt() -> Value {
    json!({
        "policy": "advance", "pause_ns": 812_000, "held_ns": 0,
        "tsc_offset_delta": [0, 0], "kvmclock_error_ns": 2, "loop_error_ns": 1, "tries": 7,
        "loop_ns": 14_000, "loop_cpu_ns": 13_200,
        "masterclock_before": true, "masterclock_after": true, "told_of_pause": [true, true],
        "wall_clock": { "of": "agent", "error_before_ns": 212, "error_after_ns": 219 },
        "steps": [], "fallback": null,
    })
}

/// An ordinary receipt, but for some of it.
fn but(changes: Value) -> Value {
    let mut receipt = receipt();
    for (name, value) in changes.as_object().into_iter().flatten() {
        receipt[name] = value.clone();
    }
    receipt
}

fn clock_lines(text: &str) -> Vec<&str> {
    let is_other = |line: &&str| !line.starts_with("  clock") && !line.starts_with("             ");
    text.lines()
        .filter(|line| !is_other(line))
        .map(str::trim)
        .collect()
}

#[test]
fn an_ordinary_swap() {
    assert_eq!(
        said(receipt(), &[]),
        "web-1 moved from 0.1.0 to 0.2.0\n\
         \x20 blackout   host 940 µs, guest 1.53 ms (worst of 2 vCPUs); budget 100 ms\n\
         \x20 clock      advance: kvmclock +2 ns, TSC exact\n\
         \x20            a pause of 812 µs, included; set in 7 tries, 13.2 µs of CPU\n\
         \x20            the guest's wall clock against the host's: +212 ns before, +219 ns after\n"
    );
}

#[test]
fn waits_for_a_core_are_told_where_they_are_much_of_a_pause() {
    let said = |queued: [u64; 2]| {
        let vcpu = |queued| json!({ "out_ns": 900_000, "queued_ns": queued });
        let vcpus = queued.map(vcpu);
        let blackout = json!({ "host_ns": 940_000, "guest_ns": [], "vcpus": vcpus });
        said_of(blackout, receipt(), &[])
    };
    let line = "\n             a vCPU waited 400 µs of it for a core\n";
    assert!(said([0, 400_000]).contains(line), "{}", said([0, 400_000]));
    assert!(!said([0, 80_000]).contains("for a core"));
}

#[test]
fn a_pause_that_was_held_and_corrected() {
    let held = but(json!({
        "policy": "hold", "pause_ns": 1_502_000_000u64, "held_ns": 1_500_000_000u64,
        "kvmclock_error_ns": -3,
        "wall_clock": { "of": "agent", "error_before_ns": 212, "error_after_ns": -40_500 },
        "steps": [{ "how": "step", "by_ns": 1_500_000_000u64 }],
    }));
    assert_eq!(
        clock_lines(&said(held, &[])),
        [
            "clock      hold: kvmclock -3 ns, TSC exact",
            "a pause of 1.50 s left out, and 2.00 ms after it included; set in 7 tries, 13.2 µs of CPU",
            "the guest's wall clock against the host's: +212 ns before, -40.5 µs after",
            "wall clock stepped by +1.50 s",
        ]
    );
    let slewed = but(json!({ "steps": [{ "how": "slew", "by_ns": 1_000_000 }] }));
    let text = said(slewed, &[]);
    assert!(
        text.contains("wall clock slewed by +1.00 ms, at 500 ppm"),
        "{text}"
    );
}

#[test]
fn a_correction_that_was_not_made() {
    let problem = "the guest's wall clock is late by 1.5s: its agent does not answer";
    let step = json!({ "how": "step", "by_ns": 1_500_000_000u64, "problem": problem });
    let text = said(but(json!({ "steps": [step] })), &[problem]);
    let lines: Vec<_> = text.lines().collect();
    assert!(
        text.contains("wall clock not corrected by +1.50 s; see the warning"),
        "{text}"
    );
    assert_eq!(
        lines.last(),
        Some(&format!("  warning    {problem}").as_str())
    );
}

/// Bounds that were broken are told beside the figures that broke them.
#[test]
fn bounds_that_were_broken() {
    let broken = but(json!({
        "kvmclock_error_ns": -1338, "tsc_offset_delta": [0, 1000],
        "masterclock_after": false,
        "fallback": "this KVM ignores TSC offsets; the guest's TSC is the host's",
        "wall_clock": { "of": "kvmclock", "error_before_ns": null, "error_after_ns": 5 },
    }));
    let warnings = [
        "kvmclock is off by -1338 ns, bound 50 ns",
        "the masterclock is off now",
    ];
    let text = said(broken, &warnings);
    assert_eq!(
        clock_lines(&text),
        [
            "clock      advance: kvmclock -1.34 µs, TSC off by 1000 cycles",
            "a pause of 812 µs, included; set in 7 tries, 13.2 µs of CPU; masterclock on before, off after",
            "the wall clock of its kvmclock against the host's: not known before, +5 ns after",
            "this KVM ignores TSC offsets; the guest's TSC is the host's",
        ]
    );
    let told: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("  warning    "))
        .collect();
    assert_eq!(told, warnings);
}

#[test]
fn what_was_not_measured_is_not_claimed() {
    let unknown = but(json!({
        "kvmclock_error_ns": null, "tsc_offset_delta": [], "wall_clock": { "of": "" },
    }));
    assert_eq!(
        clock_lines(&said(unknown, &[])),
        [
            "clock      advance: kvmclock not measured (not in use, or its vCPUs stayed halted), \
             TSC offset not known",
            "a pause of 812 µs, included; set in 7 tries, 13.2 µs of CPU",
        ]
    );
    let never_moved = said(Value::Null, &[]);
    assert!(!never_moved.contains("clock"), "{never_moved}");
}

//! Which test programs make up each suite, and how many of their tests run at a time.

/// A suite: its name, its programs, threads.
#[derive(Debug)]
pub(crate) struct Suite {
    pub(crate) name: &'static str,
    pub(crate) of: &'static [Of],
    pub(crate) threads: u8,
}

/// Test programs of a suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Of {
    /// Unit tests of all packages but the one in this folder.
    UnitsBut(&'static str),
    /// All of the package in this folder, but for these.
    Package(&'static str, &'static [&'static str]),
    /// These of the package in that folder.
    Named(&'static str, &'static [&'static str]),
    /// These of the package in that folder, as they are built optimised: what goes through as many cases as there is
    /// time for.
    Optimised(&'static str, &'static [&'static str]),
}

const fn suite(name: &'static str, of: &'static [Of], threads: u8) -> Suite {
    Suite { name, of, threads }
}

/// What lies on KVM runs a few at a time: guests share the cores with their own observers.
pub(crate) const SUITES: &[Suite] = &[
    suite("units", &[Of::UnitsBut("orchestrator")], 2),
    suite(
        "golden",
        &[Of::Named("vmm/state", &["golden", "bounds"])],
        2,
    ),
    suite("fuzz", &[Of::Optimised("vmm/fuzz", &["bounded"])], 1),
    suite("word", &[Of::Named("vmm/control", &["word"])], 2),
    suite("model", &[Of::Optimised("tests/model", &["ownership"])], 1),
    // Its tests wait for each other's programs more than they work.
    suite("daemon", &[Of::Package("orchestrator", &["journal"])], 4),
    suite("journal", &[Of::Named("orchestrator", &["journal"])], 1),
    suite("swap", &[Of::Named("tests", &["swap", "hurry"])], 1),
    suite("compat", &[Of::Named("tests", &["compat"])], 1),
    suite("modes", &[Of::Named("tests", &["modes"])], 1),
    suite("several", &[Of::Named("tests", &["several"])], 1),
    suite("lifecycle", &[Of::Named("tests", &["lifecycle"])], 1),
    suite("faults", &[Of::Named("tests", &["faults"])], 2),
    suite("matrix", &[Of::Named("tests", &["matrix"])], 1),
    suite(
        "safeguards",
        &[Of::Named(
            "tests",
            &["preflight", "rehearsal", "jump_rehearsal", "way_back"],
        )],
        2,
    ),
    suite("budget", &[Of::Named("tests", &["budget"])], 1),
    suite("bad-input", &[Of::Named("tests", &["bad_input"])], 2),
    suite("host", &[Of::Named("tests", &["host"])], 1),
    suite("standstill", &[Of::Named("tests", &["standstill"])], 1),
    suite("kvm-swap", &[Of::Named("tests", &["kvm_swap"])], 1),
    suite("kernel", &[Of::Named("tests", &["kernel"])], 1),
    suite("virtio", &[Of::Named("tests", &["virtio"])], 1),
    suite("disks", &[Of::Named("tests", &["disks"])], 1),
    suite("taps", &[Of::Named("tests", &["taps"])], 1),
    suite("events", &[Of::Named("tests", &["events"])], 1),
    suite("clock", &[Of::Named("tests", &["clock"])], 1),
    suite("linux", &[Of::Named("tests", &["linux"])], 1),
    suite("rig", &[Of::Named("tests", &["rig"])], 1),
];

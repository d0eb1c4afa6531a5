//! What is asked of an agent, and what it answers.
//!
//! A request is an object whose `do` names it: `{"do":"health"}`. An answer is `{"ok": ...}`, in
//! the shape that belongs to the request, or `{"error":{"code":"...","text":"..."}}`. Requests
//! of one connection are answered in their order, one at a time; who wants several at once opens
//! several connections. Units are in the names.

use serde::{Deserialize, Serialize};

/// The vsock port on which an agent listens.
pub const PORT: u32 = 1024;
/// The most bytes of a line, in both directions; the newline is not counted.
pub const MAX_LINE: usize = 2 << 20;
/// The most bytes kept of each of a program's two outputs; a reply holds no more of either.
pub const MAX_OUTPUT: usize = 128 << 10;
/// The most programs that run, or have ended and were not asked for since.
pub const MAX_JOBS: usize = 32;
/// The most connections served at once; further ones are closed at once, with an error.
pub const MAX_CONNECTIONS: usize = 32;

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// How the guest is. Answer: [`Health`].
    Health,
    /// Run a program and wait for its end. Answer: [`Ended`].
    Exec(Program),
    /// Run a program, and answer at once. Answer: [`Started`].
    Start(Program),
    /// What a started program has printed since it was last asked, and its end if it has ended.
    /// The answer that tells of the end is the last: the agent then forgets the job.
    /// Answer: [`Progress`].
    Poll {
        /// From [`Started`].
        job: u64,
        /// How long to wait for more output or the end, if there is neither; a minute at most.
        #[serde(default)]
        wait_ms: u64,
    },
    /// Send a signal to a started program and all of its process group. Answer: [`Done`].
    Kill {
        /// From [`Started`].
        job: u64,
        /// The signal's number.
        #[serde(default = "sigkill")]
        signal: i32,
    },
    /// The kernel's log since boot, as far as the kernel still has it. Answer: [`Dmesg`].
    Dmesg {
        /// Only lines with a higher sequence number.
        #[serde(default)]
        after: Option<u64>,
        /// Only lines at least this grave (0 is the gravest).
        #[serde(default = "every_level")]
        max_level: u8,
    },
    /// How the clocks stand to each other. Answer: [`Clocks`].
    Clocks,
    /// Move `CLOCK_REALTIME` by what a pause has made it late. Answer: [`Corrected`].
    Correct(Correction),
    /// Start a probe for gaps in what the CPUs run. Answer: [`Started`].
    GapsStart(GapsSpec),
    /// What a probe for gaps found; ends it if it still runs. Answer: [`Gaps`].
    GapsCollect {
        /// From [`Started`].
        job: u64,
        /// Wait until the probe's time is over, and don't cut it short.
        #[serde(default)]
        wait: bool,
    },
    /// A pause is coming: run the hooks that go before it. Answer: [`Hooks`].
    PauseBegin {
        /// All of them together may take as long as this.
        #[serde(default = "hooks_deadline")]
        deadline_ms: u64,
    },
    /// A pause is over: run the hooks that go after it. Answer: [`Hooks`].
    PauseEnd {
        /// All of them together may take as long as this.
        #[serde(default = "hooks_deadline")]
        deadline_ms: u64,
    },
    /// Power off, or reboot; the answer is sent before it begins. Answer: [`Done`].
    Shutdown {
        /// Which.
        how: Shutdown,
    },
}

fn sigkill() -> i32 {
    9
}

fn every_level() -> u8 {
    7
}

fn hooks_deadline() -> u64 {
    10_000
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer<T> {
    /// It was done.
    Ok(T),
    /// It was not.
    Error(Problem),
}

/// Why a request was refused or failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{text} ({code:?})")]
pub struct Problem {
    /// For programs.
    pub code: Code,
    /// For people.
    pub text: String,
}

/// The kinds of [`Problem`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The line was not a JSON object, or lacks what its request needs.
    Malformed,
    /// This agent has no such request.
    Unknown,
    /// The line was longer than [`MAX_LINE`].
    TooLong,
    /// A bound was reached: of connections, of programs, of probes.
    TooMany,
    /// There is no such job.
    NoSuchJob,
    /// It was tried and failed; the text says how.
    Failed,
    /// A code of a later release.
    #[serde(other)]
    Other,
}

/// It was done, and there is nothing to tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}

/// How the guest is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// The agent's own version.
    pub version: String,
    /// Whether the agent is this guest's PID 1.
    pub init: bool,
    /// The kernel's release, as `uname -r` has it.
    pub kernel: String,
    /// A new one at each boot.
    pub boot_id: String,
    /// Since boot.
    pub uptime_ms: u64,
    /// Over 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// RAM the kernel has.
    pub memory_total_kib: u64,
    /// RAM that programs could get.
    pub memory_available_kib: u64,
    /// CPUs that are online.
    pub cpus: u32,
    /// The clock that the kernel counts by.
    pub clocksource: Clocksource,
}

/// The kernel's clocksources.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocksource {
    /// The one in use.
    pub current: String,
    /// Those it could use.
    pub available: Vec<String>,
}

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Path, or a name that is looked up in `PATH`.
    pub program: String,
    /// Its arguments.
    #[serde(default)]
    pub args: Vec<String>,
    /// What it reads from its standard input; none is an empty input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// After this long it and its process group are killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_limit_ms: Option<u64>,
}

/// A program or a probe was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// What to ask for it by; never used twice.
    pub job: u64,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It was killed at its time limit.
    TimeLimit,
}

impl Exit {
    /// Whether the program said that all was well.
    pub fn is_success(self) -> bool {
        self == Self::Code(0)
    }
}

/// What a program printed. Bytes that are not UTF-8 are replaced.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Bytes of either that were thrown away beyond [`MAX_OUTPUT`]; always 0 for a started
    /// program, which waits instead until it is polled.
    #[serde(default)]
    pub dropped: u64,
}

/// A program has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// How.
    pub exit: Exit,
    /// What it printed.
    #[serde(flatten)]
    pub output: Output,
}

/// How a started program goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// How it ended; none while it runs, or while output of it is still to be fetched.
    pub exit: Option<Exit>,
    /// What it printed since it was last asked.
    #[serde(flatten)]
    pub output: Output,
}

/// Lines of the kernel's log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dmesg {
    /// The lines, oldest first; as many as fit into a reply. Ask again with `after` for more.
    pub lines: Vec<KernelLine>,
    /// Whether there are more than these.
    pub more: bool,
}

/// One line of the kernel's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelLine {
    /// Its number; a gap means that lines were overwritten.
    pub seq: u64,
    /// 0 (emergency) to 7 (debug).
    pub level: u8,
    /// Since boot, by the kernel's `local_clock`.
    pub at_us: u64,
    /// The text.
    pub text: String,
}

/// Readings of every clock. Each was bracketed by two readings of the TSC, the tightest of some.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// The kernel's clocksource.
    pub clocksource: Clocksource,
    /// `CLOCK_REALTIME`.
    pub realtime: Reading,
    /// `CLOCK_MONOTONIC`.
    pub monotonic: Reading,
    /// `CLOCK_MONOTONIC_RAW`.
    pub monotonic_raw: Reading,
    /// `CLOCK_BOOTTIME`.
    pub boottime: Reading,
    /// The host's clock as ptp_kvm gives it; absent where there is no such clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ptp_kvm: Option<Reading>,
}

/// One reading of a clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// The clock.
    pub ns: u64,
    /// The TSC just before.
    pub tsc_before: u64,
    /// The TSC just after.
    pub tsc_after: u64,
}

/// A correction of `CLOCK_REALTIME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Correction {
    /// Its name: one that was made is not made again.
    pub id: String,
    /// By how much the clock is to go forward; backward if negative.
    pub by_ns: i64,
    /// How.
    pub how: Manner,
}

/// The ways to correct a clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Manner {
    /// At once.
    Step,
    /// By letting it run faster or slower, by 500 ppm, until it is right. Programs see no jump.
    Slew,
    /// A way of a later release; refused.
    #[serde(other)]
    Other,
}

/// A correction was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Corrected {
    /// It had been made before, and nothing was done now.
    pub again: bool,
}

/// A probe for gaps: a thread on each CPU looks at `CLOCK_MONOTONIC` again and again, and
/// remembers the longest times in which it could not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GapsSpec {
    /// For how long.
    pub duration_ms: u64,
    /// How much of the time the threads look; in the rest they sleep. Of a gap that begins while
    /// one sleeps only the part after the time at which it should have woken is seen.
    #[serde(default = "always")]
    pub duty_percent: u8,
    /// Shorter gaps are not kept.
    #[serde(default = "threshold")]
    pub threshold_us: u64,
}

fn always() -> u8 {
    100
}

fn threshold() -> u64 {
    100
}

/// What a probe for gaps found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gaps {
    /// One entry a CPU.
    pub cpus: Vec<CpuGaps>,
}

/// The gaps of one CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuGaps {
    /// Which.
    pub cpu: u32,
    /// How often the clock was looked at.
    pub looks: u64,
    /// How often it went backwards. It must not.
    pub backwards: u64,
    /// The longest gaps, longest first; at most 16.
    pub longest: Vec<Gap>,
}

/// A time in which a CPU did not run the probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// When it began, in `CLOCK_MONOTONIC`.
    pub at_ns: u64,
    /// How long it was.
    pub ns: u64,
}

/// What the hooks did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hooks {
    /// In the order in which they ran. Those that the deadline left no time for are not in it.
    pub ran: Vec<Hook>,
    /// How many the deadline left no time for.
    pub left_out: u32,
}

impl Hooks {
    /// Whether every hook ran and said that all was well.
    pub fn all_well(&self) -> bool {
        self.left_out == 0
            && self
                .ran
                .iter()
                .all(|hook| hook.exit.is_some_and(Exit::is_success))
    }
}

/// What one hook did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// Its file name.
    pub name: String,
    /// How it ended; none if it could not be run, and `stderr` says why.
    pub exit: Option<Exit>,
    /// How long it took.
    pub took_ms: u64,
    /// What it printed.
    #[serde(flatten)]
    pub output: Output,
}

/// The two ways to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shutdown {
    /// Power off.
    Poweroff,
    /// Reboot.
    Reboot,
}

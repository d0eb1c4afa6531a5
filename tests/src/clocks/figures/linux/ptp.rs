//! A guest that sees to its wall clock by itself: ptp_kvm, and Debian's phc2sys.

use std::time::{Duration, Instant};

use stillpoint_agent::protocol::Program;
use stillpoint_control::clock::Policy;

use super::readings::Line;
use super::{CORRECTED_NS, SLOW, Stage, add_faulty};
use crate::clocks::figures::{Figure, receipt_of, worst};
use crate::daemon::Daemon;
use crate::linux::images::{Form, Kernel};
use crate::linux::{Linux, Recipe};
use crate::patience::wait_for;

/// The clock of its host, as a guest's kernel calls it; the daemon, which steps what is off by more than
/// half a millisecond and looks twice a second.
const START: &str = "dev=$(grep -l 'KVM virtual PTP' /sys/class/ptp/*/clock_name | cut -d/ -f5) && \
                     exec /usr/bin/phc2sys -s /dev/$dev -c CLOCK_REALTIME -O 0 -S 0.0005 -R 2 -m";
/// How long that may take, on a busy machine. Its default servo takes two readings before it steps.
const CORRECTION: Duration = Duration::from_secs(120);
/// How long a clock that nobody corrects is watched.
const WATCHED: Duration = Duration::from_secs(5);
/// How often one that was corrected is looked at, and what lies between.
const LOOKS: u32 = 10;
const LOOK: Duration = Duration::from_millis(500);

/// What a guest with this kernel makes of pauses that are held if only its own daemon corrects it.
pub fn ptp(kernel: Kernel) -> anyhow::Result<Vec<Figure>> {
    let dir = tempfile::tempdir()?;
    let daemon = Daemon::start(dir.path())?;
    add_faulty(&daemon, SLOW.name, SLOW.fault)?;
    let mut recipe = Recipe::new(kernel, Form::Vmlinux, 2).archive("phc2sys");
    let words = ["--correction", "ptp"];
    recipe.devices.extend(words.map(str::to_owned));
    let guest = Linux::boot(&daemon, "ptp", &recipe)?;
    let stage = Stage::new(guest, &daemon, kernel);
    let control = stage.uncorrected()?;
    let mut agent = stage.guest.agent()?;
    let started = agent.start(Program {
        program: "sh".into(),
        args: vec!["-c".into(), START.into()],
        ..Program::default()
    })?;
    let corrected = stage.corrected_by_itself();
    let said = agent.poll(started.job, Duration::ZERO)?.output;
    eprintln!("phc2sys: {}{}", said.stdout, said.stderr);
    Ok(vec![control, corrected?])
}

impl Stage<'_> {
    /// The guest's wall clock less what ptp_kvm says of the host's, ns.
    fn off_host(&self, line: &Line) -> anyhow::Result<Option<i64>> {
        let clocks = self.guest.agent()?.clocks()?;
        let Some(host) = clocks.ptp_kvm else {
            anyhow::bail!("the guest has no ptp_kvm");
        };
        Ok(line.apart(&host, &clocks.realtime))
    }

    /// Nobody corrects it: it stays late by the pause.
    fn uncorrected(&self) -> anyhow::Result<Figure> {
        let line = Line::of(&self.guest)?;
        let look = || {
            wait_for("a reading of both clocks", CORRECTION, || {
                self.off_host(&line)
            })
        };
        let before = look()?;
        let report = self.swap(SLOW.name, Policy::Hold)?;
        std::thread::sleep(WATCHED);
        let change = look()? - before;
        let receipt = receipt_of(&report)?;
        let held = i64::try_from(receipt.held.as_nanos())?;
        let off = change + held;
        Ok(Figure::new(
            &self.name("control: hold, and nobody corrects the clock"),
            "late by what was left out, within 1 ms",
            format!("{change} ns for {:.3?}: {off} ns apart", receipt.held),
            off.abs() <= CORRECTED_NS && receipt.held >= SLOW.least && receipt.steps.is_empty(),
        ))
    }

    /// Its own daemon corrects it, and keeps it right.
    fn corrected_by_itself(&self) -> anyhow::Result<Figure> {
        let line = Line::of(&self.guest)?;
        let right = |what: &str| {
            wait_for(what, CORRECTION, || {
                let off = self.off_host(&line)?;
                Ok(off.filter(|off| off.abs() <= CORRECTED_NS))
            })
        };
        right("phc2sys to set the clock at first")?;
        let report = self.swap(SLOW.name, Policy::Hold)?;
        let held = receipt_of(&report)?.held;
        let began = Instant::now();
        right("phc2sys to correct the clock")?;
        let took = began.elapsed();
        let mut after = Vec::new();
        for _ in 0..LOOKS {
            std::thread::sleep(LOOK);
            after.extend(self.off_host(&line)?);
        }
        let (count, worst) = (after.len(), worst(after.into_iter()));
        Ok(Figure::new(
            &self.name("hold: wall clock corrected by ptp_kvm and phc2sys"),
            "within 1 ms, and stays so",
            format!(
                "{held:.3?} left out; right after {took:.1?}, then {worst} ns at worst ({count} looks)"
            ),
            worst.abs() <= CORRECTED_NS && count > 0 && held >= SLOW.least,
        ))
    }
}

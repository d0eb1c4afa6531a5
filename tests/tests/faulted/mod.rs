//! The crash matrix, in small, under a Debian guest at work: its disk, its connections and its kernel are
//! judged after each cell. All cells, with a bare-metal guest: `make faults`.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use stillpoint_agent::protocol::Health;
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::ground::no_fast_kvm;
use stillpoint_tests::linux::images::{Form, Kernel};
use stillpoint_tests::linux::loads::Loads;
use stillpoint_tests::linux::network::{no_network_namespace, tap};
use stillpoint_tests::linux::workload::verify_disk;
use stillpoint_tests::linux::{Linux, Recipe};
use stillpoint_tests::matrix::{self, Cell, GUEST, Host, Resident};
use stillpoint_tests::needs;
use stillpoint_tests::patience::wait_for;

use super::{BOOT, DISK_MIB, HOST, TAP, host, image};

/// Each way in which a guest is saved, and then the one in which it is lost.
const CELLS: [&str; 12] = [
    "offered / successor / kill -9",
    "adopt / daemon / kill -9",
    "frozen / successor / kill -9",
    "saved / predecessor / error",
    "sealed / predecessor / kill -9",
    "load / daemon / kill -9",
    "loaded / successor / slow",
    "given-up / predecessor / kill -9",
    "take / successor / kill -9",
    "entered / daemon / kill -9",
    "retiring / predecessor / kill -9",
    "taken / successor / kill -9",
];

/// A Debian guest with its loads.
#[derive(Debug)]
struct Debian {
    loads: Loads,
    booted: Health,
    image: PathBuf,
    journal: PathBuf,
}

fn boot(daemon: &Daemon, release: &str) -> anyhow::Result<Box<dyn Resident>> {
    let dir = daemon.dir().join("debian");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir(&dir)?;
    let image = image(&dir, DISK_MIB)?;
    let recipe = Recipe::new(Kernel::Bookworm, Form::Vmlinux, 2)
        .disk(&image)
        .net(TAP, "10.77.0.2/24")
        .open()
        .release(release);
    let guest = Linux::boot(daemon, GUEST, &recipe)?;
    let mut debian = Debian {
        booted: guest.health()?,
        loads: Loads::start(&guest, daemon, HOST, &dir)?,
        image,
        journal: dir.join("disk.out"),
    };
    debian.is_whole(daemon)?;
    Ok(Box::new(debian))
}

impl Resident for Debian {
    fn goes_on(&self, daemon: &Daemon) -> anyhow::Result<()> {
        Linux::of(daemon, GUEST).health().map(drop)
    }

    /// It is the guest that was booted, its kernel complains of nothing, no load has ended, and its disk
    /// acknowledges more.
    fn is_whole(&mut self, daemon: &Daemon) -> anyhow::Result<()> {
        let guest = Linux::of(daemon, GUEST);
        let health = guest.health()?;
        ensure!(health.boot_id == self.booted.boot_id, "it is another guest");
        let (clock, before) = (health.clocksource.current, &self.booted.clocksource.current);
        ensure!(clock == *before, "its clocksource is {clock}");
        let told = || anyhow::Ok(std::fs::metadata(&self.journal)?.len());
        let before = told()?;
        wait_for("its disk to acknowledge more", BOOT, || {
            Ok((told()? > before).then_some(()))
        })?;
        self.loads.go_on()?;
        guest.dmesg_is_clean()
    }

    fn is_gone(self: Box<Self>) -> anyhow::Result<()> {
        let Self {
            loads,
            image,
            journal,
            ..
        } = *self;
        // Whoever followed them in the guest has ended with it.
        drop(loads);
        verify_disk(&image, &journal).map(drop)
    }
}

#[test]
fn a_debian_guest_at_work_lives_through_the_faults_it_is_to() -> anyhow::Result<()> {
    needs!(no_fast_kvm, no_network_namespace);
    let (_dir, daemon) = host()?;
    tap(&daemon, TAP, &format!("{HOST}/24"))?;
    let mut host = Host::with(daemon, boot);
    for name in CELLS {
        let cell = Cell::all().find(|cell| cell.to_string() == name);
        let verdict = matrix::run(&mut host, &cell.with_context(|| name.to_owned())?)?;
        println!("{name}: {} in {:?}", verdict.outcome, verdict.took);
        ensure!(verdict.is_good(), "{name}: {verdict:?}");
    }
    ensure!(
        host.boots == 1,
        "{} guests, for one that was to die",
        host.boots
    );
    Ok(())
}

//! A guest's disks, from outside: who has them, over swaps and a reset, and what is no disk.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::fs::{FlockOperation, fcntl_lock};
use stillpoint_control::spec::DiskSpec;
use stillpoint_tests::cli::{Refusal, must_refuse, vmm};
use stillpoint_tests::console::Console;
use stillpoint_tests::needs_kvm;
use stillpoint_tests::patience::{PATIENCE, wait_for};
use stillpoint_tests::releases::{self, Release};
use stillpoint_tests::swap::{Successor, Terms};
use stillpoint_tests::vm::{Recipe, Vm};

fn image(dir: &Path, name: &str, len: u64) -> anyhow::Result<PathBuf> {
    let path = dir.join(name);
    File::create(&path)?.set_len(len)?;
    Ok(path)
}

fn disk(path: PathBuf, read_only: bool) -> DiskSpec {
    DiskSpec { path, read_only }
}

fn open(path: &Path) -> anyhow::Result<File> {
    Ok(File::options().read(true).write(true).open(path)?)
}

/// Whether the lock is to be had: an ordinary record lock, which heeds all others.
fn is_free(file: &File) -> bool {
    let free = fcntl_lock(file, FlockOperation::NonBlockingLockExclusive).is_ok();
    if free {
        let _ = fcntl_lock(file, FlockOperation::NonBlockingUnlock);
    }
    free
}

/// Does something to the guest while others try to take its disks; gives how often they tried.
fn while_probed<T>(
    disks: &[File],
    act: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(T, u64)> {
    let over = AtomicBool::new(false);
    let probe = || {
        for tries in 0.. {
            if let Some(free) = disks.iter().position(is_free) {
                anyhow::bail!("disk {free} was free at try {tries}");
            }
            if over.load(Ordering::Relaxed) {
                return Ok(tries);
            }
            std::thread::yield_now();
        }
        Ok(0)
    };
    std::thread::scope(|scope| {
        let prober = scope.spawn(probe);
        let done = act();
        over.store(true, Ordering::Relaxed);
        let tries = prober.join().ok().context("the prober panicked")?;
        Ok((done?, tries?))
    })
}

#[test]
fn disks_travel_with_their_locks() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let paths = [
        image(dir.path(), "a", 1 << 20)?,
        image(dir.path(), "b", 1 << 20)?,
    ];
    let mut recipe = Recipe::pulse(2, "ram=8M duty=20");
    recipe.devices.disks = vec![disk(paths[0].clone(), false), disk(paths[1].clone(), true)];
    let files = [open(&paths[0])?, open(&paths[1])?];
    let mut vm = Vm::up(&recipe)?;
    let (_, tries) = while_probed(&files, || {
        for _ in 0..5 {
            vm.must_move(Release::Current)?;
            vm.is_well()?;
        }
        // Called off by its budget: the predecessor has them still.
        let kept = vm.swap(Release::Current, &Terms::budget(Duration::from_nanos(1)))?;
        ensure!(kept.to.version == Release::Current.version());
        // A successor that dies with duplicates of them in its hands.
        let mut successor: Successor = vm.start_successor(Release::Current)?;
        successor.kill()?;
        vm.is_well()?;
        // The guest begins anew, in the same process and with the same disks.
        let mut console = Console::open(&vm)?;
        console.type_line("reset")?;
        console.wait("pulse: 2 vCPUs online", 2)?;
        vm.must_move(Release::Current)?;
        vm.is_well()
    })?;
    ensure!(tries > 100, "{tries} tries are no probe");
    vm.power_off()?;
    wait_for("the disks to be free", PATIENCE, || {
        Ok(files.iter().all(is_free).then_some(()))
    })
}

/// Boots with these disks, which must be refused.
fn refused(disks: &[DiskSpec]) -> anyhow::Result<Refusal> {
    let dir = tempfile::tempdir()?;
    let spec = serde_json::json!({
        "name": "disks",
        "kernel": { "path": releases::pulse()? },
        "disks": disks,
    });
    let mut command = vmm()?;
    command.arg("run").args(["--spec", "-"]);
    command.arg("--dir").arg(dir.path().join("vm"));
    must_refuse(command, &spec.to_string())
}

#[test]
fn what_is_no_disk() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let field = "field `disks.path`";
    let missing = disk(dir.path().join("missing.img"), false);
    refused(&[missing])?.says(&[field, "missing.img", "no such file"])?;
    let folder = disk(dir.path().into(), false);
    refused(&[folder])?.says(&[field, "is a directory"])?;
    let short = disk(image(dir.path(), "short", 1000)?, false);
    refused(&[short])?.says(&[field, "1000 bytes", "512"])?;
    let empty = disk(image(dir.path(), "empty", 0)?, true);
    refused(&[empty])?.says(&[field, "it is empty"])
}

#[test]
fn a_disk_of_another_guest() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let path = image(dir.path(), "a", 1 << 20)?;
    let mut recipe = Recipe::pulse(1, "");
    recipe.devices.disks = vec![disk(path.clone(), false)];
    let vm = Vm::up(&recipe)?;
    let holder = format!("process {} (stillpoint-vmm)", vm.pid());
    for read_only in [false, true] {
        let refusal = refused(&[disk(path.clone(), read_only)])?;
        refusal.says(&["field `disks.path`", "locked by", &holder])?;
    }
    vm.is_well()
}

//! Rehearsals: a release that would fail after the freeze is found out before it, and the guest has
//! nothing of it but a short pause.

use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, ensure};
use rustix::process::Signal;
use stillpoint_control::message::GuestState;
use stillpoint_control::ownership::{Epoch, Owner};
use stillpoint_control::rehearsal::{Rehearsal, Stage, Verdict};
use stillpoint_tests::furnished::Furnished;
use stillpoint_tests::needs_kvm;
use stillpoint_tests::patience::{PATIENCE, wait_for};
use stillpoint_tests::releases::Release;
use stillpoint_tests::vm::{Recipe, Vm};
use stillpoint_tests::wire;

fn passes(told: &Rehearsal) -> anyhow::Result<()> {
    ensure!(told.verdict == Verdict::Passed, "{told:#?}");
    ensure!(told.stage == Stage::Done, "{told:#?}");
    Ok(())
}

fn fails(told: &Rehearsal, stage: Stage) -> anyhow::Result<String> {
    ensure!(told.verdict == Verdict::Failed, "{told:#?}");
    ensure!(told.stage == stage, "{told:#?}");
    Ok(told.reason.clone().unwrap_or_default())
}

/// A guest that uses timers of both kinds, the FPU, RAM and interrupts on each vCPU.
fn guest() -> anyhow::Result<Vm> {
    Vm::up(&Recipe::pulse(2, "ram=8M duty=50"))
}

#[test]
fn a_good_release_passes_again_and_again_and_the_guest_is_whole() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let pid = vm.pid();
    for round in 0..20 {
        let told = vm.rehearse(Release::Current, true)?;
        passes(&told).with_context(|| format!("round {round}"))?;
        ensure!(told.state_bytes > 0 && !told.peek.is_zero(), "{told:?}");
        ensure!(!told.load.is_zero() && told.took > told.load, "{told:?}");
    }
    ensure!(vm.pid() == pid && vm.owner()? == Owner::Held(Epoch(0)));
    vm.is_well()?;
    vm.must_move(Release::Current)?;
    vm.is_well()?;
    vm.power_off()
}

#[test]
fn the_older_release_passes_in_its_own_format() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let told = vm.rehearse(Release::Compat, true)?;
    passes(&told)?;
    ensure!(told.state_format == 1, "{told:?}");
    vm.must_move(Release::Compat)?;
    let told = vm.rehearse(Release::Current, true)?;
    passes(&told)?;
    vm.is_well()?;
    vm.power_off()
}

#[test]
fn without_a_peek_the_guest_never_stands_still() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let told = vm.rehearse(Release::Current, false)?;
    passes(&told)?;
    ensure!(told.peek.is_zero() && told.state_bytes == 0, "{told:?}");
    let told = vm.rehearse(Release::Faulty("spoil=load"), false)?;
    passes(&told).context("it fails at a state, and was shown none")?;
    vm.is_well()?;
    vm.power_off()
}

#[test]
fn a_release_that_would_refuse_the_state_is_found_out() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let told = vm.rehearse(Release::Faulty("spoil=load"), true)?;
    let reason = fails(&told, Stage::Load)?;
    ensure!(reason.contains("section vcpu"), "{reason}");
    vm.is_well()?;
    vm.must_move(Release::Current)?;
    vm.power_off()
}

#[test]
fn a_release_that_would_change_the_state_without_a_word_is_found_out() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let told = vm.rehearse(Release::Faulty("spoil=state"), true)?;
    fails(&told, Stage::Compare)?;
    ensure!(told.differences.len() == 1, "{told:?}");
    ensure!(
        told.differences[0].starts_with("probe: scratch is"),
        "{told:?}"
    );
    vm.is_well()?;
    // Nothing else would have seen it.
    vm.must_move(Release::Faulty("spoil=state"))?;
    vm.power_off()
}

#[test]
fn a_rehearsal_that_is_killed_costs_the_guest_nothing() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let mut stage = vm.start_stage(Release::Current)?;
    let pid = i32::try_from(stage.pid())?;
    let pid = rustix::process::Pid::from_raw(pid).context("a pid")?;
    rustix::process::kill_process(pid, Signal::KILL)?;
    let told = vm.rehearse_with(&mut stage, true)?;
    fails(&told, Stage::Build)?;
    ensure!(told.peek.is_zero(), "{told:?}");
    vm.is_well()?;
    vm.must_move(Release::Current)?;
    vm.power_off()
}

/// What a process has mapped of guest RAM: the mode of each mapping.
fn mappings_of_ram(pid: u32) -> anyhow::Result<Vec<String>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let ram = maps.lines().filter(|line| line.contains("stillpoint-ram"));
    let modes = ram.filter_map(|line| line.split_ascii_whitespace().nth(1));
    Ok(modes.map(str::to_owned).collect())
}

/// What a process has open: the target of each descriptor, and whether it may write there.
fn open_files(pid: u32) -> anyhow::Result<Vec<(String, bool)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let name = entry?.file_name();
        let name = name.to_str().context("a number")?;
        let target = std::fs::read_link(format!("/proc/{pid}/fd/{name}"))?;
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{name}"))?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = u32::from_str_radix(flags.context("flags")?.trim(), 8)?;
        files.push((target.display().to_string(), flags & 3 != 0));
    }
    Ok(files)
}

fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
}

/// The throw-away process is held where it has all that it is given: it has a private view of RAM
/// over a file that it can't write to, an image that it can't write to, and neither the ownership page
/// nor the sockets of the guest. The guest goes on meanwhile.
#[test]
fn the_throw_away_process_holds_nothing_that_could_harm() -> anyhow::Result<()> {
    needs_kvm!();
    if !wire::is_beside("the_throw_away_process_holds_nothing_that_could_harm")? {
        return Ok(());
    }
    let mut guest = Furnished::boot(Release::Current, true)?;
    let mut stage = guest.vm.start_stage(Release::Faulty("rehearsing=stop"))?;
    let pid = stage.pid();
    let image = guest.vm.spec().disks[0].path.display().to_string();
    let onlooker = guest.vm.onlooker()?;
    let told = std::thread::scope(|scope| -> anyhow::Result<Rehearsal> {
        let (vm, stage) = (&guest.vm, &mut stage);
        let rehearsing = scope.spawn(move || vm.rehearse_with(stage, true));
        let looked = wait_for("the rehearsal to have loaded", PATIENCE, || {
            Ok(is_stopped(pid).then_some(()))
        });
        let found = looked.and_then(|()| {
            guest.works()?;
            ensure!(onlooker.describe()?.state == GuestState::Running);
            Ok((mappings_of_ram(pid)?, open_files(pid)?))
        });
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("a pid")?;
        rustix::process::kill_process(pid, Signal::CONT)?;
        let told = rehearsing
            .join()
            .map_err(|_| anyhow::anyhow!("it panicked"))??;
        let (mappings, files) = found?;
        ensure!(!mappings.is_empty(), "it maps no RAM");
        ensure!(mappings.iter().all(|mode| mode == "rw-p"), "{mappings:?}");
        let of = |what: &str| {
            files
                .iter()
                .filter(|(name, _)| name.contains(what))
                .collect::<Vec<_>>()
        };
        let ram = of("stillpoint-ram");
        ensure!(
            !ram.is_empty() && ram.iter().all(|(_, writes)| !writes),
            "{ram:?}"
        );
        let disk = of(&image);
        ensure!(
            !disk.is_empty() && disk.iter().all(|(_, writes)| !writes),
            "{disk:?}"
        );
        ensure!(of("ownership").is_empty(), "{files:?}");
        ensure!(of("net/tun").is_empty(), "{files:?}");
        Ok(told)
    })?;
    passes(&told)?;
    guest.is_whole()?;
    guest.end()
}

/// The guest's VMM is stopped, so that nobody runs the guest, just when the rehearsal is about to load its
/// state; and RAM is compared, byte by byte, with what it is when all was loaded, late MSRs too, and saved
/// again. That the rehearsal wrote, into pages of its own, is the control.
#[test]
fn no_byte_of_guest_ram_is_written() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let (ram, _) = vm.client()?.lend_guest()?;
    let mut stage = vm.start_stage(Release::Faulty("rehearsing=stop"))?;
    let (vmm, pid) = (vm.pid(), stage.pid());
    let told = std::thread::scope(|scope| -> anyhow::Result<Rehearsal> {
        let (vm, stage) = (&vm, &mut stage);
        let rehearsing = scope.spawn(move || vm.rehearse_with(stage, true));
        let compared = (|| {
            wait_for("the rehearsal to have loaded", PATIENCE, || {
                Ok(is_stopped(pid).then_some(()))
            })?;
            signal(vmm, Signal::STOP)?;
            wait_for("the guest's VMM to stand still", PATIENCE, || {
                Ok(is_stopped(vmm).then_some(()))
            })?;
            let before = ram_of(&ram)?;
            signal(pid, Signal::CONT)?;
            wait_for("the state to be saved again", PATIENCE, || {
                let again = |(name, _): &(String, bool)| name.contains("stillpoint-again");
                Ok(open_files(pid)?.iter().any(again).then_some(()))
            })?;
            ensure!(ram_of(&ram)? == before, "guest RAM changed");
            ram_written_by(pid)
        })();
        let _ = signal(pid, Signal::CONT);
        signal(vmm, Signal::CONT)?;
        let told = rehearsing
            .join()
            .map_err(|_| anyhow::anyhow!("it panicked"))??;
        ensure!(compared? > 0, "it wrote nothing, so nothing was shown");
        Ok(told)
    })?;
    passes(&told)?;
    vm.is_well()?;
    vm.power_off()
}

fn signal(pid: u32, signal: Signal) -> anyhow::Result<()> {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("a pid")?;
    Ok(rustix::process::kill_process(pid, signal)?)
}

/// KiB of guest RAM that the process has copied because it wrote there.
fn ram_written_by(pid: u32) -> anyhow::Result<u64> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut of_ram = false;
    let mut kib = 0;
    for line in smaps.lines() {
        if line.contains('-') && line.split_ascii_whitespace().count() >= 5 {
            of_ram = line.contains("stillpoint-ram");
        } else if let Some(rest) = line.strip_prefix("Anonymous:").filter(|_| of_ram) {
            kib += rest.trim().trim_end_matches(" kB").parse::<u64>()?;
        }
    }
    Ok(kib)
}

/// Bytes of the RAM file.
fn ram_of(file: &OwnedFd) -> anyhow::Result<Vec<u8>> {
    let file = std::fs::File::from(file.try_clone()?);
    let mut bytes = vec![0; usize::try_from(file.metadata()?.len())?];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// All kinds of devices at work: their state is rehearsed, and the guest's own disk, lock, sockets and
/// frames have no part in it.
#[test]
fn a_guest_with_all_devices_at_work() -> anyhow::Result<()> {
    needs_kvm!();
    if !wire::is_beside("a_guest_with_all_devices_at_work")? {
        return Ok(());
    }
    let mut guest = Furnished::boot(Release::Current, true)?;
    for _ in 0..10 {
        let told = guest.vm.rehearse(Release::Current, true)?;
        passes(&told)?;
        guest.works()?;
    }
    guest.vm.must_move(Release::Current)?;
    guest.works()?;
    Ok(())
}

//! Swaps of guests that are in the midst of something: halted, idle, in string or memory-mapped
//! I/O, with an interrupt pending, with a processor not yet started, with timers under way.

use std::time::Duration;

use anyhow::{Context, ensure};
use stillpoint_control::report::Outcome;
use stillpoint_control::spec::Pages;
use stillpoint_guest_abi::pulse::{Mode, Timers};
use stillpoint_tests::console::Console;
use stillpoint_tests::ground::{self, Setting};
use stillpoint_tests::guest::Snapshot;
use stillpoint_tests::needs_kvm;
use stillpoint_tests::patience::{PATIENCE, wait_for};
use stillpoint_tests::releases::{self, Release};
use stillpoint_tests::start::Manner;
use stillpoint_tests::swap::Terms;
use stillpoint_tests::vm::{Recipe, Vm};

/// Where a guest goes, in turn: to another release and back, and to itself.
const ROUND: [Release; 3] = [Release::Compat, Release::Current, Release::Current];

/// Swaps `times` times; after each `between` holds.
fn swaps(
    vm: &mut Vm,
    times: usize,
    between: impl Fn(&Vm) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for to in ROUND.into_iter().cycle().take(times) {
        vm.must_move(to)?;
        between(vm)?;
    }
    Ok(())
}

/// Waits until each vCPU has done what `count` counts at least `more` times more.
fn goes_on(
    vm: &Vm,
    what: &str,
    more: u64,
    count: fn(&Snapshot, usize) -> u64,
) -> anyhow::Result<()> {
    let from = vm.pulse.look()?;
    let vcpus = vm.vcpus();
    let on = |s: &Snapshot| vcpus.iter().all(|&v| count(s, v) >= count(&from, v) + more);
    vm.pulse.wait(what, PATIENCE, on).map(drop)
}

/// A guest with all vCPUs in one mode lives through swaps, its counters of that mode going on.
fn lives_in_mode(
    cmdline: &str,
    times: usize,
    count: fn(&Snapshot, usize) -> u64,
) -> anyhow::Result<Vm> {
    let mut vm = Vm::up(&Recipe::pulse(2, cmdline))?;
    swaps(&mut vm, times, |vm| {
        goes_on(vm, cmdline, 10, count)?;
        vm.is_well()
    })?;
    Ok(vm)
}

fn timers_fired(s: &Snapshot, v: usize) -> u64 {
    s.vcpus[v].oneshot.fired + s.vcpus[v].deadline.fired
}

#[test]
fn spinning() -> anyhow::Result<()> {
    needs_kvm!();
    lives_in_mode("mode=spin ram=8M", 9, |s, v| s.vcpus[v].clock_reads)?.power_off()
}

#[test]
fn halted_between_timers() -> anyhow::Result<()> {
    needs_kvm!();
    lives_in_mode("mode=halt ram=4M", 9, timers_fired)?.power_off()
}

#[test]
fn idle_stays_idle() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = Vm::up(&Recipe::pulse(2, "mode1=idle ram=4M"))?;
    let idle = |s: &Snapshot| s.vcpus[1].mode == Mode::Idle as u32;
    let before = vm.pulse.wait("vCPU 1 to idle", PATIENCE, idle)?;
    swaps(&mut vm, 9, |vm| {
        let seen = vm.pulse.wait_progress(&[0], 50)?;
        // Whatever wakes it is counted as a stray or as a doubled timer.
        ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
        let woken = seen.vcpus[1].counter - before.vcpus[1].counter;
        ensure!(woken == 0, "woken from its sleep");
        Ok(())
    })?;
    // It can still be woken by what should wake it: an interrupt from the other vCPU.
    Console::open(&vm)?.ask("mode 1 spin", "mode 1 spin")?;
    vm.is_well()?;
    vm.power_off()
}

#[test]
fn all_idle() -> anyhow::Result<()> {
    needs_kvm!();
    // Nothing but a swap's bugs would make any vCPU of this guest run again.
    let mut vm = Vm::up(&Recipe::pulse(2, "mode=idle ram=4M"))?;
    let idle = |s: &Snapshot| s.vcpus.iter().all(|v| v.mode == Mode::Idle as u32);
    let before = vm.pulse.wait("all to idle", PATIENCE, idle)?;
    for to in ROUND.into_iter().cycle().take(6) {
        let report = vm.swap(to, &Terms::default())?;
        ensure!(report.outcome == Outcome::Moved, "{:?}", report.reason);
        // KVM writes a clock page when its vCPU next wakes: there is no error to be read yet.
        let clock = report.clock.context("nothing said of the clock")?;
        ensure!(clock.masterclock_after, "no masterclock after");
        let seen = vm.pulse.look()?;
        ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
        ensure!(seen.globals.total == before.globals.total, "it ran");
    }
    vm.power_off()
}

#[test]
fn mmio() -> anyhow::Result<()> {
    needs_kvm!();
    lives_in_mode("mode=mmio ram=4M gap_us=300", 12, |s, v| {
        s.vcpus[v].mmio_ops
    })?
    .power_off()
}

#[test]
fn interrupts_masked_and_pending() -> anyhow::Result<()> {
    needs_kvm!();
    lives_in_mode("mode=masked ram=4M", 12, |s, v| s.vcpus[v].counter)?;
    let mut vm = Vm::up(&Recipe::pulse(2, "mode=masked ram=4M"))?;
    // Slowly enough that each interrupt held back is taken between two swaps.
    swaps(&mut vm, 6, |vm| {
        goes_on(vm, "timers after the unmasking", 3, timers_fired)?;
        vm.is_well()
    })?;
    vm.power_off()
}

/// Checks that the lines `pio VCPU NUMBER ...` of one vCPU are all there, once, in order.
fn check_lines(log: &str, vcpu: usize) -> anyhow::Result<u64> {
    let prefix = format!("pio {vcpu} ");
    let mut next = 0;
    for line in log.lines().filter(|line| line.starts_with(&prefix)) {
        let due = format!("pio {vcpu} {next:08} abcdefghijklmnopqrstuvwxyz0123456789");
        ensure!(line == due, "the console has {line:?} for {due:?}");
        next += 1;
    }
    Ok(next)
}

#[test]
fn string_pio_loses_no_byte() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = lives_in_mode("mode=pio ram=4M gap_us=300", 15, |s, v| {
        s.vcpus[v].pio_lines
    })?;
    Console::open(&vm)?.type_line("poweroff")?;
    ensure!(vm.wait_end()?.success(), "{}", vm.log());
    let (log, seen) = (vm.console()?, vm.pulse.look()?);
    // vCPU 1 may have been ended in the middle of its last line.
    let whole = log.rfind('\n').map_or("", |end| &log[..end]);
    let others: Vec<_> = whole.lines().filter(|l| !l.starts_with("pio ")).collect();
    ensure!(
        others == ["pulse: 2 vCPUs online"],
        "torn lines: {others:?}"
    );
    for (vcpu, report) in seen.vcpus.iter().enumerate() {
        let found = check_lines(whole, vcpu)?;
        let said = report.pio_lines;
        ensure!(
            found > 0 && (said..=said + 1).contains(&found),
            "{found} lines of {said}"
        );
    }
    Ok(())
}

#[test]
fn a_processor_not_yet_started() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = Vm::boot(&Recipe::pulse(2, "online=1 ram=4M"))?;
    vm.pulse.wait_online(1)?;
    swaps(&mut vm, 4, |vm| {
        let seen = vm.pulse.wait_progress(&[0], 20)?;
        ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
        ensure!(seen.globals.online == 1, "vCPU 1 started by itself");
        Ok(())
    })?;
    Console::open(&vm)?.ask("start 1", "started 1")?;
    vm.pulse.wait_online(2)?;
    swaps(&mut vm, 3, Vm::is_well)?;
    vm.power_off()
}

/// One kind of timer, armed and counted one by one across swaps.
fn each_timer_fires_once(kind: &str, of: fn(&Snapshot, usize) -> Timers) -> anyhow::Result<()> {
    let cmdline = format!("timers={kind} ram=4M duty=60");
    let mut vm = Vm::up(&Recipe::pulse(2, &cmdline))?;
    for to in ROUND.into_iter().cycle().take(15) {
        let before = vm.pulse.look()?;
        vm.must_move(to)?;
        let vcpus = vm.vcpus();
        let fired = |s: &Snapshot| {
            let more = |&v: &usize| of(s, v).fired >= of(&before, v).fired + 5;
            vcpus.iter().all(more)
        };
        let seen = vm.pulse.wait("timers to fire", PATIENCE, fired)?;
        for v in vm.vcpus() {
            let Timers {
                armed,
                fired,
                doubled,
                early,
                ..
            } = of(&seen, v);
            ensure!(
                armed.saturating_sub(fired) <= 1,
                "vCPU {v}: {armed} armed, {fired} fired"
            );
            ensure!(
                doubled == 0 && early == 0,
                "vCPU {v}: {doubled} doubled, {early} early"
            );
        }
    }
    vm.is_well()?;
    vm.power_off()
}

#[test]
fn oneshot_timers() -> anyhow::Result<()> {
    needs_kvm!();
    each_timer_fires_once("oneshot", |s, v| s.vcpus[v].oneshot)
}

#[test]
fn deadline_timers() -> anyhow::Result<()> {
    needs_kvm!();
    each_timer_fires_once("deadline", |s, v| s.vcpus[v].deadline)
}

/// Periodic ticks: due by the TSC, and taken.
fn ticks(vm: &Vm) -> anyhow::Result<(u64, u64)> {
    let Timers { armed, fired, .. } = vm.pulse.look()?.vcpus[0].periodic;
    Ok((armed, fired))
}

/// Ticks due and missing while `act` goes on, and until at least `due` were.
fn missing(
    vm: &mut Vm,
    due: u64,
    act: impl FnOnce(&mut Vm) -> anyhow::Result<()>,
) -> anyhow::Result<(u64, u64)> {
    let (armed, fired) = ticks(vm)?;
    act(vm)?;
    let enough = |s: &Snapshot| s.vcpus[0].periodic.armed >= armed + due;
    vm.pulse.wait("periodic ticks", PATIENCE, enough)?;
    let (armed_now, fired_now) = ticks(vm)?;
    let (due, taken) = (armed_now - armed, fired_now - fired);
    // The tick at either end, and one held back by KVM, may be counted on this side or that.
    ensure!(taken <= due + 3, "{taken} ticks taken of {due}");
    Ok((due, due.saturating_sub(taken)))
}

/// KVM coalesces the ticks of a vCPU that isn't scheduled, so a run with swaps is judged against
/// one without on the same guest: what is missing beyond it may be what the pauses took, and as
/// much again for the processes that came and went. Others may be at work on this machine in the one
/// run and not in the other; ticks that swaps take are missing each time.
#[test]
fn periodic_ticks_against_a_run_without_swaps() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = Vm::up(&Recipe::pulse(1, "timers=periodic ram=4M"))?;
    let mut tries = (0..3).map(|_| ticks_over_swaps(&mut vm));
    let mut last = tries.next().expect("three");
    while let (Err(_), Some(next)) = (&last, tries.next()) {
        last = next;
    }
    drop(tries);
    last?;
    vm.power_off()
}

fn ticks_over_swaps(vm: &mut Vm) -> anyhow::Result<()> {
    const PERIOD_US: u128 = 2000;
    let mut paused = 0;
    let swapped = missing(vm, 1000, |vm| {
        for to in ROUND.into_iter().cycle().take(6) {
            paused += vm.must_move(to)?.blackout.host.as_micros();
            vm.is_well()?;
        }
        Ok(())
    })?;
    let control = missing(vm, swapped.0, |_| Ok(()))?;
    let allowed = 2 * u64::try_from(paused / PERIOD_US)? + 2 * control.1 + swapped.0 / 10;
    ensure!(
        swapped.1 <= allowed,
        "of {swapped:?} ticks (due, missing) {allowed} may be missing; without swaps {control:?}"
    );
    Ok(())
}

#[test]
fn one_console_connection_through_swaps() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = Vm::up(&Recipe::pulse(2, "ram=4M duty=50"))?;
    let mut console = Console::open(&vm)?;
    console.ask("ping", "pong\n")?;
    for to in ROUND.into_iter().cycle().take(5) {
        // Typed before the swap, and answered on whichever side of it.
        console.type_line("ping")?;
        vm.must_move(to)?;
        console.ask("report", "globals online=2")?;
        console.ask("ping", "pong\n")?;
    }
    console.wait("pong\n", 11)?;
    // What the viewer saw is what was logged, to the byte: nothing lost or doubled on either.
    let (seen, log) = (console.seen()?, vm.console()?);
    ensure!(
        seen.replace('\r', "") == log.replace('\r', ""),
        "{seen:?}\nlogged: {log:?}"
    );
    ensure!(seen.matches("pong").count() == 11, "{seen:?}");
    vm.is_well()?;
    vm.power_off()
}

#[test]
fn a_viewer_who_reads_late_misses_nothing() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = Vm::up(&Recipe::pulse(2, "mode1=pio ram=4M gap_us=300"))?;
    let mut console = Console::open(&vm)?;
    console.wait("2 vCPUs online", 1)?;
    // Far more packets than a socket holds, far fewer bytes than the console keeps.
    for lines in [200, 400] {
        let written = |s: &Snapshot| s.vcpus[1].pio_lines >= lines;
        vm.pulse.wait("lines on the console", PATIENCE, written)?;
        vm.must_move(Release::Current)?;
    }
    console.type_line("mode 1 spin")?;
    let quiet = |s: &Snapshot| s.vcpus[1].mode == Mode::Spin as u32;
    vm.pulse.wait("quiet", PATIENCE, quiet)?;
    console.ask("ping", "pong\n")?;
    let (seen, log) = (console.seen()?, vm.console()?);
    ensure!(
        log.len() < 64 << 10,
        "more than the console keeps: {}",
        log.len()
    );
    ensure!(seen == log, "seen {} bytes of {}", seen.len(), log.len());
    vm.power_off()
}

/// A copy of an ELF file without its notes: nothing says that it can be booted by PVH.
fn without_notes(mut elf: Vec<u8>) -> anyhow::Result<Vec<u8>> {
    const PT_NOTE: u32 = 4;
    let half = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let (size, count) = (
        half(54).context("e_phentsize")?,
        half(56).context("e_phnum")?,
    );
    let first = elf.get(32..40).context("e_phoff")?.try_into()?;
    let first = usize::try_from(u64::from_le_bytes(first))?;
    let mut found = false;
    for header in 0..usize::from(count) {
        let at = first + header * usize::from(size);
        let kind = elf.get_mut(at..at + 4).context("a program header")?;
        if kind == PT_NOTE.to_le_bytes() {
            kind.fill(0);
            found = true;
        }
    }
    ensure!(found, "no note to take away");
    Ok(elf)
}

#[test]
fn booted_by_the_64_bit_entry() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let kernel = dir.path().join("pulse-64");
    std::fs::write(&kernel, without_notes(std::fs::read(releases::pulse()?)?)?)?;
    let recipe = Recipe::pulse(2, "ram=8M");
    let kernel = Some(kernel);
    let mut vm = Vm::up(&Recipe { kernel, ..recipe })?;
    swaps(&mut vm, 3, Vm::is_well)?;
    vm.power_off()
}

#[test]
fn ram_above_4_gib_stays_sparse() -> anyhow::Result<()> {
    needs_kvm!();
    let recipe = Recipe::pulse(2, "ram=32M ram_from=4G");
    let memory_mib = 5 << 10;
    let mut vm = Vm::up(&Recipe {
        memory_mib,
        ..recipe
    })?;
    let seen = vm.pulse.look()?;
    let at = (seen.globals.pattern_base, seen.globals.pattern_len);
    ensure!(at == (4 << 30, 32 << 20), "the pattern lies at {at:x?}");
    goes_on(&vm, "every page of the pattern touched", 2, |s, v| {
        s.vcpus[v].ram_passes
    })?;
    let before = vm.pulse.allocated()?;
    ensure!(before >= 32 << 20, "{before} bytes allocated");
    swaps(&mut vm, 4, |vm| {
        goes_on(vm, "passes over RAM", 2, |s, v| s.vcpus[v].ram_passes)?;
        vm.is_well()
    })?;
    let after = vm.pulse.allocated()?;
    ensure!(after == before, "{before} bytes of RAM became {after}");
    vm.power_off()
}

#[test]
fn as_a_user_who_is_not_root() -> anyhow::Result<()> {
    stillpoint_tests::needs!(
        ground::no_kvm,
        ground::no_other_user,
        ground::no_mount_namespace
    );
    let recipe = Recipe::pulse(2, "ram=8M");
    let manner = Manner {
        uid: Some(65_534),
        ..Manner::default()
    };
    let mut vm = Vm::up(&Recipe { manner, ..recipe })?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid()))?;
    ensure!(status.contains("\nUid:\t65534\t65534\t65534"), "{status}");
    swaps(&mut vm, 3, Vm::is_well)?;
    vm.power_off()
}

/// How often the threads of a process have gone to sleep, and so were awake.
fn naps(pid: u32) -> anyhow::Result<u64> {
    let mut naps = 0;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(thread?.path().join("status"))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        naps += line.context("no count of naps")?.trim().parse::<u64>()?;
    }
    Ok(naps)
}

#[test]
fn nothing_wakes_beside_a_guest_that_sleeps() -> anyhow::Result<()> {
    needs_kvm!();
    let vm = Vm::up(&Recipe::pulse(2, "mode=idle ram=4M"))?;
    let idle = |s: &Snapshot| s.vcpus.iter().all(|v| v.mode == Mode::Idle as u32);
    vm.pulse.wait("all to idle", PATIENCE, idle)?;
    // What boot left to be done is done some time; a clock that ticks is there every second.
    let sleeps = || {
        let before = naps(vm.pid())?;
        std::thread::sleep(Duration::from_secs(1));
        Ok((naps(vm.pid())? <= before + 2).then_some(()))
    };
    wait_for("a second in which nothing wakes", PATIENCE, sleeps)?;
    vm.power_off()
}

/// What the host does with a guest's RAM: bytes of its mappings that are locked, and the policies of their nodes.
fn held(pid: u32) -> anyhow::Result<(u64, Vec<String>)> {
    let of = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}"));
    let status = of("status")?;
    let locked = status
        .lines()
        .find_map(|line| line.strip_prefix("VmLck:"))
        .context("VmLck")?;
    let kib: u64 = locked.trim().trim_end_matches(" kB").parse()?;
    // A line is: address, policy, what is mapped, pages.
    let maps = of("numa_maps")?;
    let ram = maps.lines().filter(|line| line.contains("stillpoint-ram"));
    let policies = ram.filter_map(|line| line.split(' ').nth(1).map(str::to_owned));
    Ok((kib << 10, policies.collect()))
}

#[test]
fn ram_stays_locked_and_on_its_node() -> anyhow::Result<()> {
    needs_kvm!();
    let plain = Vm::up(&Recipe::pulse(1, "ram=4M"))?;
    let (locked, policies) = held(plain.pid())?;
    ensure!(locked == 0 && policies.iter().all(|policy| policy == "default"));
    plain.power_off()?;
    let mut recipe = Recipe::pulse(1, "ram=4M");
    recipe.lock_memory = true;
    let has_nodes = std::fs::exists("/sys/devices/system/node/node0")?;
    if has_nodes {
        recipe.memory_nodes.push(0);
    }
    let policy = if has_nodes { "bind:0" } else { "default" };
    let mut vm = Vm::up(&recipe)?;
    let size = recipe.memory_mib << 20;
    for _ in 0..2 {
        let (locked, policies) = held(vm.pid())?;
        ensure!(locked >= size, "{locked} bytes of {size}");
        ensure!(
            policies.is_empty() != has_nodes && policies.iter().all(|said| said == policy),
            "{policies:?}"
        );
        // What the guest never touched is not there for it.
        let there = vm.pulse.allocated()?;
        ensure!(there < size / 2, "{there} bytes of {size}");
        vm.must_move(Release::Current)?;
    }
    vm.is_well()?;
    vm.power_off()
}

/// Of the guest's RAM, as a process maps it, bytes in huge pages: reserved ones, or such as the kernel made.
fn in_huge_pages(pid: u32) -> anyhow::Result<u64> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut is_ram, mut kib) = (false, 0);
    for line in smaps.lines() {
        match line.split_whitespace().next() {
            Some("Shared_Hugetlb:" | "Private_Hugetlb:" | "ShmemPmdMapped:") if is_ram => {
                let number = line.split_whitespace().nth(1).context(line.to_owned())?;
                kib += number.parse::<u64>()?;
            }
            // The line of a mapping begins with where it is; those of its figures with their names.
            Some(word) if !word.ends_with(':') => is_ram = line.contains("stillpoint-ram"),
            _ => {}
        }
    }
    Ok(kib << 10)
}

/// Swaps a guest of 64 MiB in such pages, all of them touched; how much of it was in huge pages before, and after each.
fn huge_pages_over_swaps(pages: Pages) -> anyhow::Result<(u64, Vec<u64>)> {
    let mut vm = Vm::up(&Recipe {
        memory_mib: 64,
        pages,
        ..Recipe::pulse(2, "ram=16M touch=64M")
    })?;
    vm.pulse.wait_touched(PATIENCE)?;
    let before = in_huge_pages(vm.pid())?;
    let mut after = Vec::new();
    for to in ROUND {
        vm.must_move(to)?;
        after.push(in_huge_pages(vm.pid())?);
        goes_on(&vm, "passes over RAM", 2, |s, v| s.vcpus[v].ram_passes)?;
        vm.is_well()?;
    }
    vm.power_off()?;
    Ok((before, after))
}

#[test]
fn reserved_huge_pages_move_as_they_are() -> anyhow::Result<()> {
    stillpoint_tests::needs!(ground::no_kvm, ground::not_root);
    let _reserved = Setting::raise("/proc/sys/vm/nr_hugepages", 32)?;
    let (before, after) = huge_pages_over_swaps(Pages::Hugetlb2m)?;
    // All but what lies below its image. A successor has all there are: they are reserved for the guest, and their file tells
    // of no holes.
    ensure!(before >= 48 << 20, "{before} bytes in huge pages");
    ensure!(after.iter().all(|&now| now >= before), "{before} {after:?}");
    Ok(())
}

#[test]
fn transparent_huge_pages_stay_huge() -> anyhow::Result<()> {
    stillpoint_tests::needs!(ground::no_kvm, ground::not_root);
    let shmem = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    if !std::fs::exists(shmem)? {
        ground::skip("this kernel has no transparent huge pages");
        return Ok(());
    }
    let _advise = Setting::choose(shmem, "advise")?;
    let (before, after) = huge_pages_over_swaps(Pages::Thp)?;
    // A kernel in want of whole ones gives small ones; what it gave is what moves.
    ensure!(before >= 32 << 20, "{before} bytes in huge pages");
    ensure!(after.iter().all(|&now| now >= before), "{before} {after:?}");
    Ok(())
}

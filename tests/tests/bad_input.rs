//! What the VMM refuses: on its command line with an error text of its own each and a failing
//! exit status, on its control socket with the guest as it was.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{anyhow, bail, ensure};
use rustix::fs::{MemfdFlags, SealFlags};
use stillpoint_control::client::ClientError;
use stillpoint_control::frame;
use stillpoint_control::message::{Handover, Reply, Request};
use stillpoint_control::ownership::{Epoch, Owner};
use stillpoint_tests::cli::{Refusal, boot_must_fail, must_refuse, vmm};
use stillpoint_tests::console::Console;
use stillpoint_tests::ground;
use stillpoint_tests::releases::{self, Release};
use stillpoint_tests::start::copy_for_all;
use stillpoint_tests::swap::{Successor, Terms, wait_swapping};
use stillpoint_tests::vm::{Recipe, Vm};
use stillpoint_tests::{needs, needs_kvm};

const NOBODY: u32 = 65_534;

fn path_text(path: &Path) -> anyhow::Result<&str> {
    path.to_str()
        .ok_or_else(|| anyhow!("{path:?} is not UTF-8"))
}

/// A guest directory that is not there yet.
fn fresh() -> anyhow::Result<(tempfile::TempDir, PathBuf)> {
    let dir = tempfile::tempdir()?;
    let vm = dir.path().join("vm");
    Ok((dir, vm))
}

/// Boots a file with these bytes as a kernel.
fn boot_bytes(bytes: &[u8]) -> anyhow::Result<Refusal> {
    let (dir, vm) = fresh()?;
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, bytes)?;
    boot_must_fail(&vm, &["--kernel", path_text(&kernel)?])
}

// The kernel.

#[test]
fn no_such_kernel() -> anyhow::Result<()> {
    let (_dir, vm) = fresh()?;
    let refusal = boot_must_fail(&vm, &["--kernel", "/no/such/kernel"])?;
    refusal.says(&["`kernel.path`", "/no/such/kernel", "No such file"])?;
    ensure!(!vm.exists(), "a directory was made for nothing");
    Ok(())
}

#[test]
fn a_directory_for_a_kernel() -> anyhow::Result<()> {
    let (_dir, vm) = fresh()?;
    let refusal = boot_must_fail(&vm, &["--kernel", "/"])?;
    refusal.says(&["`kernel.path`", "not a regular file"])
}

#[test]
fn a_corrupt_kernel() -> anyhow::Result<()> {
    let says = ["`kernel.path`", "is no kernel that can be booted"];
    boot_bytes(b"")?.says(&says)?;
    boot_bytes(&[0x5a; 100_000])?.says(&says)?;
    let pulse = std::fs::read(releases::pulse()?)?;
    boot_bytes(&pulse[..64])?.says(&says)?;
    boot_bytes(&pulse[..pulse.len() / 8])?.says(&says)?;
    let mut beyond = pulse;
    // The physical address of the first segment: far beyond any RAM.
    beyond[64 + 24..64 + 32].copy_from_slice(&(1u64 << 44).to_le_bytes());
    boot_bytes(&beyond)?.says(&says)
}

#[test]
fn no_such_initrd() -> anyhow::Result<()> {
    let (_dir, vm) = fresh()?;
    let pulse = releases::pulse()?;
    let arguments = [
        "--kernel",
        path_text(&pulse)?,
        "--initrd",
        "/no/such/initrd",
    ];
    let refusal = boot_must_fail(&vm, &arguments)?;
    refusal.says(&["`kernel.initrd`", "/no/such/initrd"])
}

// The spec.

/// Gives this spec on standard input.
fn boot_spec(spec: &str) -> anyhow::Result<Refusal> {
    let (_dir, vm) = fresh()?;
    let mut command = vmm()?;
    command
        .arg("run")
        .arg("--dir")
        .arg(&vm)
        .args(["--spec", "-"]);
    let refusal = must_refuse(command, spec)?;
    ensure!(!vm.exists(), "a directory was made for nothing");
    Ok(refusal)
}

#[test]
fn a_spec_with_an_unknown_field() -> anyhow::Result<()> {
    boot_spec(r#"{"name":"a","kernel":{"path":"/k"},"cpu":2}"#)?
        .says(&["machine spec", "unknown field `cpu`"])?;
    boot_spec(r#"{"name":"a","kernel":{"path":"/k","args":""}}"#)?
        .says(&["machine spec", "unknown field `args`"])?;
    boot_spec(r#"{"name":"a","kernel":{"path":"/k"},"memory":{"bytes":1}}"#)?
        .says(&["machine spec", "unknown field `bytes`"])
}

#[test]
fn a_spec_that_can_not_be() -> anyhow::Result<()> {
    boot_spec("")?.says(&["machine spec"])?;
    boot_spec("{")?.says(&["machine spec"])?;
    boot_spec(r#"{"name":"a"}"#)?.says(&["machine spec", "missing field `kernel`"])?;
    boot_spec(r#"{"name":"../a","kernel":{"path":"/k"}}"#)?.says(&["field `name`"])?;
    boot_spec(r#"{"name":"a","cpus":0,"kernel":{"path":"/k"}}"#)?.says(&["field `cpus`"])?;
    boot_spec(r#"{"name":"a","cpus":300,"kernel":{"path":"/k"}}"#)?.says(&["machine spec"])?;
    boot_spec(r#"{"name":"a","kernel":{"path":""}}"#)?.says(&["field `kernel.path`"])?;
    boot_spec(r#"{"name":"a","kernel":{"path":"/k"},"memory":{"size":4096}}"#)?
        .says(&["field `memory.size`"])?;
    boot_spec(r#"{"name":"a","kernel":{"path":"/k"},"blackout_budget_ns":31000000000}"#)?
        .says(&["field `blackout_budget_ns`"])
}

#[test]
fn no_such_spec() -> anyhow::Result<()> {
    let (_dir, vm) = fresh()?;
    let refusal = boot_must_fail(&vm, &["--spec", "/no/such/spec"])?;
    refusal.says(&["machine spec", "/no/such/spec"])
}

#[test]
fn more_ram_than_the_host_has() -> anyhow::Result<()> {
    let (_dir, vm) = fresh()?;
    let pulse = releases::pulse()?;
    let arguments = ["--kernel", path_text(&pulse)?, "--memory", "32T"];
    let refusal = boot_must_fail(&vm, &arguments)?;
    refusal.says(&["`memory.size`", "33554432 MiB", "more than this host's"])
}

#[test]
fn what_clap_refuses() -> anyhow::Result<()> {
    for arguments in [
        &["run", "--dir", "/tmp/x"][..],
        &["run", "--kernel", "/k"],
        &[
            "run", "--dir", "/tmp/x", "--kernel", "/k", "--memory", "much",
        ],
        &["walk"],
        &["adopt"],
    ] {
        let mut command = vmm()?;
        command.args(arguments);
        let refusal = must_refuse(command, "")?;
        ensure!(refusal.code == Some(2), "{refusal:?}");
        ensure!(refusal.text.contains("error:"), "{refusal:?}");
    }
    Ok(())
}

#[test]
fn an_fd_that_is_not_open() -> anyhow::Result<()> {
    let mut command = vmm()?;
    command.args(["adopt", "--handover-fd", "77"]);
    must_refuse(command, "")?.says(&["file descriptor", "Bad file descriptor"])?;
    let mut command = vmm()?;
    command.args(["adopt", "--handover-fd", "1"]);
    must_refuse(command, "")?.says(&["file descriptor 1", "not one of those handed over"])
}

#[test]
fn the_ready_fd_hears_of_a_refusal() -> anyhow::Result<()> {
    let kernel = Some("/no/such/kernel".into());
    let recipe = Recipe::pulse(1, "");
    match Vm::boot(&Recipe { kernel, ..recipe }) {
        Ok(_) => bail!("it booted"),
        Err(error) => {
            let text = format!("{error:#}");
            ensure!(text.starts_with("the VMM: machine spec"), "{text}");
            Ok(())
        }
    }
}

// /dev/kvm.

#[test]
fn no_right_to_kvm() -> anyhow::Result<()> {
    needs!(ground::no_kvm, ground::no_other_user);
    if std::fs::metadata("/dev/kvm")?.mode() & 0o006 == 0o006 {
        ground::skip("/dev/kvm is open to everybody here");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    chown(dir.path(), Some(NOBODY), Some(NOBODY))?;
    let binary = copy_for_all(&Release::Current.binary()?, dir.path())?;
    let pulse = copy_for_all(&releases::pulse()?, dir.path())?;
    let mut command = Command::new(binary);
    command.arg("run").arg("--dir").arg(dir.path().join("vm"));
    command.arg("--kernel").arg(pulse);
    command.uid(NOBODY).gid(NOBODY).current_dir("/");
    let refusal = must_refuse(command, "")?;
    refusal.says(&[
        "cannot open /dev/kvm",
        "Permission denied",
        "give this user the right",
    ])
}

#[test]
fn no_kvm() -> anyhow::Result<()> {
    needs!(ground::no_mount_namespace);
    const WITHOUT: &str = r#"mount -t tmpfs none /dev && exec "$@""#;
    let (_dir, vm) = fresh()?;
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", WITHOUT, "sh"]);
    command.arg(Release::Current.binary()?);
    command.arg("run").arg("--dir").arg(&vm);
    command.arg("--kernel").arg(releases::pulse()?);
    let refusal = must_refuse(command, "")?;
    refusal.says(&[
        "cannot open /dev/kvm",
        "No such file",
        "load the kvm_intel or kvm_amd",
    ])
}

// The directory.

#[test]
fn a_second_vmm_in_one_directory() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let pulse = releases::pulse()?;
    let second = || boot_must_fail(&vm.dir(), &["--kernel", path_text(&pulse)?]);
    second()?.says(&["another VMM serves", "runs already"])?;
    vm.is_well()?;
    // A successor serves it in its predecessor's stead.
    vm.must_move(Release::Current)?;
    let second = boot_must_fail(&vm.dir(), &["--kernel", path_text(&pulse)?])?;
    second.says(&["another VMM serves"])?;
    unchanged(vm, 1)
}

#[test]
fn a_directory_others_may_enter() -> anyhow::Result<()> {
    let (_dir, vm) = fresh()?;
    std::fs::create_dir(&vm)?;
    std::fs::set_permissions(&vm, PermissionsExt::from_mode(0o755))?;
    let pulse = releases::pulse()?;
    let refusal = boot_must_fail(&vm, &["--kernel", path_text(&pulse)?])?;
    refusal.says(&["must belong to us alone", "mode 755", "want 0700"])?;
    ensure!(
        std::fs::read_dir(&vm)?.next().is_none(),
        "files were made there"
    );
    Ok(())
}

#[test]
fn somebody_elses_directory() -> anyhow::Result<()> {
    needs!(ground::no_other_user);
    let (_dir, vm) = fresh()?;
    std::fs::create_dir(&vm)?;
    std::fs::set_permissions(&vm, PermissionsExt::from_mode(0o700))?;
    chown(&vm, Some(NOBODY), Some(NOBODY))?;
    let pulse = releases::pulse()?;
    let refusal = boot_must_fail(&vm, &["--kernel", path_text(&pulse)?])?;
    refusal.says(&["must belong to us alone", "owner 65534"])
}

#[test]
fn a_file_where_a_socket_belongs() -> anyhow::Result<()> {
    let (_dir, vm) = fresh()?;
    std::fs::create_dir(&vm)?;
    std::fs::set_permissions(&vm, PermissionsExt::from_mode(0o700))?;
    std::fs::write(vm.join("control.sock"), "mine")?;
    let pulse = releases::pulse()?;
    let refusal = boot_must_fail(&vm, &["--kernel", path_text(&pulse)?])?;
    refusal.says(&["control.sock", "a file that is no socket is there"])?;
    ensure!(
        std::fs::read(vm.join("control.sock"))? == b"mine",
        "overwritten"
    );
    Ok(())
}

#[test]
fn sockets_of_a_killed_vmm_are_replaced() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    vm.must_move(Release::Current)?;
    let dir = vm.leave()?;
    ensure!(
        dir.path().join("vm/control.sock").exists(),
        "no stale socket"
    );
    let mut vm = Vm::boot_in(dir, &Recipe::pulse(2, "ram=4M duty=50"))?;
    vm.pulse.wait_online(2)?;
    Console::open(&vm)?.ask("ping", "pong")?;
    vm.must_move(Release::Current)?;
    unchanged(vm, 1)
}

#[test]
fn a_full_disk_costs_the_log_and_not_the_guest() -> anyhow::Result<()> {
    needs_kvm!();
    let (dir, own) = fresh()?;
    std::fs::create_dir(&own)?;
    std::fs::set_permissions(&own, PermissionsExt::from_mode(0o700))?;
    symlink("/dev/full", own.join("console.log"))?;
    let mut vm = Vm::boot_in(dir, &Recipe::pulse(2, "mode1=pio ram=4M gap_us=300"))?;
    vm.pulse.wait_online(2)?;
    for _ in 0..3 {
        vm.must_move(Release::Current)?;
        vm.is_well()?;
    }
    Console::open(&vm)?.wait("pio 1 ", 1)?;
    unchanged(vm, 3)
}

// The control socket.

fn guest() -> anyhow::Result<Vm> {
    Vm::up(&Recipe::pulse(2, "ram=4M duty=50"))
}

/// The guest is as it was after `swaps` swaps; a good one still moves it.
fn unchanged(mut vm: Vm, swaps: u64) -> anyhow::Result<()> {
    let owner = match swaps {
        0 => Owner::Held(Epoch(0)),
        n => Owner::Taken(Epoch(n)),
    };
    ensure!(vm.owner()? == owner, "the word says {:?}", vm.owner()?);
    vm.is_well()?;
    vm.must_move(Release::Current)?;
    vm.is_well()?;
    vm.power_off()
}

fn refused(outcome: Result<Handover, ClientError>, code: &str, word: &str) -> anyhow::Result<()> {
    match outcome {
        Err(ClientError::Refused { code: c, message }) => {
            ensure!(c == code && message.contains(word), "{c}: {message}");
            Ok(())
        }
        other => bail!("not refused: {other:?}"),
    }
}

/// Sends a packet as it is, and gives the answer.
fn say(vm: &Vm, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> anyhow::Result<(String, String)> {
    let client = vm.client()?;
    frame::send(&client, bytes, fds)?;
    match frame::receive_json(&client)?.0 {
        Reply::Error { code, message } => Ok((code, message)),
        other => bail!("answered: {other:?}"),
    }
}

#[test]
fn requests_that_are_none() -> anyhow::Result<()> {
    needs_kvm!();
    let vm = guest()?;
    for bytes in [
        &b"{"[..],
        b"{}",
        br#"{"request":"dance"}"#,
        br#"{"request":"hand_over"}"#,
    ] {
        let (code, message) = say(&vm, bytes, &[])?;
        ensure!(code == "bad_request", "{code}: {message}");
    }
    unchanged(vm, 0)
}

#[test]
fn a_handover_with_other_fds_than_two() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let successor = vm.start_successor(Release::Current)?;
    let request = serde_json::to_vec(&successor.request(&Terms::default())?)?;
    let fd = successor.state.as_fd();
    for fds in [&[][..], &[fd], &[fd, fd, fd]] {
        let (code, message) = say(&vm, &request, fds)?;
        let count = format!("this one with {}", fds.len());
        ensure!(
            code == "bad_request" && message.contains(&count),
            "{code}: {message}"
        );
    }
    drop(successor);
    unchanged(vm, 0)
}

#[test]
fn a_budget_out_of_range() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    for budget in [Duration::ZERO, Duration::from_secs(31)] {
        let mut successor = vm.start_successor(Release::Current)?;
        let outcome = successor.ask(&vm.client()?, &Terms::budget(budget), |_| {})?;
        refused(outcome, "bad_request", "not more than 0 and at most 30 s")?;
    }
    unchanged(vm, 0)
}

/// A handover with something else in place of the saved state's memfd must be kept.
fn kept_with_state(mut vm: Vm, state: impl AsFd, word: &str) -> anyhow::Result<()> {
    let mut successor = vm.start_successor(Release::Current)?;
    successor.state = state.as_fd().try_clone_to_owned()?;
    match successor.ask(&vm.client()?, &Terms::default(), |_| {})?? {
        Handover::Moved => bail!("moved"),
        Handover::Kept { report } => {
            let reason = report.reason.unwrap_or_default();
            ensure!(reason.contains(word), "{reason}");
        }
    }
    unchanged(vm, 0)
}

#[test]
fn a_memfd_that_cannot_be_sealed() -> anyhow::Result<()> {
    needs_kvm!();
    let state = rustix::fs::memfd_create("unsealable", MemfdFlags::CLOEXEC)?;
    kept_with_state(guest()?, state, "cannot write the saved state")
}

#[test]
fn a_memfd_that_is_sealed_already() -> anyhow::Result<()> {
    needs_kvm!();
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let state = rustix::fs::memfd_create("sealed", flags)?;
    rustix::fs::fcntl_add_seals(&state, SealFlags::WRITE | SealFlags::GROW)?;
    kept_with_state(guest()?, state, "cannot write the saved state")
}

#[test]
fn a_handover_to_something_else_than_a_successor() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let mut successor = vm.start_successor(Release::Current)?;
    // The end of a pipe, in place of a socket.
    successor.socket = Some(std::io::pipe()?.1.into());
    match successor.ask(&vm.client()?, &Terms::default(), |_| {})?? {
        Handover::Moved => bail!("moved"),
        Handover::Kept { report } => {
            let reason = report.reason.unwrap_or_default();
            ensure!(reason.contains("offering the guest"), "{reason}");
        }
    }
    drop(successor);
    unchanged(vm, 0)
}

/// What a second handover is told while the first is under way.
fn second(vm: &mut Vm, first: &mut Successor, terms: &Terms) -> anyhow::Result<()> {
    let mut second = vm.start_successor(Release::Current)?;
    let (client, onlooker) = (vm.client()?, vm.onlooker()?);
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| first.ask(&client, terms, |_| {}));
        wait_swapping(&onlooker)?;
        let outcome = second.ask(&onlooker, &Terms::default(), |_| {})?;
        refused(outcome, "busy", "is being swapped")?;
        match onlooker.power_off() {
            Err(ClientError::Refused { code, .. }) if code == "busy" => {}
            other => bail!("power off: {other:?}"),
        }
        let first = asked.join().map_err(|_| anyhow!("panicked"))???;
        ensure!(matches!(first, Handover::Kept { .. }), "{first:?}");
        Ok(())
    })
}

#[test]
fn a_second_handover_while_one_runs() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let mut first = vm.start_successor(Release::Faulty("adopt=hang"))?;
    let terms = Terms {
        brownout: Duration::from_secs(2),
        ..Terms::default()
    };
    second(&mut vm, &mut first, &terms)?;
    unchanged(vm, 0)
}

#[test]
fn a_handover_of_a_stopped_guest() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let mut successor = vm.start_successor(Release::Current)?;
    let client = vm.onlooker()?;
    client.power_off()?;
    ensure!(vm.wait_end()?.success(), "{}", vm.log());
    match successor.ask(&client, &Terms::default(), |_| {})? {
        Err(ClientError::Frame(_)) => {}
        other => bail!("a stopped guest says {other:?}"),
    }
    let Err(error) = vm.client() else {
        bail!("somebody answers");
    };
    let text = format!("{error:#}");
    ensure!(text.contains("no VMM answers"), "{text}");
    ensure!(!successor.wait_end()?.success(), "the successor ended well");
    Ok(())
}

#[test]
fn fds_that_nobody_asked_for() -> anyhow::Result<()> {
    needs_kvm!();
    let vm = guest()?;
    // Fds that come with a request that wants none are closed, and change nothing.
    let client = vm.client()?;
    let (fd, _other) = std::io::pipe()?;
    frame::send_json(&client, &Request::Describe, &[fd.as_fd(), fd.as_fd()])?;
    match frame::receive_json::<Reply>(&client)?.0 {
        Reply::Description(_) => unchanged(vm, 0),
        other => bail!("answered: {other:?}"),
    }
}

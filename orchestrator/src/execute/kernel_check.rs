//! Whether a swap of the host's kernel would work, as far as it can be told without one: everything that
//! can fail is looked at while guests run, as there is no way back after the jump.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use stillpoint_control::clock::Policy;
use stillpoint_control::spec::Survive;

use super::Host;
use super::start::verified;
use crate::agent::kexec;
use crate::agent::next_kernel::{self, Found};
use crate::doctor::{Check, Status};
use crate::model::{
    HostSwap, KernelJump, VmRecord, VmState, Wanted, bad_command_line, forgets_live_update,
    forgets_memory, with_nonce,
};
use crate::store::StoreError;

mod live_update;
mod rehearsal;

pub(super) use live_update::memfds;
pub(super) use rehearsal::rehearse_parts;
pub use rehearsal::{LookAtJump, rehearsals};

/// What can be swapped under a guest, and why not the rest.
pub fn rungs(host: &Host, vm: &VmRecord) -> Vec<Check> {
    vec![
        Check::ok("vmm", "its RAM and files are handed to the successor"),
        kvm_rung(vm),
        kernel_rung(host, vm),
    ]
}

fn kvm_rung(vm: &VmRecord) -> Check {
    const NAME: &str = "kvm";
    match vm.spec.clock.policy {
        Policy::Advance => Check::ok(NAME, "its VMM lets go of KVM, and is rebuilt in its place"),
        Policy::Hold => Check::new(
            NAME,
            Status::Fail,
            "its clock policy is hold, which a pause in its place does not keep",
            "swap its VMM instead, or start it anew with `--clock advance`",
        ),
    }
}

fn kernel_rung(host: &Host, vm: &VmRecord) -> Check {
    const NAME: &str = "kernel";
    let fail = |found: &str, remedy: &str| Check::new(NAME, Status::Fail, found, remedy);
    let Some(at) = &vm.spec.memory.carve_out else {
        return fail(
            "its RAM is a memfd, which ends with the kernel",
            "start it with `--survive kernel`, which needs a carve-out or a kernel with live update \
             (`stillpoint host prepare`)",
        );
    };
    if at.is_memfd() != host.carve_out.is_live_update() {
        let path = at.path.display();
        let found = match host.carve_out.path() {
            Some(ours) => format!(
                "it counts on {path}, and this host's guests on {}",
                ours.display()
            ),
            None => format!("it counts on {path}, which this daemon does not use"),
        };
        return fail(&found, "stop it and start it anew");
    }
    if at.is_memfd() {
        return Check::ok(NAME, "its RAM is a memfd that live update keeps");
    }
    if let Some(why) = host.carve_out.is_lost_by_kexec() {
        return fail(
            &why,
            "give the daemon a device-dax (`stillpoint host prepare`)",
        );
    }
    match host.carve_out.directory() {
        Ok(directory) if directory.entry(vm.name.as_str()).is_some() => {
            let found = format!("its RAM lies in {} at {:#x}", at.path.display(), at.ram);
            Check::ok(NAME, found)
        }
        Ok(_) => fail(
            "it is not in the carve-out's directory",
            "stop it and start it anew",
        ),
        Err(why) => fail(&why, "see `stillpoint adopt`"),
    }
}

/// All of it; that the kernel can be loaded is shown by loading it, and it is forgotten again.
pub async fn checks(
    host: &Host,
    jump: &KernelJump,
    budget_ns: u64,
) -> Result<Vec<Check>, StoreError> {
    let mut checks = vec![
        match host.carve_out.is_live_update() {
            true => live_update::room(host).await?,
            false => carve_out(host),
        },
        kexec_known(),
        command_line(jump, host.carve_out.is_live_update()),
        modules(jump, !host.carve_out.is_live_update()).await,
        time(&host.store.host_swaps().await?, budget_ns),
    ];
    checks.push(Check::ok("wall clock", "carried over by the TSC"));
    if host.carve_out.is_live_update() {
        checks.push(live_update::next_kernel(jump));
    }
    let vms = host.store.vms().await?;
    let active = || vms.iter().filter(|vm| vm.state.is_active());
    checks.extend(releases(host, active()).await?);
    checks.extend(active().map(|vm| guest(host, vm)));
    // Last, and only if all else is well: it takes its time.
    if checks.iter().all(|check| check.status != Status::Fail) {
        checks.push(image(jump).await);
    }
    Ok(checks)
}

fn carve_out(host: &Host) -> Check {
    const NAME: &str = "carve-out";
    let remedy = "`stillpoint host prepare` says what is missing";
    let fail = |found: String| Check::new(NAME, Status::Fail, found, remedy);
    let directory = match host.carve_out.directory() {
        Ok(directory) => directory,
        Err(why) => return fail(why),
    };
    if let Some(why) = host.carve_out.is_lost_by_kexec() {
        return fail(why);
    }
    let path = host.carve_out.path().unwrap_or(Path::new(""));
    let (free, size) = (directory.free() >> 20, directory.size >> 20);
    let found = format!("{}: {free} of {size} MiB free", path.display());
    Check::ok(NAME, found)
}

fn kexec_known() -> Check {
    const NAME: &str = "kexec";
    match kexec::is_known() {
        Ok(()) => Check::ok(NAME, "this kernel can load another"),
        Err(why) => Check::new(NAME, Status::Fail, why, "boot one that can"),
    }
}

fn command_line(jump: &KernelJump, is_live_update: bool) -> Check {
    const NAME: &str = "command line";
    let line = with_nonce(&jump.command_line, &jump.nonce);
    let running = kexec::command_line();
    let forgets = |line: &str| match is_live_update {
        true => forgets_live_update(&running, line),
        false => None,
    };
    let problem = bad_command_line(&line)
        .or_else(|| forgets_memory(&running, &line))
        .or_else(|| forgets(&line));
    match problem {
        None => Check::ok(NAME, jump.command_line.clone()),
        Some(why) => Check::new(
            NAME,
            Status::Fail,
            why,
            "`--reuse-cmdline` takes the running kernel's",
        ),
    }
}

/// What the next kernel needs for guests to be revived.
async fn modules(jump: &KernelJump, carve_out: bool) -> Check {
    const NAME: &str = "modules";
    let (image, initrd) = (jump.image.clone(), jump.initrd.clone());
    let looked = move || next_kernel::look(&image, initrd.as_deref(), carve_out);
    match tokio::task::spawn_blocking(looked).await {
        Ok(Found::There(found)) => Check::ok(NAME, found),
        Ok(Found::Missing { release, modules }) => Check::new(
            NAME,
            Status::Fail,
            format!(
                "kernel {release} finds no {}: its guests would not be revived",
                modules.join(", ")
            ),
            "install the package with that kernel's modules, or put them into its initial RAM disk",
        ),
        Ok(Found::Unknown(why)) => Check::new(
            NAME,
            Status::Warn,
            format!("whether it finds what guests need can't be told: {why}"),
            "see that the next kernel's user space loads the modules of the carve-out and of KVM",
        ),
        Err(error) => Check::new(NAME, Status::Warn, error.to_string(), "ask again"),
    }
}

/// How long it will take, by the last that arrived.
fn time(swaps: &[HostSwap], budget_ns: u64) -> Check {
    const NAME: &str = "time";
    let budget = Duration::from_nanos(budget_ns);
    let arrived = |swap: &&HostSwap| {
        let kernel = swap.kernel.as_ref();
        swap.pause_ns.is_some() && kernel.is_some_and(|kernel| kernel.to.is_some())
    };
    let newest = swaps
        .iter()
        .filter(arrived)
        .max_by_key(|swap| swap.asked_at_unix_ns);
    let Some((swap, pause)) = newest.and_then(|swap| Some((swap, swap.pause_ns?))) else {
        return Check::new(
            NAME,
            Status::Warn,
            format!(
                "not known, as no kernel was swapped on this host yet; the budget is {budget:?}"
            ),
            "a first one, with guests that can bear it, shows it",
        );
    };
    let phases = swap.kernel.iter().flat_map(|kernel| &kernel.phases);
    let phases = phases.filter(|phase| phase.in_blackout).map(|phase| {
        let took = Duration::from_nanos(phase.duration_ns).as_secs_f64();
        format!("{} {took:.2} s", phase.name)
    });
    let phases: Vec<_> = phases.collect();
    let found = format!(
        "{:.1} s the last time ({}), of a budget of {budget:?}: {}",
        Duration::from_nanos(pause).as_secs_f64(),
        swap.id,
        phases.join(", ")
    );
    match pause <= budget_ns {
        true => Check::ok(NAME, found),
        false => Check::new(
            NAME,
            Status::Warn,
            found,
            "after the jump a budget is a figure: give a larger one, or a kernel that starts faster",
        ),
    }
}

/// Whether the releases that run the guests can do so after the jump: their VMMs are started anew.
async fn releases(
    host: &Host,
    vms: impl Iterator<Item = &VmRecord>,
) -> Result<Vec<Check>, StoreError> {
    let versions: BTreeSet<_> = vms.map(|vm| vm.release.as_str()).collect();
    let mut checks = Vec::with_capacity(versions.len());
    for version in versions {
        let name = format!("release {version}");
        let found = match host.store.release(version).await? {
            Some(release) => verified(host, &release).await.map(drop),
            None => Err("it is not in the store".into()),
        };
        checks.push(match found {
            Ok(()) => Check::ok(&name, "its digest is what was added"),
            Err(why) => Check::new(
                &name,
                Status::Fail,
                format!("{why}: its guests would not be revived"),
                "swap them to another release before (`stillpoint swap vmm`)",
            ),
        });
    }
    Ok(checks)
}

fn guest(host: &Host, vm: &VmRecord) -> Check {
    let name = format!("guest {}", vm.name);
    if vm.state != VmState::Running || vm.wanted != Wanted::Running {
        let found = format!("it is {}", vm.state);
        return Check::new(
            &name,
            Status::Fail,
            found,
            "ask again when it is running, or stopped",
        );
    }
    let rung = kernel_rung(host, vm);
    let remedy = match vm.spec.memory.survive {
        Survive::Vmm => "stop it before, or start it anew with `--survive kernel`",
        Survive::Kernel => rung.remedy.as_str(),
    };
    Check::new(
        &name,
        rung.status,
        rung.found,
        match rung.status {
            Status::Ok => "",
            _ => remedy,
        },
    )
}

async fn image(jump: &KernelJump) -> Check {
    const NAME: &str = "image";
    let line = with_nonce(&jump.command_line, &jump.nonce);
    let (image, initrd) = (jump.image.clone(), jump.initrd.clone());
    let tried = tokio::task::spawn_blocking(move || {
        let began = std::time::Instant::now();
        let loaded = kexec::load(&image, initrd.as_deref(), &line).map(|()| began.elapsed());
        kexec::unload();
        loaded.map_err(|e| e.to_string())
    });
    match tried.await.map_err(|e| e.to_string()).and_then(|done| done) {
        Ok(took) => Check::ok(
            NAME,
            format!(
                "{} was loaded in {took:?}, and forgotten again",
                jump.image.display()
            ),
        ),
        Err(why) => Check::new(NAME, Status::Fail, why, "give a kernel that this one loads"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::execute::kernel::phase;
    use crate::model::{Share, SwapId};

    fn swap(at: u64, pause_s: Option<u64>, to: Option<&str>) -> HostSwap {
        let kernel = KernelJump {
            image: "/k".into(),
            initrd: None,
            command_line: String::new(),
            nonce: "n".into(),
            from: "1".into(),
            to: to.map(str::to_owned),
            rehearse: true,
            phases: vec![
                phase("load", Share::Ours, false, Duration::from_secs(3)),
                phase("kernel", Share::Kernel, true, Duration::from_millis(1500)),
            ],
            clock: None,
        };
        HostSwap {
            kernel: Some(kernel),
            pause_ns: pause_s.map(|s| s * 1_000_000_000),
            ..HostSwap::wanted(SwapId(at.to_string()), Vec::new(), 0, at)
        }
    }

    #[test]
    fn the_time_is_that_of_the_last_that_arrived() {
        const BUDGET: u64 = 30_000_000_000;
        let never = time(&[swap(9, None, None)], BUDGET);
        assert!(
            never.status == Status::Warn && never.found.contains("not known"),
            "{never:?}"
        );
        let swaps = [
            swap(2, Some(12), Some("2")),
            swap(1, Some(50), Some("2")),
            // It was called off: what its guests stood still tells nothing of a jump.
            swap(3, Some(1), None),
        ];
        let known = time(&swaps, BUDGET);
        assert_eq!(known.status, Status::Ok);
        assert!(
            known.found.starts_with("12.0 s the last time (2)"),
            "{known:?}"
        );
        assert!(known.found.ends_with(": kernel 1.50 s"), "{known:?}");
        let over = time(&swaps, BUDGET / 3);
        assert!(
            over.status == Status::Warn && over.remedy.contains("larger"),
            "{over:?}"
        );
    }
}

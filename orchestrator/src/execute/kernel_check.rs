//! Whether a swap of the host's kernel would work, as far as it can be told without one: everything that
//! can fail is looked at while guests run, as there is no way back after the jump.

use std::path::Path;

use stillpoint_control::clock::Policy;
use stillpoint_control::spec::Survive;

use super::Host;
use crate::agent::kexec;
use crate::doctor::{Check, Status};
use crate::model::{
    KernelJump, VmRecord, VmState, Wanted, bad_command_line, forgets_memory, with_nonce,
};
use crate::store::StoreError;

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
            "start it with `--survive kernel`, which needs a carve-out (`stillpoint host prepare`)",
        );
    };
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
pub async fn checks(host: &Host, jump: &KernelJump) -> Result<Vec<Check>, StoreError> {
    let mut checks = vec![carve_out(host), kexec_known(), command_line(jump)];
    checks.push(Check::ok("wall clock", "carried over by the TSC"));
    let vms = host.store.vms().await?;
    let active = vms.iter().filter(|vm| vm.state.is_active());
    checks.extend(active.map(|vm| guest(host, vm)));
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

fn command_line(jump: &KernelJump) -> Check {
    const NAME: &str = "command line";
    let line = with_nonce(&jump.command_line, &jump.nonce);
    let problem = bad_command_line(&line).or_else(|| forgets_memory(&kexec::command_line(), &line));
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

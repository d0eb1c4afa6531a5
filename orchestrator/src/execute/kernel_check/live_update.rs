//! What of a jump depends on live update: memory to preserve the guests', and a next kernel that has it.

use std::path::{Path, PathBuf};

use crate::agent::carve_out::{Guest, Room};
use crate::agent::next_kernel;
use crate::doctor::{Check, Status};
use crate::execute::Host;
use crate::model::{KernelJump, VmRecord};
use crate::store::StoreError;

/// What a kernel must be configured with.
const WANTED: [&str; 3] = [
    "CONFIG_KEXEC_HANDOVER",
    "CONFIG_LIVEUPDATE",
    "CONFIG_LIVEUPDATE_MEMFD",
];

/// The memfds of guests that run.
pub(in crate::execute) async fn memfds(
    host: &Host,
    vms: &[&VmRecord],
) -> Result<Vec<Guest>, String> {
    let mut guests = Vec::with_capacity(vms.len());
    for vm in vms {
        let held = host.expected(vm).find().await.map_err(|e| e.to_string())?;
        let place = vm.spec.memory.carve_out.clone();
        guests.push(Guest {
            vm: vm.name.to_string(),
            place: place
                .ok_or_else(|| format!("`{}` was started without `--survive kernel`", vm.name))?,
            memory: held.memory,
        });
    }
    Ok(guests)
}

/// Whether all guests' memory can be preserved.
pub(super) async fn room(host: &Host) -> Result<Check, StoreError> {
    const NAME: &str = "live update";
    let fail = |found: String, remedy: &str| Check::new(NAME, Status::Fail, found, remedy);
    if let Some(why) = host.carve_out.waits() {
        return Ok(fail(why, "do either before"));
    }
    let vms = host.store.vms().await?;
    let kept = |vm: &&VmRecord| {
        let at = vm.spec.memory.carve_out.as_ref();
        vm.state.is_active() && at.is_some_and(|at| at.is_memfd())
    };
    let vms: Vec<_> = vms.iter().filter(kept).collect();
    let room = match memfds(host, &vms).await {
        Ok(guests) => Room::of(&guests),
        Err(why) => Err(why),
    };
    Ok(match room {
        Ok(room) => judged(room),
        Err(why) => fail(why, "ask again when every guest answers"),
    })
}

fn judged(room: Room) -> Check {
    const NAME: &str = "live update";
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let found = format!(
        "preserving the guests' {} MiB takes {} MiB more than they have, and {} MiB are available",
        mib(room.size),
        mib(room.needed),
        room.available >> 20
    );
    match room.is_enough() {
        true => Check::ok(NAME, found),
        false => Check::new(
            NAME,
            Status::Fail,
            found,
            "every page of a guest that it never used is made when it is preserved: stop a guest, or free memory",
        ),
    }
}

/// Whether the next kernel has live update, as far as it can be told of one that doesn't run.
pub(super) fn next_kernel(jump: &KernelJump) -> Check {
    let release = next_kernel::release(&jump.image);
    let beside = jump.image.parent().unwrap_or(Path::new("/boot"));
    judge_next(&jump.from, release.as_deref(), |release| {
        let places = [
            beside.join(format!("config-{release}")),
            PathBuf::from(format!("/boot/config-{release}")),
            PathBuf::from(format!("/lib/modules/{release}/config")),
        ];
        places
            .into_iter()
            .find_map(|path| std::fs::read_to_string(path).ok())
    })
}

fn judge_next(
    running: &str,
    next: Option<&str>,
    config_of: impl Fn(&str) -> Option<String>,
) -> Check {
    const NAME: &str = "next kernel";
    let warn = |found: String, remedy: &str| Check::new(NAME, Status::Warn, found, remedy);
    let Some(next) = next else {
        let found = "its image does not say which kernel it is".to_owned();
        return warn(
            found,
            "see that it has live update: without it every guest is lost",
        );
    };
    if next == running {
        return Check::ok(NAME, format!("{next}, which runs now and has live update"));
    }
    let Some(config) = config_of(next) else {
        let found = format!(
            "{next}: whether it has live update can't be told, as there is no config-{next}"
        );
        return warn(found, "see that it has: without it every guest is lost");
    };
    let set = |option: &&str| config.lines().any(|line| line == format!("{option}=y"));
    let missing: Vec<_> = WANTED.into_iter().filter(|option| !set(option)).collect();
    if !missing.is_empty() {
        return Check::new(
            NAME,
            Status::Fail,
            format!(
                "{next} is built without {}: every guest would be lost",
                missing.join(", ")
            ),
            "give a kernel that has them",
        );
    }
    warn(
        format!("{next} has live update; kernels promise it to the same release alone"),
        "a first jump between these two, with guests that can bear it, shows whether they agree",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_would_lose_the_guests_is_refused() {
        let none = |_: &str| None;
        assert_eq!(judge_next("7.3-a", Some("7.3-a"), none).status, Status::Ok);
        let unknown = judge_next("7.3-a", Some("7.4"), none);
        assert_eq!(unknown.status, Status::Warn);
        assert!(unknown.found.contains("config-7.4"), "{unknown:?}");
        assert_eq!(judge_next("7.3-a", None, none).status, Status::Warn);
        let without =
            |_: &str| Some("CONFIG_LIVEUPDATE=y\n# CONFIG_KEXEC_HANDOVER is not set\n".into());
        let refused = judge_next("7.3-a", Some("7.4"), without);
        assert_eq!(refused.status, Status::Fail);
        assert!(
            refused.found.contains("CONFIG_KEXEC_HANDOVER, "),
            "{refused:?}"
        );
        let with = |_: &str| Some(WANTED.map(|option| format!("{option}=y\n")).concat());
        assert_eq!(judge_next("7.3-a", Some("7.4"), with).status, Status::Warn);
    }

    #[test]
    fn memory_that_does_not_suffice_is_told_in_figures() {
        let room = Room {
            size: 64 << 20,
            needed: 30 << 20,
            available: 30 << 20,
        };
        assert_eq!(judged(room).status, Status::Ok);
        let short = judged(Room {
            needed: (30 << 20) + 1,
            ..room
        });
        assert_eq!(short.status, Status::Fail);
        assert!(short.found.contains("takes 31 MiB more"), "{short:?}");
    }
}

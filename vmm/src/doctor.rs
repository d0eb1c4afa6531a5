//! What this host's KVM can and can't do, with the remedy.

mod ring0;

use std::time::Instant;

use kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::Serialize;

use crate::{clock, raw};

/// The check that tells whether this KVM is hardware; the demo goes by its status.
pub const RING_0: &str = "guest kernel speed";

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Works, at a cost the finding names.
    Warn,
    /// Does not work.
    Fail,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How it is.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do, and what it costs not to; empty when all is well.
    pub remedy: String,
}

fn finding(check: &'static str, good: bool, bad: Status, found: String, remedy: &str) -> Finding {
    let status = if good { Status::Ok } else { bad };
    let remedy = if good {
        String::new()
    } else {
        remedy.to_owned()
    };
    Finding {
        check,
        status,
        found,
        remedy,
    }
}

/// Looks at /dev/kvm.
pub fn examine() -> Vec<Finding> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            let remedy = match error.errno() {
                libc::ENOENT => "load kvm_intel or kvm_amd, or enable nested virtualization",
                libc::EACCES | libc::EPERM => "give this user the right to /dev/kvm",
                _ => "enable virtualization in the firmware; look at the kernel's log",
            };
            return vec![finding(
                "/dev/kvm",
                false,
                Status::Fail,
                error.to_string(),
                remedy,
            )];
        }
    };
    let mut findings = vec![finding(
        "/dev/kvm",
        kvm.get_api_version() == 12,
        Status::Fail,
        format!("API version {}", kvm.get_api_version()),
        "this kernel's KVM is none that Stillpoint knows",
    )];
    findings.extend(capabilities(&kvm));
    findings.extend(machine(&kvm));
    findings
}

fn capabilities(kvm: &Kvm) -> Vec<Finding> {
    let needed = [
        ("in-kernel interrupt controllers", Cap::Irqchip),
        ("irqfd", Cap::Irqfd),
        ("PIT", Cap::Pit2),
        ("user memory", Cap::UserMemory),
        ("adjustable clock", Cap::AdjustClock),
        ("MP state", Cap::MpState),
        ("vCPU events", Cap::VcpuEvents),
        ("XSAVE", Cap::Xsave),
        ("debug registers", Cap::Debugregs),
    ];
    let wished = [
        (
            "TSC deadline timer",
            Cap::TscDeadlineTimer,
            "guests use slower timers",
        ),
        (
            "TSC scaling",
            Cap::TscControl,
            "guests stay on hosts of one TSC frequency",
        ),
    ];
    let remedy = "use a kernel of 5.4 or later with the KVM module of this processor";
    let must = needed.into_iter().map(|(check, cap)| {
        let there = kvm.check_extension(cap);
        finding(check, there, Status::Fail, yes_no(there), remedy)
    });
    let may = wished.into_iter().map(|(check, cap, cost)| {
        let there = kvm.check_extension(cap);
        finding(check, there, Status::Warn, yes_no(there), cost)
    });
    let fills = kvm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) > 0;
    let fills = finding(
        "page tables filled beforehand",
        fills,
        Status::Warn,
        yes_no(fills),
        "a guest faults its RAM in anew after a swap, where the processor walks second-level page tables; Linux 6.11 can \
         fill them before it (KVM_CAP_PRE_FAULT_MEMORY)",
    );
    must.chain(may).chain([fills]).collect()
}

fn yes_no(there: bool) -> String {
    if there {
        "there".into()
    } else {
        "not there".into()
    }
}

/// What only a virtual machine shows.
fn machine(kvm: &Kvm) -> Vec<Finding> {
    let began = Instant::now();
    let vcpu = kvm
        .create_vm()
        .and_then(|vm| vm.create_irq_chip().map(|()| vm))
        .and_then(|vm| {
            let vcpu = vm.create_vcpu(0)?;
            Ok((vm, vcpu))
        });
    let (vm, mut vcpu) = match vcpu {
        Ok(both) => both,
        Err(error) => {
            let remedy = "another hypervisor may hold the processor; look at the kernel's log";
            return vec![finding(
                "virtual machine",
                false,
                Status::Fail,
                error.to_string(),
                remedy,
            )];
        }
    };
    let took = began.elapsed();
    let mut findings = vec![finding(
        "virtual machine",
        true,
        Status::Fail,
        format!("made in {took:.1?}"),
        "",
    )];
    let offsets = raw::moves_tsc(&vcpu);
    findings.push(finding(
        "TSC offset",
        offsets,
        Status::Warn,
        if offsets {
            "kept, exact to the cycle".into()
        } else {
            "ignored by this KVM".into()
        },
        "guests see the host's TSC: clocks can advance over a pause, not hold; a software KVM, \
         or a kernel before 5.16",
    ));
    let master = clock::settle_masterclock(&vm).is_ok()
        && vm
            .get_clock()
            .is_ok_and(|data| clock::is_master(data.flags));
    findings.push(finding(
        "masterclock",
        master,
        Status::Warn,
        if master { "on".into() } else { "off".into() },
        "kvmclock is carried over to microseconds, not nanoseconds: the host's clocksource must \
         be tsc (/sys/devices/system/clocksource/clocksource0/current_clocksource)",
    ));
    findings.push(speed(&vm, &mut vcpu));
    findings
}

fn speed(vm: &VmFd, vcpu: &mut VcpuFd) -> Finding {
    let rate = ring0::instructions_per_second(vm, vcpu);
    finding(
        RING_0,
        rate.as_ref().is_ok_and(|&rate| rate >= ring0::HARDWARE),
        Status::Warn,
        match rate {
            Ok(rate) => format!("{:.0} million instructions a second", rate / 1e6),
            Err(error) => error,
        },
        "this KVM emulates the guest's kernel: Linux takes minutes to boot; guests that work in \
         ring 3, as pulse does, run at full speed",
    )
}

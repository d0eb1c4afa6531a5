//! vCPUs of a new machine, in the one order that keeps its clock ([`crate::clock`]): the TSC of the
//! first is put where it is to be, then the masterclock is begun, and the others follow.

use kvm_bindings::{KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_cpuid_entry2, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use stillpoint_control::spec::MachineSpec;
use stillpoint_state::StateError;

use super::build::{BuildError, kvm};
use crate::boot::cpuid;
use crate::{clock, raw};

/// Kernels refuse a calibration that is off by more than one part in so many of an earlier one
/// (`tsc_refine_calibration_work`).
const CALIBRATION: u32 = 100;

/// What a machine's guest was promised at its boot and keeps for its life.
#[derive(Clone, Debug, Default)]
pub struct Promise {
    /// CPUID entries; made from the host's for a cold boot.
    pub cpuid: Option<Vec<kvm_cpuid_entry2>>,
    /// TSC frequency, kHz.
    pub tsc_khz: Option<u32>,
    /// TSC offset of vCPU 0, cycles.
    pub tsc_offset: Option<i64>,
    /// Its clocks are to leave out a pause.
    pub hold: bool,
}

/// Has KVM refuse performance counters that CPUID does not tell of: AMD's oldest are there without
/// a word. Before any vCPU is made.
pub(super) fn withhold_counters(vm: &VmFd) {
    let off = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        args: [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0],
        ..Default::default()
    };
    // A kernel without the capability (before 5.18) leaves them to a guest that looks for them;
    // their MSRs are in KVM's list, and saved.
    let _ = vm.enable_cap(&off);
}

/// Their fds, what CPUID they tell, and the frequency of their TSC, kHz.
type Vcpus = (Vec<VcpuFd>, Vec<kvm_cpuid_entry2>, u32);

/// The frequency to ask KVM for; the host's own is none to ask for.
///
/// Each kernel calibrates the TSC anew, so after a jump into another it has another figure, and still the same speed.
/// To ask a KVM that can't scale for the figure of before would have it refuse, or "catch up" by moving the guest's
/// TSC (x86.c, `set_tsc_khz`). Beyond what calibrations differ by it is another speed, and no clock of the guest's
/// would be right.
fn frequency(promised: u32, host: u32, scales: bool) -> Result<u32, BuildError> {
    let is_calibrated_anew = promised.abs_diff(host) <= host / CALIBRATION;
    match (scales, is_calibrated_anew) {
        (true, _) => Ok(promised),
        (false, true) => Ok(host),
        (false, false) => Err(BuildError::TscFrequency { promised, host }),
    }
}

/// Makes the vCPUs of a machine that has none, as far as they can be without their state.
pub(super) fn make(
    kvm_fd: &Kvm,
    vm: &VmFd,
    spec: &MachineSpec,
    promise: Promise,
) -> Result<Vcpus, BuildError> {
    let mut fds = Vec::with_capacity(spec.cpus.into());
    let first = vm.create_vcpu(0).map_err(kvm("create vCPU 0"))?;
    let host_khz = first.get_tsc_khz().map_err(kvm("tell the TSC frequency"))?;
    let promised = promise.tsc_khz.unwrap_or(host_khz);
    let scales = kvm_fd.check_extension(Cap::TscControl);
    let tsc_khz = frequency(promised, host_khz, scales)?;
    if tsc_khz != host_khz {
        first
            .set_tsc_khz(tsc_khz)
            .map_err(kvm("set the TSC frequency"))?;
    }
    if promise.hold && !raw::moves_tsc(&first) {
        return Err(BuildError::Hold);
    }
    if let Some(offset) = promise.tsc_offset.filter(|_| raw::has_tsc_offset(&first)) {
        // Before the others exist: KVM gives a new vCPU the TSC generation of the machine.
        // A refusal shows again, and is reported, when the saved offset is loaded.
        let _ = raw::set_tsc_offset(&first, offset);
    }
    clock::settle_masterclock(vm).map_err(kvm("set the clock"))?;
    fds.push(first);
    for id in 1..spec.cpus {
        fds.push(vm.create_vcpu(id.into()).map_err(kvm("create a vCPU"))?);
    }
    let cpuid = match promise.cpuid {
        Some(cpuid) => cpuid,
        None => cpuid::host(kvm_fd, spec.cpus, tsc_khz).map_err(kvm("tell its CPUID"))?,
    };
    for (id, fd) in (0..spec.cpus).zip(&fds) {
        let own = cpuid::for_vcpu(&cpuid, id).ok_or(StateError::Value {
            section: "cpuid",
            problem: "more CPUID entries than KVM takes".into(),
        })?;
        fd.set_cpuid2(&own).map_err(kvm("set the CPUID"))?;
    }
    Ok((fds, cpuid, tsc_khz))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_calibration_is_the_same_counter_and_another_speed_is_not() {
        let at = |promised, scales| frequency(promised, 2_000_000, scales).ok();
        assert_eq!(at(2_000_000, false), Some(2_000_000));
        assert_eq!(at(2_019_999, false), Some(2_000_000), "calibrated anew");
        assert_eq!(at(2_019_999, true), Some(2_019_999), "scaled");
        assert_eq!(at(1_900_000, true), Some(1_900_000));
        for other in [1_900_000, 2_100_000] {
            let error = frequency(other, 2_000_000, false)
                .expect_err("another speed")
                .to_string();
            assert!(
                error.contains(&other.to_string()) && error.contains("2000000 kHz"),
                "{error}"
            );
        }
    }
}

//! Every kind of section, oldest fields first. Read the rules in the crate's documentation
//! before changing anything here.

mod virtio;

use prost::Message;

pub use virtio::{
    VirtioBlk, VirtioMmio, VirtioNet, VirtioQueue, VirtioRng, VirtioVsock, VsockConnection,
    VsockReset, VsockStage,
};

use crate::codec::{Section, StateError};
use crate::contents::{Added, Kind};

/// Formats this code can write and read, newest first.
///
/// * 1: vCPU section version 1 (one message per MSR).
/// * 2: vCPU section version 2 (MSR indices and values packed; a third of the size, and decoded
///   without an allocation for each).
/// * 3: as 2, and virtio devices, vmclock, and clocks that are held.
pub const FORMATS: [u32; 3] = [3, 2, 1];
/// The first format that carries virtio devices, a vmclock device, and `hold` ([`Clock`]).
pub const VIRTIO_FORMAT: u32 = 3;

macro_rules! sections {
    ($($type:ident = $name:literal, version $version:literal
        $(, at most $most:expr)? $(, added $number:literal $field:literal)*;)*) => {
        $(impl Section for $type {
            const NAME: &'static str = $name;
            const VERSION: u32 = $version;
            const MOST: usize = {
                let most = 4 << 10;
                $(let most = if most > $most { most } else { $most };)?
                most
            };
            const ADDED: &'static [Added] = &[$(Added { number: $number, name: $field }),*];
        }

        impl $type {
            /// What a reader must know of such a section.
            pub const KIND: Kind = Kind {
                name: Self::NAME,
                version: Self::VERSION,
                added: Self::ADDED,
            };
        })*

        /// Every kind of section that this build reads.
        pub const KINDS: [Kind; [$($name),*].len()] = [$($type::KIND),*];
    };
}

sections! {
    // XSAVE with AMX tiles has 11 KiB.
    Vcpu = "vcpu", version 2, at most 256 << 10;
    Irqchip = "irqchip", version 1, at most 16 << 10;
    Clock = "clock", version 1;
    Serial = "serial", version 1;
    Probe = "probe", version 1;
    Power = "power", version 2;
    // Output not yet written is bounded to 1 MiB.
    Console = "console", version 1, at most 4 << 20;
    VirtioMmio = "virtio-mmio", version 1, at most 64 << 10;
    VirtioRng = "virtio-rng", version 1;
    VmClock = "vmclock", version 1;
    VirtioBlk = "virtio-blk", version 1;
    // What connections hold is bounded to 16 MiB together.
    VirtioVsock = "virtio-vsock", version 1, at most 32 << 20;
    // A frame for each of up to 64 queues.
    VirtioNet = "virtio-net", version 1, at most 8 << 20;
}

/// One MSR of format 1.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Msr {
    /// Index.
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// Value.
    #[prost(uint64, tag = "2")]
    pub value: u64,
}

/// One vCPU. The `bytes` fields are the kernel's structures of the same name
/// (`arch/x86/include/uapi/asm/kvm.h`), whose layout is kernel ABI.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Vcpu {
    /// `struct kvm_regs`.
    #[prost(bytes = "vec", tag = "1")]
    pub regs: Vec<u8>,
    /// `struct kvm_sregs`.
    #[prost(bytes = "vec", tag = "2")]
    pub sregs: Vec<u8>,
    /// `struct kvm_xsave`, of the size `KVM_CAP_XSAVE2` gave where it was saved.
    #[prost(bytes = "vec", tag = "3")]
    pub xsave: Vec<u8>,
    /// `struct kvm_xcrs`; empty on a host without XSAVE.
    #[prost(bytes = "vec", tag = "4")]
    pub xcrs: Vec<u8>,
    /// `struct kvm_debugregs`.
    #[prost(bytes = "vec", tag = "5")]
    pub debugregs: Vec<u8>,
    /// `struct kvm_vcpu_events`.
    #[prost(bytes = "vec", tag = "6")]
    pub events: Vec<u8>,
    /// `kvm_mp_state.mp_state`.
    #[prost(uint32, tag = "7")]
    pub mp_state: u32,
    /// `struct kvm_lapic_state`. A one-shot timer that has fired is saved disarmed (initial
    /// count 0): KVM_SET_LAPIC would fire it again (lapic.c, `set_target_expiration`).
    #[prost(bytes = "vec", tag = "8")]
    pub lapic: Vec<u8>,
    /// MSRs, format 1.
    #[prost(message, repeated, tag = "9")]
    pub msrs: Vec<Msr>,
    /// `KVM_VCPU_TSC_OFFSET`, cycles; absent where the kernel has no such attribute.
    #[prost(int64, optional, tag = "10")]
    pub tsc_offset: Option<i64>,
    /// `KVM_GET_TSC_KHZ`.
    #[prost(uint32, tag = "11")]
    pub tsc_khz: u32,
    /// Indices of MSRs, format 2.
    #[prost(uint32, repeated, tag = "12")]
    pub msr_indices: Vec<u32>,
    /// Their values, format 2.
    #[prost(fixed64, repeated, tag = "13")]
    pub msr_values: Vec<u64>,
    /// Host TSC when the local APIC was read, so that a running count can be moved on by the
    /// pause. 0: not known, the count goes on from where it stood.
    #[prost(fixed64, tag = "14")]
    pub lapic_tsc: u64,
}

impl Vcpu {
    /// Stores the MSRs the way `format` does; gives the section version to write.
    pub fn set_msrs(&mut self, format: u32, msrs: impl Iterator<Item = (u32, u64)>) -> u32 {
        let version = Self::version(format);
        if version == 1 {
            self.msrs = msrs.map(|(index, value)| Msr { index, value }).collect();
        } else {
            (self.msr_indices, self.msr_values) = msrs.unzip();
        }
        version
    }

    /// The version of the section in `format`.
    pub fn version(format: u32) -> u32 {
        if format == 1 { 1 } else { 2 }
    }

    /// The MSRs, whichever way they were stored.
    pub fn msrs(&self) -> Result<Vec<(u32, u64)>, StateError> {
        if self.msr_indices.len() != self.msr_values.len() {
            return Err(StateError::Value {
                section: Self::NAME,
                problem: "as many MSR indices as values must be there".into(),
            });
        }
        let old = self.msrs.iter().map(|msr| (msr.index, msr.value));
        let new = self
            .msr_indices
            .iter()
            .copied()
            .zip(self.msr_values.iter().copied());
        Ok(old.chain(new).collect())
    }
}

/// The in-kernel interrupt controllers and timer of the machine.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Irqchip {
    /// `struct kvm_irqchip` of the first PIC.
    #[prost(bytes = "vec", tag = "1")]
    pub pic_master: Vec<u8>,
    /// Of the second PIC.
    #[prost(bytes = "vec", tag = "2")]
    pub pic_slave: Vec<u8>,
    /// Of the I/O APIC.
    #[prost(bytes = "vec", tag = "3")]
    pub ioapic: Vec<u8>,
    /// `struct kvm_pit_state2`.
    #[prost(bytes = "vec", tag = "4")]
    pub pit: Vec<u8>,
}

/// The machine's kvmclock at the freeze: `struct kvm_clock_data` taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Clock {
    /// kvmclock, ns.
    #[prost(uint64, tag = "1")]
    pub clock: u64,
    /// `KVM_CLOCK_*` flags that say which of the fields are valid.
    #[prost(uint32, tag = "2")]
    pub flags: u32,
    /// Host `CLOCK_REALTIME` at the same instant, ns.
    #[prost(uint64, tag = "3")]
    pub realtime: u64,
    /// Host TSC at the same instant. Taken by RDTSC next to the call where KVM gave none.
    #[prost(uint64, tag = "4")]
    pub host_tsc: u64,
    /// Rate at which KVM computes kvmclock, kHz.
    #[prost(uint32, tag = "5")]
    pub tsc_khz: u32,
    /// Whether the guest's kvmclock stands still over the pause (`hold`); `advance` otherwise.
    #[prost(bool, tag = "6")]
    pub hold: bool,
}

/// The vmclock device.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct VmClock {
    /// Sequence of its page, at rest.
    #[prost(uint32, tag = "1")]
    pub sequence: u32,
    /// Disruption marker.
    #[prost(uint64, tag = "2")]
    pub marker: u64,
}

/// A 16550 UART.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Serial {
    /// Divisor latch, low byte.
    #[prost(uint32, tag = "1")]
    pub divisor_low: u32,
    /// Divisor latch, high byte.
    #[prost(uint32, tag = "2")]
    pub divisor_high: u32,
    /// Interrupt enable.
    #[prost(uint32, tag = "3")]
    pub interrupt_enable: u32,
    /// Interrupt identification.
    #[prost(uint32, tag = "4")]
    pub interrupt_identification: u32,
    /// Line control.
    #[prost(uint32, tag = "5")]
    pub line_control: u32,
    /// Line status.
    #[prost(uint32, tag = "6")]
    pub line_status: u32,
    /// Modem control.
    #[prost(uint32, tag = "7")]
    pub modem_control: u32,
    /// Modem status.
    #[prost(uint32, tag = "8")]
    pub modem_status: u32,
    /// Scratch.
    #[prost(uint32, tag = "9")]
    pub scratch: u32,
    /// Bytes received and not yet read by the guest.
    #[prost(bytes = "vec", tag = "10")]
    pub received: Vec<u8>,
}

/// The probe device.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Probe {
    /// The scratch register.
    #[prost(uint64, tag = "1")]
    pub scratch: u64,
    /// Guest-physical address of the table, 0 for none.
    #[prost(uint64, tag = "2")]
    pub table: u64,
}

/// The power device.
///
/// Version 2 is written only if the event register holds something. Otherwise the section says
/// no more than that the device is there, as version 1 did.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Power {
    /// The event register: what the guest has not read yet.
    #[prost(uint32, tag = "1")]
    pub pending: u32,
}

/// The console behind the serial port.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Console {
    /// The latest output, which a new viewer is shown first.
    #[prost(bytes = "vec", tag = "1")]
    pub replay: Vec<u8>,
    /// Output not yet written to the log.
    #[prost(bytes = "vec", tag = "2")]
    pub pending: Vec<u8>,
    /// Viewers connected; their sockets travel beside the state, in this order.
    #[prost(uint32, tag = "3")]
    pub viewers: u32,
    /// Input not yet taken by the serial port.
    #[prost(bytes = "vec", tag = "4")]
    pub input: Vec<u8>,
    /// For each viewer: how many of the last bytes of `replay` it has not been sent yet.
    #[prost(uint32, repeated, tag = "5")]
    pub behind: Vec<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_carry_the_same_msrs() {
        let msrs = vec![(0x10, 5), (0x4b56_4d01, u64::MAX), (0x174, 0)];
        for format in FORMATS {
            let mut vcpu = Vcpu::default();
            let version = vcpu.set_msrs(format, msrs.iter().copied());
            assert_eq!(version, format.min(2));
            let again = Vcpu::decode(vcpu.encode_to_vec().as_slice()).expect("decode");
            assert_eq!(again.msrs().expect("msrs"), msrs);
        }
    }

    #[test]
    fn unequal_lists_are_refused() {
        let vcpu = Vcpu {
            msr_indices: vec![1],
            ..Vcpu::default()
        };
        assert!(vcpu.msrs().is_err());
    }
}

//! ACPI tables: what a stock kernel is told about the machine.
//!
//! *Hardware-reduced* ACPI (ACPI 6.5, 4.1): no fixed hardware, so no PIC, no PM timer, no SCI. A
//! kernel takes every interrupt from the I/O APIC and its time from kvmclock and the local APIC.
//! Sleep and reset are the registers of the [power device](crate::devices::power), and its button
//! is told through a generic event device.
//!
//! The tables lie in RAM that the memory map calls reserved, root pointer first, and are written
//! once, before the guest's first instruction. Nothing reads them back: a guest that was swapped
//! keeps those it was booted with, so a change here is seen by guests booted later only.

mod dsdt;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use stillpoint_guest_abi::power;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::reset;
use crate::devices::virtio::slot::Place;
use crate::devices::vmclock;
use crate::memory::Memory;

/// Where the root pointer lies, and the tables behind it: where a PC's firmware has its own, and
/// where a kernel that is told of no address searches (ACPI 6.5, 5.2.5.1).
pub const RSDP: GuestAddress = GuestAddress(0xe_0000);
/// End of the room for tables.
const END: u64 = vmclock::PAGE.0;
const _: () = assert!(END + vmclock::PAGE_SIZE as u64 <= reset::VECTOR.0);

const OEM: [u8; 6] = *b"STILLP";
const OEM_TABLE: [u8; 8] = *b"STILLPNT";
const OEM_REVISION: u32 = 1;

/// Register addresses of KVM's controllers (arch/x86/include/asm/apicdef.h).
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

// IAPC_BOOT_ARCH of the FADT (ACPI 6.5, table 5.11). No keyboard controller either: that bit is
// clear.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// What the tables tell of.
#[derive(Clone, Debug, Default)]
pub struct Platform {
    /// vCPUs, whose APIC ids are 0 to `vcpus - 1`.
    pub vcpus: u8,
    /// virtio-mmio devices in the order in which the guest shall find them.
    pub virtio: Vec<Place>,
    /// There is a vmclock device.
    pub vmclock: bool,
}

/// Writes the tables; gives the address of the root pointer.
pub(super) fn write(
    memory: &Memory,
    platform: &Platform,
) -> Result<GuestAddress, GuestMemoryError> {
    for (address, table) in tables(platform) {
        memory.write_slice(&table, GuestAddress(address))?;
    }
    Ok(RSDP)
}

#[derive(Default)]
struct Bytestream(Vec<u8>);

impl AmlSink for Bytestream {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Bytestream::default();
    table.to_aml_bytes(&mut bytes);
    bytes.0
}

/// Every table with its address. A table that points to others is made after them.
fn tables(platform: &Platform) -> Vec<(u64, Vec<u8>)> {
    let mut placed = Vec::new();
    let mut at = RSDP.0 + Rsdp::len() as u64;
    let mut place = |table: Vec<u8>| {
        let address = at.next_multiple_of(16);
        at = address + table.len() as u64;
        debug_assert!(at <= END, "254 vCPUs and every device fit");
        placed.push((address, table));
        address
    };
    let dsdt = place(dsdt::table(platform));
    let mut root = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    // Tables of later devices go into this list.
    for table in [fadt(dsdt), madt(platform.vcpus)] {
        root.add_entry(place(table));
    }
    let root = place(bytes_of(&root));
    placed.push((RSDP.0, bytes_of(&Rsdp::new(OEM, root))));
    placed
}

/// An 8-bit register of the power device.
fn power_register(offset: u16) -> GAS {
    let port = u64::from(power::PORT + offset);
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Set means that these are *not* fixed hardware: the button is a device of the DSDT, and
        // the other two don't exist.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc);
    table.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    table.reset_reg = power_register(power::RESET_REGISTER);
    table.reset_value = power::ACPI_RESET;
    table.sleep_control_reg = power_register(power::SLEEP_CONTROL);
    table.sleep_status_reg = power_register(power::SLEEP_STATUS);
    table.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    bytes_of(&table.finalize())
}

/// No PCAT_COMPAT flag, so no 8259s for a kernel to take over, and no interrupt source overrides:
/// every line has the number of its I/O APIC pin.
fn madt(vcpus: u8) -> Vec<u8> {
    let at = LocalInterruptController::Address(LOCAL_APIC);
    let mut table = MADT::new(OEM, OEM_TABLE, OEM_REVISION, at);
    for id in 0..vcpus {
        table.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // KVM's I/O APIC has id 0 and all lines of the machine.
    table.add_structure(IoApic::new(0, IO_APIC, 0));
    bytes_of(&table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use stillpoint_control::spec::MAX_VCPUS;

    pub(super) fn platform(vcpus: u8, virtio: usize) -> Platform {
        Platform {
            vcpus,
            virtio: (0..virtio).map(Place::nth).collect(),
            vmclock: virtio == 18,
        }
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(*bytes[at..].first_chunk().expect("eight bytes"))
    }

    fn find(tables: &[(u64, Vec<u8>)], address: u64) -> &[u8] {
        let found = tables.iter().find(|(at, _)| *at == address);
        &found.expect("a table at that address").1
    }

    /// Follows the pointers as a kernel does: root pointer, XSDT, what it lists, the DSDT.
    fn walk(tables: &[(u64, Vec<u8>)]) -> Vec<&[u8]> {
        let root = find(tables, RSDP.0);
        assert_eq!(&root[..8], b"RSD PTR ");
        let xsdt = find(tables, u64_at(root, 24));
        let mut all = vec![xsdt];
        for entry in xsdt[36..].chunks_exact(8) {
            all.push(find(tables, u64_at(entry, 0)));
        }
        let fadt = all.iter().find(|t| t.starts_with(b"FACP")).expect("FADT");
        all.push(find(tables, u64_at(fadt, 140)));
        all
    }

    #[test]
    fn a_kernel_finds_every_table_whole() {
        for (vcpus, virtio) in [(1, 0), (8, 4), (MAX_VCPUS, 18)] {
            let tables = tables(&platform(vcpus, virtio));
            let seen = walk(&tables);
            let names: Vec<_> = seen.iter().map(|table| &table[..4]).collect();
            assert_eq!(names, [b"XSDT", b"FACP", b"APIC", b"DSDT"]);
            for table in &seen {
                let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
                let len = u32::from_le_bytes(*table[4..].first_chunk().expect("length"));
                assert_eq!((sum, len as usize), (0, table.len()), "{vcpus} {virtio}");
            }
        }
    }

    #[test]
    fn the_fullest_machine_fits_and_nothing_overlaps() {
        let mut tables = tables(&platform(MAX_VCPUS, 18));
        tables.sort_by_key(|(at, _)| *at);
        let end = |(at, table): &(u64, Vec<u8>)| at + table.len() as u64;
        assert!(tables.windows(2).all(|pair| end(&pair[0]) <= pair[1].0));
        assert!(tables.first().expect("tables").0 == RSDP.0);
        assert!(end(tables.last().expect("tables")) <= END);
    }

    #[test]
    fn each_vcpu_has_its_entry() {
        for vcpus in [1, 9, MAX_VCPUS] {
            let table = madt(vcpus);
            let entries = &table[44..];
            let (local, rest) = entries.split_at(8 * usize::from(vcpus));
            for (id, entry) in (0..vcpus).zip(local.chunks_exact(8)) {
                assert_eq!(entry, [0, 8, id, id, 1, 0, 0, 0]);
            }
            assert_eq!(rest[..8], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe], "the I/O APIC");
        }
    }

    #[test]
    fn sleep_and_reset_are_the_power_devices() {
        let table = fadt(0x1234);
        let register = |at: usize| u64_at(&table, at + 4);
        assert_eq!(register(116), 0x606, "reset");
        assert_eq!(table[128], 1, "reset value");
        assert_eq!(register(244), 0x604, "sleep control");
        assert_eq!(register(256), 0x605, "sleep status");
        let flags = u32::from_le_bytes(*table[112..].first_chunk().expect("flags"));
        assert_eq!(flags >> 20 & 1, 1, "hardware-reduced");
        assert_eq!(flags >> 10 & 1, 1, "has a reset register");
    }
}

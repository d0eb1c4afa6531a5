//! The DSDT: the machine's devices in AML.
//!
//! Every device hangs under `\_SB`: the serial port, one `LNRO0005` for each virtio-mmio window,
//! the vmclock's page if there is one, and the generic event device (`ACPI0013`) that tells of the
//! power button and of a vmclock that has changed. PCI there is none.

use acpi_tables::Aml;
use acpi_tables::aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify,
    OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store,
};
use acpi_tables::sdt::Sdt;
use stillpoint_guest_abi::power;

use super::{OEM, OEM_REVISION, OEM_TABLE, Platform, bytes_of};
use crate::devices::power::BUTTON_GSI;
use crate::devices::serial::{COM1, COM1_GSI};
use crate::devices::virtio::slot::Place;
use crate::devices::vmclock::{PAGE, PAGE_SIZE};
use crate::irq::Gsi;

/// Bytes of a table's header.
const HEADER: u32 = 36;
/// Revision 2: integers have 64 bits.
const REVISION: u8 = 2;
/// What the event device tells the vmclock's driver: any value (ptp_vmclock.c only wakes who waits).
const CHANGED: u8 = 0x80;
/// What the event device tells the button's driver: pressed (ACPI 6.5, table 4.8).
const PRESSED: u8 = 0x80;
/// The serial port's ports, as a resource counts them.
const SERIAL: (u16, u8) = (COM1 as u16, 8);

pub(super) fn table(platform: &Platform) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", HEADER, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    let mut devices = serial_port();
    for (number, place) in (0..).zip(&platform.virtio) {
        devices.extend(virtio(number, *place));
    }
    devices.extend(power_button());
    if platform.vmclock {
        devices.extend(vmclock_page());
    }
    devices.extend(event_device(platform.vmclock));
    table.append_slice(&Scope::raw(Path::new("\\_SB_"), devices));
    table.append_slice(&soft_off());
    table.as_slice().to_vec()
}

/// A line as a resource: edge-triggered, active high, nobody else's.
fn line(gsi: Gsi) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi.0)
}

/// `\_S5`: the sleep type of soft off. The second one is of hardware that we lack.
fn soft_off() -> Vec<u8> {
    let (first, second) = (power::SLEEP_TYPE_OFF, 0u8);
    let types = Package::new(vec![&first, &second]);
    bytes_of(&Name::new(Path::new("_S5_"), &types))
}

fn serial_port() -> Vec<u8> {
    // IO gives first and last possible base: ours is fixed.
    let (port, ports) = SERIAL;
    let ports = IO::new(port, port, 1, ports);
    bytes_of(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&ports, &line(COM1_GSI)]),
            ),
        ],
    ))
}

/// virtio-mmio as Linux finds it by ACPI (drivers/virtio/virtio_mmio.c, `virtio_mmio_acpi_match`).
fn virtio(number: u32, place: Place) -> Vec<u8> {
    let registers = Memory32Fixed::new(true, place.base, Place::LEN);
    bytes_of(&Device::new(
        format!("VR{number:02}").as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &number),
            // Device and processor see the same memory: nothing of a guest's goes around a cache.
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&registers, &line(place.gsi)]),
            ),
        ],
    ))
}

fn power_button() -> Vec<u8> {
    bytes_of(&Device::new(
        "PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &aml::ZERO),
        ],
    ))
}

/// vmclock as Linux finds it (drivers/ptp/ptp_vmclock.c, `vmclock_acpi_ids`).
fn vmclock_page() -> Vec<u8> {
    let (first, last) = (PAGE.0, PAGE.0 + u64::from(PAGE_SIZE) - 1);
    let page = AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, false, first, last, None);
    bytes_of(&Device::new(
        "VCLK".into(),
        vec![
            &Name::new("_HID".into(), &"AMZNC10C"),
            &Name::new("_CID".into(), &"VMCLOCK"),
            &Name::new("_DDN".into(), &"VMCLOCK"),
            &Name::new("_UID".into(), &aml::ZERO),
            // Present, enabled, shown, working.
            &Name::new("_STA".into(), &0xfu8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&page])),
        ],
    ))
}

/// The generic event device (ACPI 6.5, 5.6.9.1). Its interrupt runs `_EVT`, which asks the event
/// register once, as asking clears it.
fn event_device(vmclock: bool) -> Vec<u8> {
    let (offset, len) = (power::PORT + power::EVENTS, 1u8);
    let region = OpRegion::new("EREG".into(), OpRegionSpace::SystemIO, &offset, &len);
    let register = Field::new(
        "EREG".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVNT", 8)],
    );
    let (events, button, what) = (Local(0), Path::new("PWRB"), Path::new("EVNT"));
    let read = Store::new(&events, &what);
    // A zero in the place of a target means that there is none.
    let pressed = And::new(&aml::ZERO, &events, &power::BUTTON_PRESSED);
    let tell = Notify::new(&button, &PRESSED);
    let told = If::new(&pressed, vec![&tell]);
    let clock = Path::new("VCLK");
    let changed = And::new(&aml::ZERO, &events, &power::CLOCK_CHANGED);
    let tell_clock = Notify::new(&clock, &CHANGED);
    let told_clock = If::new(&changed, vec![&tell_clock]);
    let mut method: Vec<&dyn Aml> = vec![&read, &told];
    if vmclock {
        method.push(&told_clock);
    }
    bytes_of(&Device::new(
        "EVTD".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&line(BUTTON_GSI)]),
            ),
            &region,
            &register,
            &Method::new("_EVT".into(), 1, true, method),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::acpi::tests::platform;

    fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
        bytes.windows(wanted.len()).any(|found| found == wanted)
    }

    #[test]
    fn every_virtio_window_is_a_device_with_its_line() {
        let table = table(&platform(2, 18));
        for number in 0..18u32 {
            let name = format!("VR{number:02}");
            assert!(contains(&table, name.as_bytes()), "{name}");
            let mut registers = vec![0x86, 9, 0, 1];
            registers.extend((0xd000_1000 + number * 0x1000).to_le_bytes());
            registers.extend(0x200u32.to_le_bytes());
            // Extended interrupt descriptor: consumer, edge-triggered, active high, one line.
            registers.extend([0x89, 6, 0, 3, 1]);
            registers.extend((6 + number).to_le_bytes());
            assert!(contains(&table, &registers), "{name}");
        }
        assert!(!contains(&super::table(&platform(2, 17)), b"VR17"));
    }

    #[test]
    fn the_vmclock_is_there_when_it_is() {
        let with = table(&platform(1, 18));
        for name in [&b"AMZNC10C"[..], b"VMCLOCK", b"VCLK"] {
            assert!(contains(&with, name), "{name:?}");
            assert!(!contains(&table(&platform(1, 17)), name), "{name:?}");
        }
        // A QWord address space: granularity, first, last, offset, length.
        let words = [0u64, 0xf_e000, 0xf_efff, 0, 0x1000];
        let resource: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert!(contains(&with, &resource));
    }

    #[test]
    fn the_button_has_its_line_and_soft_off_its_type() {
        let table = table(&platform(1, 0));
        assert!(contains(&table, &[0x89, 6, 0, 3, 1, 5, 0, 0, 0]), "GSI 5");
        // Name(_S5, Package(2) { 5, 0 })
        assert!(contains(&table, b"\x08_S5_\x12\x05\x02\x0a\x05\x00"));
    }
}

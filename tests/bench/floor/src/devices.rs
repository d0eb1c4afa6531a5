//! The few devices pulse needs: a serial port, the probe, the power register.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use stillpoint_guest_abi::{power, probe};

const COM1: u16 = 0x3f8;
const COM1_END: u16 = COM1 + 7;
const LINE_STATUS: u16 = COM1 + 5;
const TRANSMITTER_EMPTY: u8 = 0x60;
const DATA_READY: u8 = 1;

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    show: bool,
    input: Mutex<VecDeque<u8>>,
    /// The probe's registers.
    pub(crate) scratch: AtomicU64,
    /// See `scratch`.
    pub(crate) table: AtomicU64,
    /// The guest asked to be powered off or reset.
    pub(crate) ended: AtomicBool,
}

impl Devices {
    /// `show`: serial output goes to standard error.
    pub(crate) fn new(show: bool) -> Self {
        Self {
            show,
            ..Default::default()
        }
    }

    /// Types a line on the serial port.
    pub(crate) fn type_line(&self, line: &str) {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        input.extend(line.bytes().chain([b'\n']));
    }

    /// A guest's `in`.
    pub(crate) fn port_in(&self, port: u16, data: &mut [u8]) {
        data.fill(if port == power::PORT { 0 } else { 0xff });
        if !(COM1..=COM1_END).contains(&port) {
            return;
        }
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        data.fill(match port {
            COM1 => input.pop_front().unwrap_or(0),
            LINE_STATUS if input.is_empty() => TRANSMITTER_EMPTY,
            LINE_STATUS => TRANSMITTER_EMPTY | DATA_READY,
            _ => 0,
        });
    }

    /// A guest's `out`.
    pub(crate) fn port_out(&self, port: u16, data: &[u8]) {
        match (port, data) {
            (COM1, text) if self.show => {
                // Output for a person; losing it is no error.
                let _ = std::io::stderr().write_all(text);
            }
            (power::PORT, [_, _, _, _]) => self.ended.store(true, Relaxed),
            _ => {}
        }
    }

    /// A guest's read of MMIO.
    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        let value = match address.wrapping_sub(probe::MMIO_BASE) {
            probe::REG_ID => probe::DEVICE_ID.into(),
            probe::REG_VERSION => probe::VERSION.into(),
            probe::REG_SCRATCH => self.scratch.load(Relaxed),
            probe::REG_TABLE => self.table.load(Relaxed),
            _ => u64::MAX,
        };
        let len = data.len().min(8);
        data[..len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    /// A guest's write to MMIO.
    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 8]>::try_from(data) else {
            return;
        };
        let value = u64::from_le_bytes(bytes);
        match address.wrapping_sub(probe::MMIO_BASE) {
            probe::REG_SCRATCH => self.scratch.store(value, Relaxed),
            probe::REG_TABLE => self.table.store(value, Relaxed),
            _ => {}
        }
    }
}

//! The serial port: a 16550 (vm-superio) whose other end is the [`Console`](crate::console).
//!
//! Output leaves the vCPU thread for a buffer in memory, never for a file or socket. Input comes
//! from the console's thread; while frozen it is refused and stays where it is.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use stillpoint_state::contents::Contents;
use stillpoint_state::{Saved, Section, StateError, Unclaimed, sections};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use super::{Busy, Device};
use crate::console::buffer::Output;
use crate::irq::Line;

/// First port of COM1.
pub const COM1: u64 = 0x3f8;
/// Its interrupt line.
pub const COM1_GSI: crate::irq::Gsi = crate::irq::Gsi(4);

/// IIR: no interrupt pending (16550 datasheet, table 4).
const IIR_NONE: u32 = 0x01;

#[derive(Debug)]
struct Interrupt(Line);

impl Trigger for Interrupt {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.raise()
    }
}

struct Inner {
    uart: Serial<Interrupt, NoEvents, Output>,
    frozen: bool,
}

/// The device.
pub struct SerialPort {
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SerialPort")
    }
}

impl SerialPort {
    /// A fresh port.
    pub fn new(line: Line, output: Output) -> Self {
        let uart = Serial::new(Interrupt(line), output);
        Self {
            inner: Mutex::new(Inner {
                uart,
                frozen: false,
            }),
        }
    }

    /// From saved state; frozen until resumed.
    pub fn restore(line: Line, output: Output, from: &mut Unclaimed) -> Result<Self, StateError> {
        let section: sections::Serial = from.take("")?;
        let state = state_of(&section)?;
        let uart = Serial::from_state(&state, Interrupt(line), NoEvents, output).map_err(|e| {
            StateError::Value {
                section: sections::Serial::NAME,
                problem: format!("{e:?}"),
            }
        })?;
        Ok(Self {
            inner: Mutex::new(Inner { uart, frozen: true }),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts input into the receive FIFO; gives how many bytes fitted (0 while frozen).
    pub fn receive(&self, input: &[u8]) -> usize {
        let mut inner = self.inner();
        if inner.frozen {
            return 0;
        }
        let room = inner.uart.fifo_capacity().min(input.len());
        match room {
            0 => 0,
            room => inner.uart.enqueue_raw_bytes(&input[..room]).unwrap_or(0),
        }
    }
}

fn state_of(section: &sections::Serial) -> Result<SerialState, StateError> {
    let byte = |value: u32| {
        u8::try_from(value).map_err(|_| StateError::Value {
            section: sections::Serial::NAME,
            problem: format!("register value {value:#x} is no byte"),
        })
    };
    Ok(SerialState {
        baud_divisor_low: byte(section.divisor_low)?,
        baud_divisor_high: byte(section.divisor_high)?,
        interrupt_enable: byte(section.interrupt_enable)?,
        interrupt_identification: byte(section.interrupt_identification)?,
        line_control: byte(section.line_control)?,
        line_status: byte(section.line_status)?,
        modem_control: byte(section.modem_control)?,
        modem_status: byte(section.modem_status)?,
        scratch: byte(section.scratch)?,
        in_buffer: section.received.clone(),
    })
}

fn section_of(state: &SerialState) -> sections::Serial {
    sections::Serial {
        divisor_low: state.baud_divisor_low.into(),
        divisor_high: state.baud_divisor_high.into(),
        interrupt_enable: state.interrupt_enable.into(),
        interrupt_identification: state.interrupt_identification.into(),
        line_control: state.line_control.into(),
        line_status: state.line_status.into(),
        modem_control: state.modem_control.into(),
        modem_status: state.modem_status.into(),
        scratch: state.scratch.into(),
        received: state.in_buffer.clone(),
    }
}

impl Device for SerialPort {
    fn name(&self) -> &str {
        "serial"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        // Registers are a byte wide; wider accesses are no 16550's business.
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.inner().uart.read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // The output is a buffer in memory and the interrupt an eventfd: neither fails in a
            // way the guest could be told of.
            let _ = self.inner().uart.write(offset, *byte);
        }
    }

    fn drain(&self, _deadline: Instant) -> Result<(), Busy> {
        Ok(())
    }

    fn freeze(&self, _deadline: Instant) -> Result<(), Busy> {
        self.inner().frozen = true;
        Ok(())
    }

    fn resume(&self) {
        let mut inner = self.inner();
        inner.frozen = false;
        let state = inner.uart.state();
        if state.interrupt_enable != 0 && u32::from(state.interrupt_identification) & IIR_NONE == 0
        {
            let _ = inner.uart.interrupt_evt().trigger();
        }
    }

    fn announce(&self, to: &mut Contents) {
        to.announce(&sections::Serial::KIND, "");
    }

    fn save(&self, to: &mut Saved) -> Result<(), StateError> {
        to.put("", &section_of(&self.inner().uart.state()))
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::buffer::Buffer;

    fn port() -> SerialPort {
        SerialPort::new(Line::loose(), Buffer::default().output())
    }

    fn saved(port: &SerialPort) -> Vec<u8> {
        let mut saved = Saved::default();
        port.save(&mut saved).expect("save");
        saved.finish(2, "", "", 0)
    }

    fn restored(bytes: &[u8]) -> SerialPort {
        let mut state = Unclaimed::decode(bytes).expect("decode");
        let output = Buffer::default().output();
        SerialPort::restore(Line::loose(), output, &mut state).expect("restore")
    }

    fn full_section() -> sections::Serial {
        sections::Serial {
            divisor_low: 0x0c,
            divisor_high: 1,
            interrupt_enable: 5,
            interrupt_identification: 0xc4,
            line_control: 3,
            line_status: 0x61,
            modem_control: 8,
            modem_status: 0x30,
            scratch: 0x55,
            received: b"typed".to_vec(),
        }
    }

    #[test]
    fn round_trip() {
        let mut state = Saved::default();
        state.put("", &full_section()).expect("put");
        let bytes = state.finish(2, "", "", 0);
        assert_eq!(saved(&restored(&bytes)), bytes);
    }

    #[test]
    fn every_field_changes_the_saved_form() {
        let base = full_section();
        let changes: [fn(&mut sections::Serial); 10] = [
            |s| s.divisor_low ^= 1,
            |s| s.divisor_high ^= 1,
            |s| s.interrupt_enable ^= 2,
            |s| s.interrupt_identification ^= 2,
            |s| s.line_control ^= 1,
            |s| s.line_status ^= 2,
            |s| s.modem_control ^= 1,
            |s| s.modem_status ^= 1,
            |s| s.scratch ^= 1,
            |s| s.received.push(b'!'),
        ];
        let form = |section: &sections::Serial| {
            let mut state = Saved::default();
            state.put("", section).expect("put");
            saved(&restored(&state.finish(2, "", "", 0)))
        };
        for change in changes {
            let mut section = base.clone();
            change(&mut section);
            assert_ne!(form(&section), form(&base), "{section:?}");
        }
    }

    #[test]
    fn a_value_beyond_a_byte_is_refused() {
        let mut state = Saved::default();
        state
            .put(
                "",
                &sections::Serial {
                    scratch: 256,
                    ..full_section()
                },
            )
            .expect("put");
        let bytes = state.finish(2, "", "", 0);
        let mut state = Unclaimed::decode(&bytes).expect("decode");
        SerialPort::restore(Line::loose(), Buffer::default().output(), &mut state)
            .expect_err("256");
    }

    #[test]
    fn frozen_means_silent_and_input_waits() {
        let port = port();
        port.write(1, &[1]); // IER: received data available
        port.freeze(Instant::now()).expect("freeze");
        assert_eq!(port.receive(b"hello"), 0);
        assert_eq!(port.inner().uart.interrupt_evt().0.raised(), 0);
        port.resume();
        assert_eq!(port.receive(b"hello"), 5);
        assert_eq!(port.inner().uart.interrupt_evt().0.raised(), 1);
    }

    #[test]
    fn an_interrupt_nobody_acknowledged_is_raised_again() {
        let port = port();
        port.write(1, &[1]);
        assert_eq!(port.receive(b"x"), 1);
        port.freeze(Instant::now()).expect("freeze");
        let again = restored(&saved(&port));
        let _ = again.inner().uart.interrupt_evt().0.raised();
        again.resume();
        assert_eq!(again.inner().uart.interrupt_evt().0.raised(), 1);
        let mut data = [0];
        again.read(0, &mut data);
        assert_eq!(&data, b"x");
    }
}

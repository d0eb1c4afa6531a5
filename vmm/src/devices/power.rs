//! Power: how the guest ends or begins anew, and the button by which the host asks it to.
//!
//! The ports are those of [`stillpoint_guest_abi::power`]: one 32-bit register for guests without
//! ACPI, and the registers that the ACPI tables name. Whoever presses the button sets a bit of the
//! event register and raises the line (so does who has changed the [vmclock](super::vmclock)); the
//! guest's interrupt routine reads the register, which clears it, and decides for itself what to do.
//! A press that the guest has not read is saved.

use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use stillpoint_guest_abi::power::{
    ACPI_RESET, BUTTON_PRESSED, CLOCK_CHANGED, CONTROL, EVENTS, POWER_OFF, RESET, RESET_REGISTER,
    SLEEP_CONTROL, SLEEP_ENABLE, SLEEP_TYPE_OFF, SLEEP_TYPE_SHIFT,
};
use stillpoint_state::contents::Contents;
use stillpoint_state::{Saved, Section, StateError, Unclaimed, sections};

use super::{Busy, Device};
use crate::event::Event;
use crate::irq::{Gsi, Line};

/// The interrupt line of the event register.
pub const BUTTON_GSI: Gsi = Gsi(5);

/// Version of the section as it was before there was a button.
const WITHOUT_EVENTS: u32 = 1;

#[derive(Debug)]
struct Inner {
    line: Line,
    /// The event register.
    pending: u8,
    frozen: bool,
}

/// The power device.
#[derive(Debug)]
pub struct Power {
    events: Sender<Event>,
    inner: Mutex<Inner>,
}

impl Power {
    /// Reports to the machine thread, and to the guest by `line`.
    pub fn new(line: Line, events: Sender<Event>) -> Self {
        Self {
            events,
            inner: Mutex::new(Inner {
                line,
                pending: 0,
                frozen: false,
            }),
        }
    }

    /// From saved state; frozen until resumed.
    pub fn restore(
        line: Line,
        events: Sender<Event>,
        from: &mut Unclaimed,
    ) -> Result<Self, StateError> {
        let sections::Power { pending } = from.take("")?;
        let pending = u8::try_from(pending).map_err(|_| StateError::Value {
            section: sections::Power::NAME,
            problem: format!("event register {pending:#x} is no byte"),
        })?;
        Ok(Self {
            events,
            inner: Mutex::new(Inner {
                line,
                pending,
                frozen: true,
            }),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Presses the power button. While frozen it only takes note; the guest hears of it when the
    /// device is resumed, here or in a successor that is made from what is saved later.
    pub fn press_button(&self) {
        self.notify(BUTTON_PRESSED);
    }

    /// Tells the guest, in the same manner, that its vmclock's page has changed.
    pub fn tell_of_clock(&self) {
        self.notify(CLOCK_CHANGED);
    }

    fn notify(&self, event: u8) {
        let mut inner = self.inner();
        inner.pending |= event;
        if !inner.frozen {
            inner.tell();
        }
    }

    /// Whether a press waits for the guest to read of it.
    pub fn is_press_pending(&self) -> bool {
        self.inner().pending & BUTTON_PRESSED != 0
    }

    fn report(&self, event: Event) {
        // The machine thread outlives the vCPUs; if it is gone, so is the machine.
        let _ = self.events.send(event);
    }
}

impl Inner {
    fn tell(&self) {
        // An eventfd fails only if it was written 2^64 times and never read.
        let _ = self.line.raise();
    }
}

impl Device for Power {
    fn name(&self) -> &str {
        "power"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([byte], true) = (data, offset == u64::from(EVENTS)) {
            *byte = std::mem::take(&mut self.inner().pending);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = u16::try_from(offset) else {
            return;
        };
        let event = match (offset, data) {
            (CONTROL, &[a, b, c, d]) => match u32::from_le_bytes([a, b, c, d]) {
                POWER_OFF => Event::PowerOff,
                RESET => Event::Reset,
                _ => return,
            },
            // Other sleep types are of states that `\_S5` is not.
            (SLEEP_CONTROL, &[value])
                if value & SLEEP_ENABLE != 0 && value >> SLEEP_TYPE_SHIFT & 7 == SLEEP_TYPE_OFF =>
            {
                Event::PowerOff
            }
            (RESET_REGISTER, &[ACPI_RESET]) => Event::Reset,
            _ => return,
        };
        self.report(event);
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
        if inner.pending != 0 {
            inner.tell();
        }
    }

    fn announce(&self, to: &mut Contents) {
        // What a press of the button would make of it shows when it is saved.
        to.announce_version(&sections::Power::KIND, "", WITHOUT_EVENTS);
    }

    fn save(&self, to: &mut Saved) -> Result<(), StateError> {
        let pending = self.inner().pending;
        // A release that knows no button would lose a press in silence; so it is to refuse one by
        // the version. Without one the section is what it always was.
        let version = match pending {
            0 => WITHOUT_EVENTS,
            _ => sections::Power::VERSION,
        };
        let pending = pending.into();
        to.put_version("", &sections::Power { pending }, version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    fn power() -> (Power, Receiver<Event>) {
        let (events, seen) = channel();
        (Power::new(Line::loose(), events), seen)
    }

    fn raised(power: &Power) -> u64 {
        power.inner().line.raised()
    }

    fn saved(power: &Power) -> Vec<u8> {
        let mut saved = Saved::default();
        power.save(&mut saved).expect("save");
        saved.finish(2, "", "", 0)
    }

    fn restored(bytes: &[u8]) -> Power {
        let mut state = Unclaimed::decode(bytes).expect("decode");
        let (events, _) = channel();
        let power = Power::restore(Line::loose(), events, &mut state).expect("restore");
        state.finish().expect("nothing left");
        power
    }

    fn events_of(power: &Power) -> u8 {
        let mut data = [0xff];
        power.read(7, &mut data);
        data[0]
    }

    #[test]
    fn only_what_is_agreed_ends_or_resets_the_guest() {
        let (power, seen) = power();
        power.write(0, &POWER_OFF.to_le_bytes());
        power.write(0, &RESET.to_le_bytes());
        power.write(4, &[5 << 2 | 1 << 5]);
        power.write(6, &[1]);
        assert!(matches!(seen.try_recv(), Ok(Event::PowerOff)));
        assert!(matches!(seen.try_recv(), Ok(Event::Reset)));
        assert!(matches!(seen.try_recv(), Ok(Event::PowerOff)), "S5");
        assert!(matches!(seen.try_recv(), Ok(Event::Reset)), "ACPI reset");
        power.write(0, &7u32.to_le_bytes());
        power.write(0, &[5]);
        power.write(2, &POWER_OFF.to_le_bytes());
        power.write(4, &[5 << 2]); // not enabled
        power.write(4, &[3 << 2 | 1 << 5]); // S3
        power.write(5, &[0x80]); // clears a wake status that is never set
        power.write(6, &[2]);
        power.write(6, &[1, 0]);
        assert!(seen.try_recv().is_err());
        for (offset, len) in [(0, 4), (4, 1), (5, 1), (6, 1), (7, 1)] {
            let mut data = [0xff; 4];
            power.read(offset, &mut data[..len]);
            assert_eq!(data[..len], [0; 4][..len], "{offset}");
        }
    }

    #[test]
    fn a_press_is_told_once_and_read_once() {
        let (power, _seen) = power();
        power.press_button();
        assert_eq!(raised(&power), 1);
        assert_eq!(events_of(&power), BUTTON_PRESSED);
        assert_eq!(events_of(&power), 0);
        power.resume();
        assert_eq!(raised(&power), 0, "it was read");
    }

    #[test]
    fn a_changed_clock_is_no_press() {
        let (power, _seen) = power();
        power.tell_of_clock();
        assert_eq!(raised(&power), 1);
        assert!(!power.is_press_pending());
        power.press_button();
        assert_eq!(events_of(&power), BUTTON_PRESSED | CLOCK_CHANGED);
    }

    #[test]
    fn round_trip() {
        let (power, _seen) = power();
        let without = saved(&power);
        assert_eq!(saved(&restored(&without)), without);
        power.press_button();
        let with = saved(&power);
        assert_eq!(saved(&restored(&with)), with);
    }

    #[test]
    fn every_field_changes_the_saved_form() {
        let (power, _seen) = power();
        let before = saved(&power);
        power.press_button();
        assert_ne!(saved(&power), before);
    }

    #[test]
    fn without_a_press_the_section_is_what_older_releases_read() {
        let (power, _seen) = power();
        let mut old = Saved::default();
        old.put_version("", &sections::Power::default(), WITHOUT_EVENTS)
            .expect("put");
        assert_eq!(saved(&power), old.finish(2, "", "", 0));
    }

    #[test]
    fn a_value_beyond_a_byte_is_refused() {
        let mut state = Saved::default();
        state
            .put("", &sections::Power { pending: 256 })
            .expect("put");
        let bytes = state.finish(2, "", "", 0);
        let mut state = Unclaimed::decode(&bytes).expect("decode");
        let (events, _) = channel();
        Power::restore(Line::loose(), events, &mut state).expect_err("256");
    }

    #[test]
    fn frozen_means_silent_and_a_press_is_raised_again() {
        let (power, _seen) = power();
        power.freeze(Instant::now()).expect("freeze");
        power.press_button();
        assert_eq!(raised(&power), 0);
        let again = restored(&saved(&power));
        assert_eq!(raised(&again), 0);
        for power in [power, again] {
            power.resume();
            assert_eq!(raised(&power), 1);
            assert_eq!(events_of(&power), BUTTON_PRESSED);
        }
    }
}

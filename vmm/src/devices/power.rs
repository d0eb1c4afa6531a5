//! Power-off and reset: one 32-bit port.
//!
//! Writing [`POWER_OFF`] ends the guest, [`RESET`] starts it anew; reads give 0. Frozen or not it
//! keeps nothing; a frozen guest has no vCPU that could write to it.

use std::sync::mpsc::Sender;
use std::time::Instant;

use stillpoint_guest_abi::power::{POWER_OFF, RESET};
use stillpoint_state::{Saved, StateError, Unclaimed, sections};

use super::{Busy, Device};
use crate::event::Event;

/// The power device.
#[derive(Debug)]
pub struct Power {
    events: Sender<Event>,
}

impl Power {
    /// Reports to the machine thread.
    pub fn new(events: Sender<Event>) -> Self {
        Self { events }
    }

    /// Takes its section, which only says that the device was there.
    pub fn restore(events: Sender<Event>, from: &mut Unclaimed) -> Result<Self, StateError> {
        let sections::Power {} = from.take("")?;
        Ok(Self::new(events))
    }
}

impl Device for Power {
    fn name(&self) -> &str {
        "power"
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some((0, value)) = data
            .try_into()
            .ok()
            .map(|d| (offset, u32::from_le_bytes(d)))
        else {
            return;
        };
        let event = match value {
            POWER_OFF => Event::PowerOff,
            RESET => Event::Reset,
            _ => return,
        };
        // The machine thread outlives the vCPUs; if it is gone, so is the machine.
        let _ = self.events.send(event);
    }

    fn drain(&self, _deadline: Instant) -> Result<(), Busy> {
        Ok(())
    }

    fn freeze(&self, _deadline: Instant) -> Result<(), Busy> {
        Ok(())
    }

    fn resume(&self) {}

    fn save(&self, to: &mut Saved) -> Result<(), StateError> {
        to.put("", &sections::Power {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn only_the_two_values_at_offset_zero_do_anything() {
        let (events, seen) = channel();
        let power = Power::new(events);
        power.write(0, &POWER_OFF.to_le_bytes());
        power.write(0, &RESET.to_le_bytes());
        assert!(matches!(seen.try_recv(), Ok(Event::PowerOff)));
        assert!(matches!(seen.try_recv(), Ok(Event::Reset)));
        power.write(0, &7u32.to_le_bytes());
        power.write(0, &[5]);
        power.write(2, &POWER_OFF.to_le_bytes());
        assert!(seen.try_recv().is_err());
        let mut data = [0xff; 4];
        power.read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn round_trip() {
        let (events, _seen) = channel();
        let mut saved = Saved::default();
        Power::new(events.clone()).save(&mut saved).expect("save");
        let bytes = saved.finish(2, "", "", 0);
        let mut state = Unclaimed::decode(&bytes).expect("decode");
        Power::restore(events.clone(), &mut state).expect("restore");
        Power::restore(events, &mut state).expect_err("its section is taken");
        state.finish().expect("nothing left");
    }
}

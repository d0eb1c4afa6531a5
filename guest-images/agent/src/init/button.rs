//! The power button: an input device with one key.
//!
//! ACPI's button driver makes an input device of it, and evdev a file of that, both modules in
//! Debian's kernels. A guest that has neither doesn't hear of the button.

use std::fs::File;
use std::io::Read;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// `struct input_event` on a 64-bit machine: a time of 16 bytes, type, code, value.
const EVENT: usize = 24;
/// `EV_KEY` and `KEY_POWER` (uapi/linux/input-event-codes.h).
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// `value` of a key that goes down.
const PRESSED: i32 = 1;

/// Starts a thread on every input device; there are few, and all may have the key.
pub(super) fn watch() {
    let Ok(entries) = std::fs::read_dir("/dev/input") else {
        return;
    };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with("event") {
            continue;
        }
        let path = entry.path();
        let begun = File::open(&path).and_then(|device| {
            std::thread::Builder::new()
                .name("button".into())
                .spawn(move || listen(device))
        });
        if let Err(error) = begun {
            say!(
                "listening for the power button on {}: {error}",
                path.display()
            );
        }
    }
}

fn listen(mut device: File) {
    let mut event = [0; EVENT];
    // A read returns whole events; an error means that the device is gone.
    while device.read_exact(&mut event).is_ok() {
        if is_power_button(&event) {
            say!("the power button was pressed");
            // To PID 1, which is this process: it may be anywhere but in its wait.
            let _ = kill(Pid::this(), Signal::SIGUSR2);
        }
    }
}

fn is_power_button(event: &[u8; EVENT]) -> bool {
    let [.., t0, t1, c0, c1, v0, v1, v2, v3] = *event;
    u16::from_le_bytes([t0, t1]) == EV_KEY
        && u16::from_le_bytes([c0, c1]) == KEY_POWER
        && i32::from_le_bytes([v0, v1, v2, v3]) == PRESSED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_press_of_the_power_button_counts() {
        let mut event = [0xaa; EVENT];
        event[16..].copy_from_slice(&[1, 0, 116, 0, 1, 0, 0, 0]);
        assert!(is_power_button(&event));
        for (at, byte) in [(16, 0), (18, 117), (20, 0)] {
            let mut other = event;
            other[at] = byte;
            assert!(!is_power_button(&other));
        }
    }
}

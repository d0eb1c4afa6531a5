//! The golden states: what each release wrote is read, whole, and means what it meant. They are in
//! `golden/`, as text (`stillpoint_state::golden`), made by `make golden` from real guests.

use std::path::Path;

use stillpoint_state::codec::{Header, Saved, Section};
use stillpoint_state::golden::from_text;
use stillpoint_state::sections::*;
use stillpoint_state::{StateError, Unclaimed};

/// All of them: release, format, vCPUs, whether there are virtio devices.
const ALL: [(&str, u32, usize, bool); 4] = [
    ("0.1.0", 1, 2, false),
    ("0.2.0", 1, 2, false),
    ("0.2.0", 2, 2, false),
    ("0.2.0", 3, 4, true),
];

fn golden(release: &str, format: u32) -> Vec<u8> {
    let name = format!("golden/{release}-format-{format}.golden");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let text = std::fs::read_to_string(&path).expect("a golden state");
    from_text(&text).expect("its text")
}

/// Takes a section, and shows that writing it again loses nothing of it.
fn take<S: Section + Clone>(state: &mut Unclaimed, into: &mut Saved, instance: &str) -> S {
    let section: S = state.take(instance).expect(S::NAME);
    into.put(instance, &section).expect("put");
    section
}

fn with_devices(state: &mut Unclaimed, again: &mut Saved) {
    for (device, kind) in [("disk0", 2), ("net0", 1), ("vsock", 19), ("rng", 4)] {
        let mmio: VirtioMmio = take(state, again, device);
        assert_eq!((mmio.device_type, mmio.failed), (kind, false), "{device}");
        let open = mmio.queues.iter().filter(|queue| queue.open).count();
        // Pulse has more devices than vCPUs to drive them: it leaves the last one alone.
        assert_eq!(open > 0, device != "rng", "{device} was at work: {mmio:?}");
    }
    let disk: VirtioBlk = take(state, again, "disk0");
    assert_eq!(disk.size, 64 << 20);
    let net: VirtioNet = take(state, again, "net0");
    assert_eq!((net.mac.len(), net.active_pairs), (6, 1));
    let vsock: VirtioVsock = take(state, again, "vsock");
    let open = |c: &&VsockConnection| c.stage == VsockStage::Open as i32 && c.socket;
    assert_eq!(
        vsock.connections.iter().filter(open).count(),
        2,
        "{vsock:?}"
    );
    let _: VirtioRng = take(state, again, "rng");
}

#[test]
fn what_each_release_wrote_is_read_whole() {
    for (release, format, vcpus, devices) in ALL {
        let bytes = golden(release, format);
        let mut state = Unclaimed::decode(&bytes).expect("decode");
        let header: Header = state.of().clone();
        assert_eq!((header.format, header.writer.as_str()), (format, release));
        assert_eq!((header.vm.as_str(), header.epoch), ("pulse", 1));
        let mut again = Saved::default();
        for vcpu in 0..vcpus {
            let vcpu: Vcpu = take(&mut state, &mut again, &vcpu.to_string());
            assert_eq!(vcpu.msrs.is_empty(), format > 1);
            let msrs = vcpu.msrs().expect("MSRs");
            // EFER: every vCPU of pulse is in long mode.
            let efer = msrs.iter().find(|(index, _)| *index == 0xc000_0080);
            assert!(
                efer.is_none_or(|(_, value)| value & 0x500 == 0x500),
                "{efer:?}"
            );
            assert_eq!(vcpu.lapic.len(), 1024);
            assert!(vcpu.regs.len() == 144 && vcpu.tsc_khz > 0 && vcpu.tsc_offset.is_some());
        }
        let chips: Irqchip = take(&mut state, &mut again, "");
        assert_eq!((chips.ioapic.len(), chips.pit.len()), (520, 112));
        let clock: Clock = take(&mut state, &mut again, "");
        assert!(clock.clock > 0 && clock.host_tsc > 0 && !clock.hold);
        let probe: Probe = take(&mut state, &mut again, "");
        assert!(probe.table > 0, "{probe:?}");
        let _: Serial = take(&mut state, &mut again, "");
        let _: Power = take(&mut state, &mut again, "");
        let console: Console = take(&mut state, &mut again, "");
        let said = String::from_utf8_lossy(&console.replay);
        assert!(said.contains("pulse"), "{said}");
        if devices {
            with_devices(&mut state, &mut again);
        }
        state.finish().expect("all was taken");
        let bytes = again.finish(format, release, "pulse", 1);
        Unclaimed::decode(&bytes).expect("what was written again");
    }
}

#[test]
fn a_golden_state_that_is_cut_off_or_bent_is_an_error_or_a_value() {
    for (release, format, ..) in ALL {
        let bytes = golden(release, format);
        for len in (0..bytes.len()).step_by(7) {
            assert!(Unclaimed::decode(&bytes[..len]).is_err(), "cut at {len}");
        }
        for at in (0..bytes.len()).step_by(3) {
            let mut bent = bytes.clone();
            bent[at] ^= 0x81;
            if let Ok(mut state) = Unclaimed::decode(&bent) {
                let _ = state.take::<Vcpu>("0");
                let _ = state.take::<VirtioVsock>("vsock");
            }
        }
    }
}

#[test]
fn what_a_release_does_not_know_is_refused_by_name() {
    let bytes = golden("0.2.0", 3);
    let state = Unclaimed::decode(&bytes).expect("decode");
    let Err(StateError::Leftover(names)) = state.finish() else {
        panic!("nothing was left");
    };
    for name in ["vcpu/3", "virtio-vsock/vsock", "virtio-net/net0", "clock"] {
        assert!(names.contains(name), "{names}");
    }
}

//! The golden states: what each release wrote is read, whole, and means what it meant. They are in
//! `golden/`, as text (`stillpoint_state::golden`), made by `make golden` from real guests.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use stillpoint_state::codec::{Header, Saved, Section};
use stillpoint_state::golden::from_text;
use stillpoint_state::sections::*;
use stillpoint_state::{StateError, Unclaimed};

/// One of them.
struct Golden {
    file: &'static str,
    release: &'static str,
    format: u32,
    vcpus: usize,
    devices: Devices,
    /// SHA-256 of the file: what was released doesn't change.
    digest: &'static str,
}

/// What there is beside vCPUs and a serial port.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Devices {
    None,
    /// All virtio devices; entropy is left alone.
    Virtio,
    /// Every kind, all at work, and a viewer at the console.
    All,
}

const ALL: [Golden; 5] = [
    Golden {
        file: "0.1.0-format-1",
        release: "0.1.0",
        format: 1,
        vcpus: 2,
        devices: Devices::None,
        digest: "2049234a6c09234ae85c06519fbd644a4ae104aa4cf6cc045dcf54787365e219",
    },
    Golden {
        file: "0.2.0-format-1",
        release: "0.2.0",
        format: 1,
        vcpus: 2,
        devices: Devices::None,
        digest: "13a18e25fdb764fdf9169178aee0ccd78fb15a11f55cfeef2b6fd407d4209a31",
    },
    Golden {
        file: "0.2.0-format-2",
        release: "0.2.0",
        format: 2,
        vcpus: 2,
        devices: Devices::None,
        digest: "b4700d6df4ebdcaea24eca780189b4c44bc31a88c22fe35763ee21097230fed9",
    },
    Golden {
        file: "0.2.0-format-3",
        release: "0.2.0",
        format: 3,
        vcpus: 4,
        devices: Devices::Virtio,
        digest: "73db0d8ecb06f09e3a80356be746a1ec729349a53fee035c51d45e1a5fa8cdf3",
    },
    Golden {
        file: "0.2.0-format-3-all-kinds",
        release: "0.2.0",
        format: 3,
        vcpus: 5,
        devices: Devices::All,
        digest: "f6ce44e09f40140f3d3431906933aabe1431dfe4b633f3718fc5ef8cc6037559",
    },
];

fn place() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

fn golden(file: &str) -> Vec<u8> {
    let path = place().join(format!("{file}.golden"));
    let text = std::fs::read_to_string(&path).expect("a golden state");
    from_text(&text).expect("its text")
}

fn take<S: Section>(state: &mut Unclaimed, instance: &str) -> S {
    state.take(instance).expect(S::NAME)
}

/// Everything in a state, written again in the same order.
fn again(bytes: &[u8]) -> Vec<u8> {
    fn put<S: Section>(from: &mut Unclaimed, to: &mut Saved, instance: &str, version: u32) {
        let section: S = take(from, instance);
        to.put_version(instance, &section, version).expect("put");
    }
    let mut from = Unclaimed::decode(bytes).expect("decode");
    let mut to = Saved::default();
    let header = from.of().clone();
    for (name, instance, version) in from.list() {
        let put = match name.as_str() {
            Vcpu::NAME => put::<Vcpu>,
            Irqchip::NAME => put::<Irqchip>,
            Clock::NAME => put::<Clock>,
            Serial::NAME => put::<Serial>,
            Probe::NAME => put::<Probe>,
            Power::NAME => put::<Power>,
            Console::NAME => put::<Console>,
            VmClock::NAME => put::<VmClock>,
            VirtioMmio::NAME => put::<VirtioMmio>,
            VirtioRng::NAME => put::<VirtioRng>,
            VirtioBlk::NAME => put::<VirtioBlk>,
            VirtioVsock::NAME => put::<VirtioVsock>,
            VirtioNet::NAME => put::<VirtioNet>,
            other => panic!("a section {other} in a golden state"),
        };
        put(&mut from, &mut to, &instance, version);
    }
    from.finish().expect("all was taken");
    to.finish(header.format, &header.writer, &header.vm, header.epoch)
}

fn with_devices(state: &mut Unclaimed, all: bool) {
    for (device, kind) in [("disk0", 2), ("net0", 1), ("vsock", 19), ("rng", 4)] {
        let mmio: VirtioMmio = take(state, device);
        assert_eq!((mmio.device_type, mmio.failed), (kind, false), "{device}");
        let open = mmio.queues.iter().filter(|queue| queue.open).count();
        let at_work = all || device != "rng";
        assert_eq!(open > 0, at_work, "{device} was at work: {mmio:?}");
    }
    let disk: VirtioBlk = take(state, "disk0");
    assert_eq!(disk.size, 64 << 20);
    let net: VirtioNet = take(state, "net0");
    assert_eq!((net.mac.len(), net.active_pairs), (6, 1));
    let vsock: VirtioVsock = take(state, "vsock");
    let open = |c: &&VsockConnection| c.stage == VsockStage::Open as i32 && c.socket;
    assert_eq!(
        vsock.connections.iter().filter(open).count(),
        2,
        "{vsock:?}"
    );
    let _: VirtioRng = take(state, "rng");
}

#[test]
fn what_each_release_wrote_is_read_whole() {
    for one in &ALL {
        let bytes = golden(one.file);
        let mut state = Unclaimed::decode(&bytes).expect("decode");
        let header: Header = state.of().clone();
        assert_eq!(
            (header.format, header.writer.as_str()),
            (one.format, one.release)
        );
        assert_eq!((header.vm.as_str(), header.epoch), ("pulse", 1));
        for vcpu in 0..one.vcpus {
            let vcpu: Vcpu = take(&mut state, &vcpu.to_string());
            assert_eq!(vcpu.msrs.is_empty(), one.format > 1);
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
        let chips: Irqchip = take(&mut state, "");
        assert_eq!((chips.ioapic.len(), chips.pit.len()), (520, 112));
        let clock: Clock = take(&mut state, "");
        assert!(clock.clock > 0 && clock.host_tsc > 0 && !clock.hold);
        let probe: Probe = take(&mut state, "");
        assert!(probe.table > 0, "{probe:?}");
        let _: Serial = take(&mut state, "");
        let _: Power = take(&mut state, "");
        let console: Console = take(&mut state, "");
        let said = String::from_utf8_lossy(&console.replay);
        assert!(said.contains("pulse"), "{said}");
        let all = one.devices == Devices::All;
        assert_eq!(console.viewers, u32::from(all));
        if one.devices != Devices::None {
            with_devices(&mut state, all);
        }
        if all {
            let vmclock: VmClock = take(&mut state, "");
            assert_eq!((vmclock.sequence, vmclock.marker), (0, 0));
        }
        state.finish().expect("all was taken");
        assert!(
            again(&bytes) == bytes,
            "{} changes when it is written again",
            one.file
        );
    }
}

#[test]
fn no_golden_state_has_changed() {
    let mut files: Vec<_> = std::fs::read_dir(place())
        .expect("the golden states")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .into_string()
                .expect("UTF-8")
        })
        .collect();
    files.sort();
    let mut known: Vec<_> = ALL
        .iter()
        .map(|one| format!("{}.golden", one.file))
        .collect();
    known.sort();
    assert_eq!(
        files, known,
        "each golden state is in the list of this test"
    );
    for one in &ALL {
        let text = std::fs::read(place().join(format!("{}.golden", one.file))).expect("read");
        let digest: String = Sha256::digest(&text)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        assert_eq!(digest, one.digest, "{} is not what was released", one.file);
    }
}

#[test]
fn a_golden_state_that_is_cut_off_or_bent_is_an_error_or_a_value() {
    for one in &ALL {
        let bytes = golden(one.file);
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
    let bytes = golden("0.2.0-format-3");
    let state = Unclaimed::decode(&bytes).expect("decode");
    let Err(StateError::Leftover(names)) = state.finish() else {
        panic!("nothing was left");
    };
    for name in ["vcpu/3", "virtio-vsock/vsock", "virtio-net/net0", "clock"] {
        assert!(names.contains(name), "{names}");
    }
}

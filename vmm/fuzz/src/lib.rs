//! What strangers can send, as fuzz targets: bytes in, and nothing but an error or a value out.
//!
//! Each target is one function, run in two ways: by cargo-fuzz with libFuzzer (`make fuzz`, needs a
//! nightly compiler), and by `src/bin/fuzz.rs`, a bounded run of a seeded mutator that any compiler
//! builds and `make test` contains. Both start from the same corpus: the golden states, and a good
//! example of everything else.

pub mod mutate;

use prost::Message;
use stillpoint_agent::wire::{Lines, decode};
use stillpoint_control::message::{Reply, Request};
use stillpoint_control::report::SwapReport;
use stillpoint_control::spec::MachineSpec;
use stillpoint_state::contents::Contents;
use stillpoint_state::golden::from_text;
use stillpoint_state::sections::{
    Clock, Console, Irqchip, KINDS, Power, Probe, Serial, Vcpu, VirtioBlk, VirtioMmio, VirtioNet,
    VirtioRng, VirtioVsock, VmClock,
};
use stillpoint_state::{Section, Unclaimed};
use stillpoint_vmm::devices::virtio::fuzz;
use stillpoint_vmm::handover::{
    Adopted, Body, Files, GiveUp, Loaded, Offer, Packet, Refused, Soon, State,
};

/// A target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// What is done with the bytes. It must not panic.
    pub run: fn(&[u8]),
    /// Where a fuzzer starts.
    pub corpus: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub static TARGETS: [Target; 7] = [
    Target {
        name: "saved_state",
        run: saved_state,
        corpus: golden_states,
    },
    Target {
        name: "handover",
        run: handover,
        corpus: handover_packets,
    },
    Target {
        name: "control",
        run: control,
        corpus: control_messages,
    },
    Target {
        name: "machine_spec",
        run: machine_spec,
        corpus: machine_specs,
    },
    Target {
        name: "agent",
        run: agent,
        corpus: agent_lines,
    },
    Target {
        name: "rings",
        run: fuzz::rings,
        corpus: guest_memories,
    },
    Target {
        name: "packets",
        run: fuzz::packets,
        corpus: guest_memories,
    },
];

/// The target of that name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|target| target.name == name)
}

/// Saved state, as a successor reads it.
pub fn saved_state(bytes: &[u8]) {
    let Ok(mut state) = Unclaimed::decode(bytes) else {
        return;
    };
    fn take<S: Section>(state: &mut Unclaimed, instances: &[&str]) {
        for instance in instances {
            let _ = state.take::<S>(instance);
        }
    }
    for vcpu in 0..4 {
        if let Ok(vcpu) = state.take::<Vcpu>(&vcpu.to_string()) {
            let _ = vcpu.msrs();
        }
    }
    take::<Irqchip>(&mut state, &[""]);
    take::<Clock>(&mut state, &[""]);
    take::<Serial>(&mut state, &[""]);
    take::<Probe>(&mut state, &[""]);
    take::<Power>(&mut state, &[""]);
    take::<Console>(&mut state, &[""]);
    take::<VmClock>(&mut state, &[""]);
    take::<VirtioMmio>(&mut state, &["disk0", "net0", "vsock", "rng"]);
    take::<VirtioBlk>(&mut state, &["disk0"]);
    take::<VirtioNet>(&mut state, &["net0"]);
    take::<VirtioVsock>(&mut state, &["vsock"]);
    take::<VirtioRng>(&mut state, &["rng"]);
    let _ = state.finish();
}

/// A packet of the handover, as either side reads it.
pub fn handover(bytes: &[u8]) {
    let Ok(Packet { body: Some(body) }) = Packet::decode(bytes) else {
        return;
    };
    if let Body::Offer(offer) = body {
        let _ = MachineSpec::from_json(&offer.spec);
        for contents in &offer.contents {
            let _ = contents.check();
        }
        let _ = stillpoint_vmm::boot::cpuid::from_bytes(&offer.cpuid);
    }
}

/// A message on the control socket, as VMM and daemon read it.
pub fn control(bytes: &[u8]) {
    let _ = serde_json::from_slice::<Request>(bytes);
    let _ = serde_json::from_slice::<Reply>(bytes);
    let _ = serde_json::from_slice::<SwapReport>(bytes);
}

/// A machine as a user writes it.
pub fn machine_spec(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(spec) = MachineSpec::from_json(text)
    {
        let again = serde_json::to_string(&spec).unwrap_or_default();
        let again = MachineSpec::from_json(&again).ok();
        assert_eq!(again, Some(spec), "it does not come back as it was");
    }
}

/// Lines of the guest agent's protocol, as the agent reads them.
pub fn agent(bytes: &[u8]) {
    let mut lines = Lines::with_limit(bytes, 4096);
    while let Ok(Some(line)) = lines.next_line() {
        let _ = decode(&line);
    }
}

fn golden_states() -> Vec<Vec<u8>> {
    [
        include_str!("../../state/golden/0.1.0-format-1.golden"),
        include_str!("../../state/golden/0.2.0-format-1.golden"),
        include_str!("../../state/golden/0.2.0-format-2.golden"),
        include_str!("../../state/golden/0.2.0-format-3.golden"),
        include_str!("../../state/golden/0.2.0-format-3-all-kinds.golden"),
    ]
    .iter()
    .filter_map(|text| from_text(text).ok())
    .collect()
}

const SPEC: &str = r#"{"name":"web-1","cpus":2,"memory":{"size":134217728,"pages":"base"},
"kernel":{"path":"/k","cmdline":"console=ttyS0"},"disks":[{"path":"/d","read_only":true}],
"nets":[{"tap":"t0","mac":"52:54:00:00:00:01","queue_pairs":2}],"vsock":{"cid":42},"rng":true,
"blackout_budget_ns":1000000000}"#;

fn machine_specs() -> Vec<Vec<u8>> {
    vec![SPEC.into(), r#"{"name":"a","cpus":1}"#.into()]
}

fn handover_packets() -> Vec<Vec<u8>> {
    let mut contents = Contents::new(3);
    KINDS.iter().for_each(|kind| contents.announce(kind, "x"));
    contents.sections[0].added.push(900);
    let offer = Offer {
        contents: vec![contents],
        swap: "swap-1".into(),
        spec: SPEC.into(),
        epoch: 1,
        cpuid: vec![1; 80],
        formats: vec![3, 2, 1],
        files: 7,
        ..Offer::default()
    };
    let bodies = [
        Body::Offer(offer),
        Body::Adopted(Adopted {
            format: 3,
            populated: 1 << 20,
            hold: true,
            ahead: true,
            awake: true,
        }),
        Body::Ahead(State { len: 30_000 }),
        Body::Soon(Soon {}),
        Body::Files(Files {
            names: vec!["disk0/image".into(), "vsock/conn7".into()],
        }),
        Body::State(State { len: 30_000 }),
        Body::Loaded(Loaded { took_ns: 100_000 }),
        Body::GiveUp(GiveUp {
            kicked_tsc: 1 << 50,
        }),
        Body::Refused(Refused {
            reason: "no".into(),
        }),
    ];
    let packet = |body| Packet { body: Some(body) }.encode_to_vec();
    bodies.into_iter().map(packet).collect()
}

fn control_messages() -> Vec<Vec<u8>> {
    let requests = [Request::Describe, Request::LendGuest, Request::PowerOff];
    let mut all: Vec<Vec<u8>> = requests
        .iter()
        .filter_map(|r| serde_json::to_vec(r).ok())
        .collect();
    all.push(
        r#"{"request":"hand_over","swap":"s","to":{"version":"1","sha256":""},"budget_ns":1,"brownout_ns":1}"#
            .into(),
    );
    all.push(r#"{"reply":"error","code":"busy","message":"a handover is going on"}"#.into());
    all
}

fn agent_lines() -> Vec<Vec<u8>> {
    vec![
        b"{\"do\":\"health\"}\n{\"do\":\"exec\",\"program\":\"/bin/true\",\"args\":[\"a\"]}\n"
            .to_vec(),
        b"{\"do\":\"poll\",\"job\":1}\n\n\n{".to_vec(),
    ]
}

/// Guests whose rings are as they should be: descriptors, one behind the other, that a driver
/// has offered.
fn guest_memories() -> Vec<Vec<u8>> {
    let mut memory = vec![0; 0xa000];
    let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
    for queue in 0..3_usize {
        let base = queue * 0x3000;
        put(queue * 4, &[0, 0, 0, 3]);
        for n in 0..8_u64 {
            let at = base + 0x10 + 16 * n as usize;
            let flags: u16 = if queue == 0 { 2 } else { 0 } | u16::from(n % 2 == 0);
            put(at, &(0x9000 + n * 256).to_le_bytes());
            put(at + 8, &64_u32.to_le_bytes());
            put(at + 12, &flags.to_le_bytes());
            put(at + 14, &(n as u16 + 1).to_le_bytes());
            put(
                base + 0x1014 + 2 * n as usize,
                &(n as u16 & !1).to_le_bytes(),
            );
        }
        put(base + 0x1012, &8_u16.to_le_bytes());
    }
    // A header of a socket device's packet: from 42:1024 to 2:5000, a stream, each operation once.
    for n in 0..8_u64 {
        let at = 0x9000 + 256 * n as usize;
        put(at, &42_u64.to_le_bytes());
        put(at + 8, &2_u64.to_le_bytes());
        put(at + 16, &1024_u32.to_le_bytes());
        put(at + 20, &5000_u32.to_le_bytes());
        put(at + 28, &[1, 0, (n + 1) as u8, 0]);
        put(at + 36, &65_536_u32.to_le_bytes());
    }
    vec![memory]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_found() {
        let target = Target {
            name: "broken",
            run: |bytes| assert!(bytes.len() != 3, "three bytes"),
            corpus: || vec![b"abcdef".to_vec()],
        };
        assert!(!mutate::run(&target, 1, std::time::Duration::from_secs(20)));
    }

    #[test]
    fn the_corpus_of_each_target_is_of_its_kind() {
        for target in TARGETS {
            let corpus = (target.corpus)();
            assert!(!corpus.is_empty(), "{}", target.name);
            corpus.iter().for_each(|bytes| (target.run)(bytes));
        }
        let good = |state: &Vec<u8>| Unclaimed::decode(state).is_ok();
        assert!(golden_states().iter().all(good) && golden_states().len() == 5);
        assert!(
            handover_packets()
                .iter()
                .all(|p| Packet::decode(&p[..]).is_ok())
        );
        assert!(MachineSpec::from_json(SPEC).is_ok());
        for line in agent_lines().concat().split(|byte| *byte == b'\n').take(3) {
            let line = stillpoint_agent::wire::Line::Whole(line.to_vec());
            assert!(decode(&line).is_ok(), "{line:?}");
        }
        for message in control_messages() {
            let read = serde_json::from_slice::<Request>(&message).is_ok()
                || serde_json::from_slice::<Reply>(&message).is_ok();
            assert!(read, "{}", String::from_utf8_lossy(&message));
        }
    }
}

use super::*;

fn spec() -> MachineSpec {
    MachineSpec {
        name: "web-1".into(),
        cpus: 2,
        memory: MemorySpec::default(),
        kernel: KernelSpec {
            path: "/k".into(),
            initrd: None,
            cmdline: String::new(),
        },
        disks: Vec::new(),
        nets: Vec::new(),
        vsock: None,
        rng: false,
        clock: ClockSpec::default(),
        blackout_budget: DEFAULT_BUDGET,
    }
}

fn net(tap: &str) -> NetSpec {
    NetSpec {
        tap: tap.into(),
        mac: None,
        queue_pairs: 1,
    }
}

fn disk(path: &str) -> DiskSpec {
    DiskSpec {
        path: path.into(),
        read_only: false,
    }
}

#[test]
fn memory_that_outlives_the_kernel_is_of_whole_2_mib() {
    let kernel = |change: fn(&mut MemorySpec)| {
        refused(|s| {
            s.memory.survive = Survive::Kernel;
            change(&mut s.memory);
        })
    };
    assert!(kernel(|m| m.size = 33 << 20).contains("`memory.size`"));
    assert!(kernel(|m| m.pages = Pages::Thp).contains("`memory.pages`"));
    let at = || CarveOutSpec {
        path: "/dev/dax0.0".into(),
        ram: 4 << 20,
        record: 3 << 20,
        record_len: 2 << 20,
    };
    let placed = refused(|s| {
        s.memory.survive = Survive::Kernel;
        s.memory.carve_out = Some(at());
    });
    assert!(placed.contains("`memory.carve_out`"), "{placed}");
    assert!(refused(|s| s.memory.carve_out = Some(at())).contains("`kernel` alone"));
    assert!(CarveOutSpec::memfd(4 << 20, 4 << 20).is_memfd() && !at().is_memfd());
    let apart = kernel(|m| {
        let own = CarveOutSpec::memfd(m.size, 4 << 20);
        let record = own.record + (2 << 20);
        m.carve_out = Some(CarveOutSpec { record, ..own });
    });
    assert!(apart.contains("behind it"), "{apart}");
    let mut sound = spec();
    sound.memory.survive = Survive::Kernel;
    sound.validate().expect("the daemon finds its place later");
    let plain = serde_json::to_string(&spec()).expect("JSON");
    assert!(
        !plain.contains("survive"),
        "an older release reads it: {plain}"
    );
}

#[test]
fn a_context_id_made_of_a_name_is_one_that_may_be() {
    let cids: Vec<_> = (0..1000)
        .map(|n| VsockSpec::for_name(&format!("web-{n}")).cid)
        .collect();
    assert!(cids.iter().all(|cid| (MIN_CID..u32::MAX).contains(cid)));
    // Kept for ever: a guest that is started anew finds its own.
    assert_eq!(VsockSpec::for_name("web-1").cid, 1_991_751_458);
}

#[test]
fn devices_that_can_not_be_are_named() {
    assert!(refused(|s| s.disks = vec![disk("")]).contains("`disks.path`"));
    assert!(refused(|s| s.disks = vec![disk("/a"), disk("/a")]).contains("twice"));
    assert!(refused(|s| s.disks = vec![disk("/a"); 19]).contains("`disks`"));
    assert!(refused(|s| s.nets = vec![net("a-name-too-long-for-linux")]).contains("`nets.tap`"));
    assert!(refused(|s| s.nets = vec![net("")]).contains("`nets.tap`"));
    assert!(refused(|s| s.nets = vec![net("t"), net("t")]).contains("twice"));
    let pairs = |n| {
        move |s: &mut MachineSpec| {
            s.nets = vec![NetSpec {
                queue_pairs: n,
                ..net("t")
            }];
        }
    };
    assert!(refused(pairs(0)).contains("`nets.queue_pairs`"));
    assert!(refused(pairs(9)).contains("`nets.queue_pairs`"));
    for mac in [
        "52:54",
        "01:00:00:00:00:01",
        "zz:54:00:12:34:56",
        "00:00:00:00:00:00",
    ] {
        let with = |s: &mut MachineSpec| {
            s.nets = vec![NetSpec {
                mac: Some(mac.into()),
                ..net("t")
            }];
        };
        assert!(refused(with).contains("`nets.mac`"), "{mac}");
    }
    assert!(refused(|s| s.vsock = Some(VsockSpec { cid: 2 })).contains("`vsock.cid`"));
    assert_eq!(
        parse_mac("52:54:00:12:34:56"),
        Ok([0x52, 0x54, 0, 0x12, 0x34, 0x56])
    );
}

#[test]
fn a_clock_that_is_held_is_corrected() {
    let hold = |s: &mut MachineSpec| s.clock.policy = Policy::Hold;
    assert!(refused(hold).contains("`clock.policy`"));
    let by = |correction| move |s: &mut MachineSpec| s.clock.correction = Some(correction);
    assert!(refused(by(Correction::Step)).contains("`clock.correction`"));
    assert!(refused(by(Correction::Slew)).contains("`clock.correction`"));
    let mut spec = spec();
    hold(&mut spec);
    by(Correction::Ptp)(&mut spec);
    spec.validate().expect("the guest sees to it");
    spec.clock.correction = None;
    spec.vsock = Some(VsockSpec { cid: 3 });
    spec.validate().expect("the agent sees to it");
    assert_eq!(spec.correction(), Some(Correction::Step));
}

#[test]
fn an_interface_keeps_its_address_for_ever() {
    let mut spec = spec();
    assert_eq!(spec.mac(0), None);
    spec.nets = vec![net("t"), net("u")];
    // Guests know these: they never change.
    let text = |number| spec.mac(number).map(format_mac).expect("there");
    assert_eq!(text(0), "92:a9:20:aa:09:e7");
    assert_ne!(text(0), text(1));
    assert_eq!(parse_mac(&text(0)).expect("no group's")[0] & 3, 2);
    spec.nets[0].mac = Some("52:54:00:12:34:56".into());
    assert_eq!(spec.mac(0), Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
}

fn refused(change: impl FnOnce(&mut MachineSpec)) -> String {
    let mut spec = spec();
    change(&mut spec);
    spec.validate().expect_err("must be refused").to_string()
}

#[test]
fn errors_name_the_field() {
    assert!(refused(|s| s.name = "../x".into()).contains("`name`"));
    assert!(refused(|s| s.name = String::new()).contains("`name`"));
    assert!(refused(|s| s.cpus = 0).contains("`cpus`"));
    assert!(refused(|s| s.cpus = 255).contains("`cpus`"));
    assert!(refused(|s| s.memory.size = 4096).contains("`memory.size`"));
    assert!(refused(|s| s.memory.size += 1).contains("`memory.size`"));
    assert!(refused(|s| s.memory.size = 1 << 50).contains("`memory.size`"));
    assert!(refused(|s| s.memory.nodes = vec![0, 1024]).contains("`memory.nodes`"));
    assert!(refused(|s| s.kernel.path = "".into()).contains("`kernel.path`"));
    assert!(refused(|s| s.kernel.cmdline = "x".repeat(4000)).contains("`kernel.cmdline`"));
    assert!(refused(|s| s.kernel.cmdline = "a\nb".into()).contains("`kernel.cmdline`"));
    assert!(refused(|s| s.blackout_budget = Duration::ZERO).contains("`blackout_budget_ns`"));
    assert!(
        refused(|s| s.blackout_budget = Duration::from_secs(31)).contains("`blackout_budget_ns`")
    );
    spec().validate().expect("a good spec");
}

#[test]
fn unknown_fields_are_named() {
    let error = MachineSpec::from_json(r#"{"name":"a","kernel":{"path":"/k"},"cpu":2}"#)
        .expect_err("unknown field");
    assert!(error.to_string().contains("`cpu`"), "{error}");
}

#[test]
fn json_round_trip() {
    let text = serde_json::to_string(&spec()).expect("to JSON");
    assert_eq!(MachineSpec::from_json(&text).expect("from JSON"), spec());
}

#[test]
fn sizes() {
    assert_eq!(parse_size("256M"), Ok(256 << 20));
    assert_eq!(parse_size("2GiB"), Ok(2 << 30));
    assert_eq!(parse_size("4096"), Ok(4096));
    assert!(parse_size("2Q").expect_err("unit").contains("`Q`"));
    assert!(parse_size("99999999T").is_err());
    assert!(parse_size("").is_err());
}

//! What is kept between two kernels, without either: memfds as they would come, and what is made of them.

use stillpoint_carveout::mark::Mark;
use stillpoint_carveout::record;
use stillpoint_control::spec::MachineSpec;

use super::*;

fn spec(name: &str, mib: u64) -> MachineSpec {
    let text = format!(
        r#"{{"name":"{name}","kernel":{{"path":"/k"}},"memory":{{"size":{},"survive":"kernel"}}}}"#,
        mib << 20
    );
    MachineSpec::from_json(&text).expect("a spec")
}

fn memfd(size: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&fd, size).expect("sized");
    fd
}

fn guest(vm: &str) -> Guest {
    let room = record::room(1);
    Guest {
        vm: vm.into(),
        place: CarveOutSpec::memfd(16 << 20, room),
        memory: memfd((16 << 20) + room),
    }
}

/// A directory that names these, as the kernel before left it, and who of them is here.
fn came(named: &[&str], here: &[&str]) -> CarveOut {
    let guests: Vec<_> = named.iter().map(|vm| guest(vm)).collect();
    let area = Area::of(directory_file().expect("a memfd")).expect("a directory");
    let mut directory = Directory {
        entries: guests.iter().zip(1..).map(entry).collect(),
        ..Directory::default()
    };
    area.write(&mut directory).expect("written");
    let fd = area.device().as_fd().try_clone_to_owned().expect("dup");
    let mut left = vec![(Keeping::Directory, fd)];
    for guest in guests {
        if here.contains(&guest.vm.as_str()) {
            left.push((Keeping::Guest(guest.vm), guest.memory));
        }
    }
    // A daemon that ends leaves systemd's duplicate, and with it the lock.
    drop(area);
    CarveOut(Ok(Arc::new(Opened::left(left).expect("opened"))))
}

#[test]
fn a_guest_gets_a_memfd_of_its_own_and_nobody_takes_a_name_that_may_yet_be_run() {
    let host = came(&["a", "b"], &["a"]);
    assert!(host.is_live_update() && host.is_lost_by_kexec().is_none());
    let new = host.place(&spec("c", 16)).expect("nothing is in the way");
    assert_eq!(new, CarveOutSpec::memfd(16 << 20, record::room(1)));
    let directory = host.directory().expect("read");
    let of = |vm: &str| directory.entry(vm).expect("named").clone();
    // It was given to its VMM.
    assert_eq!(host.mark(&of("b")), Ok(Mark::Consumed));
    host.memory_of(&of("b")).expect_err("it has it itself");
    host.place(&spec("b", 16)).expect("its name is free");
    assert!(matches!(host.mark(&of("a")), Ok(Mark::Unknown(0))));
    let opened = host.opened().expect("open");
    let memory = host.memory_of(&of("a")).expect("here").expect("a memfd");
    let device = Device::of(&opened.path, memory).expect("mapped");
    let extent = of("a").record;
    let mapping = device.map(extent).expect("mapped");
    mapping.store(0, Mark::Stored.word()).expect("stored");
    assert_eq!(host.mark(&of("a")), Ok(Mark::Stored));
    let why = host.place(&spec("a", 16)).expect_err("its fate is open");
    assert!(why.contains("adopt --retry a"), "{why}");
    let why = host.preserve(&[guest("c")]).expect_err("nor is it dropped");
    assert!(why.contains("adopt --forget a"), "{why}");
    assert_eq!(host.give_back("a", true), Ok(true));
    assert_eq!(host.waits(), None);
}

#[test]
fn who_runs_is_let_go_and_counts_as_consumed() {
    let host = came(&["a"], &["a"]);
    let entry = host.directory().expect("read").entries[0].clone();
    assert!(host.memory_of(&entry).expect("here").is_some());
    host.let_go("a");
    assert_eq!(host.mark(&entry), Ok(Mark::Consumed));
    host.forget_all().expect("as asked");
    assert!(host.directory().expect("read").entries.is_empty());
}

#[test]
fn where_there_is_no_live_update_nothing_is_preserved_and_nobody_stays_in_the_directory() {
    if Path::new(LIVE_UPDATE).exists() {
        return;
    }
    let absent = CarveOut::by_live_update(Vec::new()).expect_err("none here");
    assert!(matches!(absent, Error::Absent(_)), "{absent}");
    let host = CarveOut(Ok(Arc::new(Opened::new().expect("a memfd"))));
    let why = host.preserve(&[guest("a")]).expect_err("none here");
    assert!(why.contains(LIVE_UPDATE), "{why}");
    assert!(host.directory().expect("read").entries.is_empty());
}

#[test]
fn what_preserving_takes_is_the_size_less_what_is_there() {
    let guest = guest("a");
    let size = rustix::fs::fstat(&guest.memory).expect("stat").st_size as u64;
    rustix::io::pwrite(&guest.memory, &vec![1; 4 << 20], 0).expect("written");
    let room = Room::of(&[guest]).expect("told");
    assert_eq!(room.size, size);
    assert_eq!(room.needed, size - (4 << 20) + size / 100);
    let none = Room {
        available: room.needed - 1,
        ..room
    };
    assert!(!none.is_enough());
    assert_eq!(
        available("MemFree: 1 kB\nMemAvailable:   20 kB\n"),
        Some(20 << 10)
    );
    assert_eq!(available("MemFree: 1 kB\n"), None);
}

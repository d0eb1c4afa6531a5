//! Guest RAM over each of its backends.

use super::*;
use stillpoint_control::spec::CarveOutSpec;
use vm_memory::Bytes;

fn spec(size: u64) -> MemorySpec {
    MemorySpec {
        size,
        ..MemorySpec::default()
    }
}

#[test]
fn ram_in_a_carve_out_is_zeroed_once_and_handed_on_as_it_is() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("carve-out");
    std::fs::write(&path, vec![0xa5; 64 << 20]).expect("what others left");
    let spec = MemorySpec {
        size: 16 << 20,
        survive: Survive::Kernel,
        carve_out: Some(CarveOutSpec {
            path: path.clone(),
            ram: 8 << 20,
            record: 2 << 20,
            record_len: 4 << 20,
        }),
        ..MemorySpec::default()
    };
    let ram = GuestRam::create(&spec).expect("create");
    let at = GuestAddress((16 << 20) - 8);
    let read = |ram: &GuestRam| ram.map().read_obj::<u64>(at).expect("read");
    assert_eq!(read(&ram), 0, "nothing of others is left");
    ram.map().write_obj(42u64, at).expect("write");
    assert_eq!(ram.populate(|| true), 16 << 20);
    let fd = ram.as_fd().try_clone_to_owned().expect("dup");
    let other = GuestRam::adopt(fd, &spec).expect("adopt");
    assert_eq!(read(&other), 42);
    let file = std::fs::read(&path).expect("the file");
    assert!(
        file[..8 << 20].iter().all(|&byte| byte == 0xa5),
        "before it"
    );
    assert!(
        file[24 << 20..].iter().all(|&byte| byte == 0xa5),
        "behind it"
    );
    let fd = ram.read_only().expect("read only");
    let view = GuestRam::view(fd, &spec).expect("view");
    assert!(view.takes_writes() && read(&view) == 42);
    view.map().write_obj(7u64, at).expect("write");
    assert_eq!((read(&view), read(&other)), (7, 42), "its own");
    ram.clear().expect("a reset");
    assert_eq!(read(&other), 0);
    let homeless = MemorySpec {
        carve_out: None,
        ..spec
    };
    let error = GuestRam::create(&homeless).expect_err("no place");
    assert!(error.to_string().contains("memory.survive"), "{error}");
}

#[test]
fn a_memfd_of_its_own_has_room_for_the_record_behind_ram() {
    let spec = MemorySpec {
        size: 16 << 20,
        survive: Survive::Kernel,
        carve_out: Some(CarveOutSpec::memfd(16 << 20, 4 << 20)),
        ..MemorySpec::default()
    };
    let ram = GuestRam::create(&spec).expect("create");
    let at = GuestAddress((16 << 20) - 8);
    ram.map().write_obj(42u64, at).expect("write");
    rustix::io::pwrite(&ram, b"a record", 17 << 20).expect("there is room");
    assert!(ram.populate(|| true) <= 16 << 20, "the record is no RAM");
    let fd = || ram.as_fd().try_clone_to_owned().expect("dup");
    let other = GuestRam::adopt(fd(), &spec).expect("adopt");
    assert_eq!(other.map().read_obj::<u64>(at).expect("read"), 42);
    GuestRam::view(ram.read_only().expect("read only"), &spec).expect("a private view");
    let short = MemorySpec {
        carve_out: None,
        survive: Survive::Vmm,
        ..spec
    };
    GuestRam::adopt(fd(), &short).expect_err("RAM of another size");
    ram.clear().expect("a reset");
    assert_eq!(other.map().read_obj::<u64>(at).expect("read"), 0);
    let mut kept = [0; 8];
    rustix::io::pread(&ram, &mut kept, 17 << 20).expect("read");
    assert_eq!(&kept, b"a record", "a reset is of RAM alone");
}

#[test]
fn ram_skips_the_hole() {
    assert_eq!(ranges(1 << 30), [(GuestAddress(0), 1 << 30)]);
    let big = ranges(5 << 30);
    assert_eq!(
        big,
        [
            (GuestAddress(0), 3 << 30),
            (GuestAddress(HOLE_END), 2 << 30)
        ]
    );
}

#[test]
fn two_mappings_are_one_ram_and_its_size_is_fixed() {
    let ram = GuestRam::create(&spec(16 << 20)).expect("create");
    let fd = ram.as_fd().try_clone_to_owned().expect("dup");
    let other = GuestRam::adopt(fd, &spec(16 << 20)).expect("adopt");
    ram.map()
        .write_obj(42u64, GuestAddress(0x5000))
        .expect("write");
    assert_eq!(
        other
            .map()
            .read_obj::<u64>(GuestAddress(0x5000))
            .expect("read"),
        42
    );
    rustix::fs::ftruncate(&ram, 4096).expect_err("the size is sealed");
    let fd = ram.as_fd().try_clone_to_owned().expect("dup");
    GuestRam::adopt(fd, &spec(32 << 20)).expect_err("not its size");
}

#[test]
fn a_view_sees_all_and_its_writes_stay_its_own() {
    let ram = GuestRam::create(&spec(16 << 20)).expect("create");
    let at = GuestAddress(0x5000);
    ram.map().write_obj(42u64, at).expect("write");
    let fd = ram.read_only().expect("read only");
    rustix::io::pwrite(&fd, b"x", 0).expect_err("for reading only");
    GuestRam::adopt(fd.try_clone().expect("dup"), &spec(16 << 20))
        .expect_err("it can't be mapped as a successor's");
    let view = GuestRam::view(fd, &spec(16 << 20)).expect("view");
    let read = |ram: &GuestRam| ram.map().read_obj::<u64>(at).expect("read");
    assert_eq!(read(&view), 42);
    let blocks = || rustix::fs::fstat(&ram).expect("stat").st_blocks;
    let before = blocks();
    view.map().write_obj(7u64, at).expect("write");
    assert_eq!((read(&view), read(&ram)), (7, 42));
    assert_eq!(blocks(), before, "nothing was written to the file");
    // A hole that is touched is one no more, as shmem makes its page first; it is zero still.
    let hole = GuestAddress(0x9000);
    view.map().write_obj(7u64, hole).expect("write");
    let zero: u64 = ram.map().read_obj(hole).expect("read");
    assert_eq!(zero, 0);
    view.clear().expect_err("nor can it be cleared");
}

#[test]
fn populating_leaves_holes_holes() {
    let ram = GuestRam::create(&spec(64 << 20)).expect("create");
    ram.map()
        .write_obj(1u8, GuestAddress(10 << 20))
        .expect("write");
    ram.map()
        .write_obj(1u8, GuestAddress(40 << 20))
        .expect("write");
    let blocks = || rustix::fs::fstat(&ram).expect("stat").st_blocks;
    let before = blocks();
    assert!(ram.populate(|| true) >= 8192);
    assert_eq!(blocks(), before, "populating must not allocate");
    assert_eq!(ram.populate(|| false), 0, "it can be called off");
}

#[test]
fn what_is_held_is_shown_by_the_guests_addresses_and_nothing_else_is() {
    let ram = GuestRam::create(&spec(4 << 30)).expect("create");
    // On both sides of the hole below 4 GiB, where addresses and offsets in the file part.
    let touched = [10 << 20, (4 << 30) + (5 << 20)];
    for at in touched {
        let at = GuestAddress(at);
        ram.map().write_obj(1u8, at).expect("write");
    }
    let mut seen = Vec::new();
    ram.each_held(|range| {
        seen.push(range);
        true
    });
    for at in touched {
        assert!(
            seen.iter().any(|range| range.contains(&at)),
            "{at:#x}: {seen:?}"
        );
    }
    let held: u64 = seen.iter().map(|range| range.end - range.start).sum();
    assert!(
        held <= 4 << 20,
        "no more than the pages of two writes: {seen:?}"
    );
    let mut count = 0;
    ram.each_held(|_| {
        count += 1;
        false
    });
    assert_eq!(count, 1, "it can be called off");
}

#[test]
fn huge_pages_that_are_not_there_are_named() {
    let free =
        std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages");
    if free.map_or(true, |free| free.trim() != "0") {
        eprintln!("SKIPPED memory: this host has huge pages of 1 GiB, or knows none");
        return;
    }
    let spec = MemorySpec {
        size: 1 << 30,
        pages: Pages::Hugetlb1g,
        ..MemorySpec::default()
    };
    let error = GuestRam::create(&spec)
        .expect_err("none are free")
        .to_string();
    assert!(
        error.contains("huge page") && error.contains("nr_hugepages"),
        "{error}"
    );
}

#[test]
fn more_ram_than_the_host_has_names_the_field() {
    let error = GuestRam::create(&spec(1 << 44)).expect_err("16 TiB");
    assert!(error.to_string().contains("`memory.size`"), "{error}");
}

#[test]
fn nodes_that_this_host_lacks_are_named() {
    let spec = MemorySpec {
        nodes: vec![0, 1023],
        ..spec(16 << 20)
    };
    let error = GuestRam::create(&spec).expect_err("no host has so many");
    let text = error.to_string();
    assert!(
        text.contains("memory.nodes") && text.contains("0, 1023"),
        "{text}"
    );
}

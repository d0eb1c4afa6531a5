//! Opening and locking, against another process.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdin, Command, Stdio};

use super::*;
use crate::raw::file::{Lock, lock};

/// What the other process does; and with which file.
const ACT: &str = "STILLPOINT_TEST_LOCK_ACT";
const FILE: &str = "STILLPOINT_TEST_LOCK_FILE";

/// The other process: this test, run again by those below. By itself it does nothing.
#[test]
fn the_other_process() {
    let (Ok(act), Some(path)) = (std::env::var(ACT), std::env::var_os(FILE)) else {
        return;
    };
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("open");
    if act == "hold" {
        lock(&file, Lock::Exclusive).expect("free");
        eprintln!("ready");
        let _ = std::io::stdin().read(&mut [0]);
        return;
    }
    let ended = || {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::from_borrowed_fd(
            rustix::stdio::stdin(),
            PollFlags::IN,
        )];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    };
    for tries in 0u64.. {
        lock(&file, Lock::Exclusive).expect_err("never free");
        if tries == 0 {
            eprintln!("ready");
        }
        if ended() {
            break;
        }
    }
}

/// Starts it, and waits until it is at work or has ended.
fn other(act: &str, path: &Path) -> (Child, ChildStdin) {
    let name = "devices::virtio::blk::tests::lock::the_other_process";
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", name, "--nocapture"])
        .env(ACT, act)
        .env(FILE, path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start");
    let stderr = BufReader::new(child.stderr.take().expect("piped"));
    let _ = stderr
        .lines()
        .find(|line| !line.as_ref().is_ok_and(|line| line != "ready"));
    let stdin = child.stdin.take().expect("piped");
    (child, stdin)
}

/// Ends it; whether all went as it wanted.
fn end((mut child, stdin): (Child, ChildStdin)) -> bool {
    drop(stdin);
    child.wait().expect("wait").success()
}

#[test]
fn there_is_no_moment_without_the_lock() {
    let file = file(MIB);
    let mut driver = boot(&file);
    let prober = other("probe", file.path());
    for _ in 0..100 {
        driver = swap(driver, file.path());
    }
    assert!(
        end(prober),
        "another process took the disk of a running guest"
    );
    // And it would have noticed.
    drop(driver);
    assert!(!end(other("probe", file.path())));
}

fn refused(path: &Path, read_only: bool) -> String {
    let refused = Image::open("web-1", "disk0", &spec(path, read_only));
    let text = refused.expect_err("must be refused").to_string();
    let named = format!("field `disks.path`: {}: ", path.display());
    assert!(text.contains(&named), "{text}");
    text
}

#[test]
fn who_holds_a_disk_is_named() {
    let file = file(MIB);
    let holder = other("hold", file.path());
    let pid = holder.0.id();
    for read_only in [false, true] {
        let text = refused(file.path(), read_only);
        assert!(
            text.contains(&format!("locked by process {pid} (")),
            "{text}"
        );
    }
    assert!(end(holder));
    let _one = image(&file, false);
    let text = refused(file.path(), false);
    assert!(text.contains("this very guest"), "{text}");
}

#[test]
fn a_disk_is_found_by_its_path_or_it_is_said_what_is_there() {
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    for name in ["own", "another"] {
        std::fs::write(at(name), vec![0; 4096]).expect("write");
    }
    let spec = spec(&at("own"), false);
    let own = Image::open("web-1", "disk0", &spec).expect("open");
    own.is_found_by(&spec)
        .expect("it is there, and locked by us");
    let why = || own.is_found_by(&spec).expect_err("not found").to_string();
    std::fs::rename(at("own"), at("away")).expect("rename");
    assert!(why().contains("no such file"), "{}", why());
    std::fs::rename(at("another"), at("own")).expect("rename");
    assert!(why().contains("another disk open"), "{}", why());
    std::fs::remove_file(at("own")).expect("remove");
    std::fs::hard_link(at("away"), at("own")).expect("link");
    own.is_found_by(&spec).expect("by whatever name");
}

#[test]
fn readers_share_a_disk_and_a_writer_does_not() {
    let file = file(MIB);
    let readers = [image(&file, true), image(&file, true)];
    assert!(refused(file.path(), false).contains("locked by"));
    drop(readers);
}

#[test]
fn what_is_no_disk_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    let write = |name: &str, bytes: &[u8]| std::fs::write(at(name), bytes).expect("write");
    assert!(refused(&at("nothing"), false).contains("no such file"));
    assert!(refused(&at("nothing"), true).contains("no such file"));
    assert!(refused(dir.path(), false).contains("is a directory"));
    assert!(refused(dir.path(), true).contains("is a directory"));
    write("empty", b"");
    assert!(refused(&at("empty"), false).contains("empty"));
    write("uneven", &[0; 513]);
    assert!(refused(&at("uneven"), false).contains("513 bytes"));
    assert!(refused(&at("uneven").join("below"), false).contains("no such file"));
    let mut qcow = vec![0; 1024];
    qcow[..4].copy_from_slice(b"QFI\xfb");
    write("image.qcow2", &qcow);
    assert!(refused(&at("image.qcow2"), false).contains("qemu-img convert"));
    assert!(refused(Path::new("/dev/null"), false).contains("character device"));
    let made = Command::new("mkfifo").arg(at("fifo")).status();
    assert!(made.is_ok_and(|made| made.success()));
    assert!(refused(&at("fifo"), false).contains("FIFO"));
    assert!(refused(&at("fifo"), true).contains("FIFO"));
    let _listening = std::os::unix::net::UnixListener::bind(at("socket")).expect("bind");
    assert!(refused(&at("socket"), false).contains("socket"));
}

#[test]
fn serial_numbers_tell_disks_apart() {
    let file = file(MIB);
    let name = "a-machine-with-quite-a-long-name";
    let image = Image::open(name, "disk17", &spec(file.path(), true)).expect("image");
    assert_eq!(&image.serial, b"a-machine-wit-disk17");
}

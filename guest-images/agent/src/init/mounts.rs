//! The kernel's file systems, and the console.

use std::ffi::CString;
use std::fs::File;

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::lines_of;

/// File system, where, and its options.
const MOUNTS: [(&str, &str, &str); 6] = [
    ("devtmpfs", "/dev", "mode=0755"),
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("tmpfs", "/run", "mode=0755"),
    ("tmpfs", "/tmp", "mode=1777"),
    ("devpts", "/dev/pts", "mode=0620,ptmxmode=0666"),
];

/// Mounts them all and opens the console, which is then there for certain.
pub(super) fn mount_all() {
    let mut failures = Vec::new();
    for (kind, target, options) in MOUNTS {
        let _ = std::fs::create_dir_all(target);
        let options = CString::new(options).unwrap_or_default();
        let flags = MountFlags::NOSUID;
        // EBUSY: the kernel mounts devtmpfs by itself where it is built to.
        match mount(kind, target, kind, flags, options.as_c_str()) {
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => failures.push((target, error)),
        }
    }
    open_console();
    for (target, error) in failures {
        say!("mounting {target}: {error}");
    }
}

/// An image without `/dev/console` gives PID 1 no standard streams.
fn open_console() {
    let Ok(console) = File::options().read(true).write(true).open("/dev/console") else {
        return;
    };
    let _ = dup2_stdin(&console);
    let _ = dup2_stdout(&console);
    let _ = dup2_stderr(&console);
}

/// Unmounts what is mounted from a device, so that its file system is whole on it; what is
/// still in use is made read-only, which comes to the same.
pub(super) fn let_go() {
    for line in lines_of("/proc/mounts").iter().rev() {
        let mut words = line.split(' ');
        let (Some(source), Some(target)) = (words.next(), words.next()) else {
            continue;
        };
        if !source.starts_with("/dev/") {
            continue;
        }
        let left = unmount(target, UnmountFlags::NOFOLLOW)
            .or_else(|_| mount_remount(target, MountFlags::RDONLY, c""));
        if let Err(error) = left {
            say!("unmounting {target}: {error}");
        }
    }
}

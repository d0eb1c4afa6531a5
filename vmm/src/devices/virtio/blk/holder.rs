//! Who has locked a file: for the text of an error, and for nothing else.
//!
//! `F_OFD_GETLK` and `/proc/locks` name no process for a lock of a description. The kernel shows
//! such a lock beside each descriptor of it, in `/proc/PID/fdinfo`.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Names whoever holds a lock on this file, as far as this user may know it.
pub(super) fn name(file: &File) -> String {
    find(file).unwrap_or_else(|| "another program (`lslocks` may tell which)".into())
}

fn find(file: &File) -> Option<String> {
    let wanted = file.metadata().ok()?;
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let Ok(pid) = process.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        // Another user's process is not ours to look into.
        let Ok(fds) = std::fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        let holds = |fd: std::fs::DirEntry| {
            // Follows the link to the very file, whatever its name is now.
            let same = std::fs::metadata(fd.path())
                .is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()));
            same && is_locked(&process.path().join("fdinfo").join(fd.file_name()))
        };
        if fds.flatten().any(holds) {
            return Some(match pid == std::process::id() {
                true => "this very guest, which has it twice".into(),
                false => format!("process {pid}{}", called(&process.path())),
            });
        }
    }
    None
}

fn is_locked(fdinfo: &Path) -> bool {
    let text = std::fs::read_to_string(fdinfo).unwrap_or_default();
    text.lines().any(|line| line.starts_with("lock:"))
}

fn called(process: &Path) -> String {
    let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
    match name.trim() {
        "" => String::new(),
        name => format!(" ({name})"),
    }
}

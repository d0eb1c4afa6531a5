//! phc2sys, for guests whose clock is corrected by ptp_kvm: an archive to lay behind a guest's initramfs.
//!
//! In it: `/ptp/phc2sys`, a script that starts the daemon through the loader and the library that came
//! with it, as no image of ours has a C library.

use std::path::Path;

use crate::guest::ImageError;
use crate::initramfs::Initramfs;
use crate::packages::Unpacked;

/// Where Debian puts libraries of the architecture.
const LIBRARIES: &str = "lib/x86_64-linux-gnu";
const LOADER: &str = "ld-linux-x86-64.so.2";
const NEEDED: [&str; 2] = ["libc.so.6", "libm.so.6"];

const START: &str = "\
#!/bin/sh
exec /ptp/ld-linux-x86-64.so.2 --library-path /ptp /ptp/program \"$@\"
";

/// The archive, of the set [`crate::packages::Set::Phc2sys`].
pub fn archive(set: &Unpacked) -> Result<Vec<u8>, ImageError> {
    let mut archive = Initramfs::new(Vec::new());
    let libraries = set.tree.join(LIBRARIES);
    let mut put = |name: &str, from: &Path| archive.copy(&format!("ptp/{name}"), 0o755, from);
    put("program", &set.tree.join("usr/sbin/phc2sys"))?;
    for name in [LOADER].into_iter().chain(NEEDED) {
        put(name, &libraries.join(name))?;
    }
    archive.file("ptp/phc2sys", 0o755, START.as_bytes())?;
    Ok(archive.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_package_lacks_is_named() {
        let dir = tempfile::tempdir().expect("a folder");
        let set = Unpacked {
            tree: dir.path().to_owned(),
            packages: Vec::new(),
        };
        let error = archive(&set).expect_err("there is nothing");
        assert!(error.to_string().contains("phc2sys"), "{error}");
        for file in ["usr/sbin/phc2sys", LOADER, NEEDED[0], NEEDED[1]] {
            let path = match file {
                "usr/sbin/phc2sys" => dir.path().join(file),
                library => dir.path().join(LIBRARIES).join(library),
            };
            std::fs::create_dir_all(path.parent().expect("one")).expect("a folder");
            std::fs::write(path, file).expect("written");
        }
        let bytes = archive(&set).expect("made");
        let holds = |text: &str| {
            bytes
                .windows(text.len())
                .any(|part| part == text.as_bytes())
        };
        assert!(holds("ptp/libm.so.6") && holds("--library-path /ptp"));
    }
}

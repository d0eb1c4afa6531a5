//! Kernel modules, in the order of `/modules.order`.
//!
//! A line is a path and, behind spaces, the module's parameters. The list is the image's and
//! serves every machine: a module without its hardware is no failure.

use std::ffi::CString;
use std::fs::File;
use std::io;

use rustix::io::Errno;
use rustix::system::finit_module;

use super::lines_of;

const LIST: &str = "/modules.order";
/// `MODULE_INIT_COMPRESSED_FILE` (uapi/linux/module.h): the kernel decompresses it.
const COMPRESSED: i32 = 4;

/// Loads them all; tells which could not be.
pub(super) fn load_all() {
    for line in lines_of(LIST) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Err(error) = load(line) {
            say!("loading {line}: {error}");
        }
    }
}

fn load(line: &str) -> io::Result<()> {
    let (path, parameters) = line.split_once(' ').unwrap_or((line, ""));
    let compressed = [".xz", ".zst", ".gz"].iter().any(|end| path.ends_with(end));
    let file = File::open(path)?;
    let parameters = CString::new(parameters.trim())?;
    match finit_module(&file, &parameters, if compressed { COMPRESSED } else { 0 }) {
        // It is loaded or built in; or this machine has nothing for it.
        Ok(()) | Err(Errno::EXIST | Errno::NODEV) => Ok(()),
        // The file is there: the kernel says this of a symbol that it doesn't have.
        Err(Errno::NOENT) => Err(io::Error::other(format!(
            "it needs a module that must stand before it in {LIST}; the kernel's log says which symbol"
        ))),
        Err(error) => Err(error.into()),
    }
}

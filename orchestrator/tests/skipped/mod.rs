//! Tests that can't run here.

use std::io::Write;

/// Says that the running test is skipped, and why; it is counted as such.
pub(crate) fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    let line = format!("SKIPPED {test}: {reason}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("STILLPOINT_SKIPPED") {
        let file = std::fs::File::options()
            .append(true)
            .create(true)
            .open(path);
        let mut file = file.expect("the list");
        file.write_all(line.as_bytes()).expect("write");
    }
}

//! `make demo`: a guest lives through ten swaps of its VMM, and through two releases that fail.
//!
//! Starts a daemon with directories of its own, uses the same `stillpoint` commands that a person
//! would type, ends with a table, and exits non-zero if any line of it is untrue. Cleans up after
//! itself; needs no more than the right to open `/dev/kvm`.

mod story;
mod table;

use std::process::ExitCode;

fn main() -> ExitCode {
    match story::tell() {
        Ok(verdict) => {
            table::print(&verdict);
            if verdict.is_good() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

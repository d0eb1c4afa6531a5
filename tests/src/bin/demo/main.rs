//! `make demo`: a guest lives through swaps of its VMM.
//!
//! Starts a daemon with directories of its own, uses the same `stillpoint` commands that a person
//! would type, ends with a table, and exits non-zero if any line of it is untrue. Cleans up after
//! itself.
//!
//! Which guest: a Debian Linux at work, where KVM runs a guest's kernel at the speed of hardware;
//! elsewhere pulse, which works in ring 3. `--guest linux` shows the Linux guest anywhere: on an
//! emulated host if need be.

mod linux;
mod pulse;
mod table;

use std::process::ExitCode;

use stillpoint_tests::ground;

/// Which guest to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    Pulse,
    Linux,
}

fn main() -> ExitCode {
    match show() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show() -> anyhow::Result<bool> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let asked = match words[..] {
        [] => None,
        ["--guest", "pulse"] => Some(Guest::Pulse),
        ["--guest", "linux"] => Some(Guest::Linux),
        _ => anyhow::bail!("usage: demo [--guest pulse|linux]"),
    };
    match asked {
        None => choose(),
        Some(Guest::Pulse) => on_kvm(pulse::tell),
        Some(Guest::Linux) => linux::tell_anywhere(),
    }
}

/// The guest that this machine's KVM can run, and why.
fn choose() -> anyhow::Result<bool> {
    let (fast, found) = ground::kernel_speed().unwrap_or((false, "not measured".into()));
    if !fast {
        println!(
            "The guest is pulse: this KVM emulates guest kernels ({found}). `make demo-linux` \
             shows a Debian guest on an emulated host."
        );
        return on_kvm(pulse::tell);
    }
    println!("The guest is Debian Linux: KVM runs its kernel at full speed ({found}).");
    match linux::missing() {
        None => on_kvm(linux::tell),
        Some(reason) => {
            println!("... but {reason}; so it is pulse.");
            on_kvm(pulse::tell)
        }
    }
}

fn on_kvm(tell: fn() -> anyhow::Result<bool>) -> anyhow::Result<bool> {
    if let Some(reason) = ground::no_kvm() {
        anyhow::bail!("{reason}; `stillpoint doctor` shows what this host lacks");
    }
    tell()
}

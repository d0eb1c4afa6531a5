//! What this machine can do.

use std::fs::OpenOptions;

/// Why there is no KVM to test on; `None` if there is.
pub fn no_kvm() -> Option<String> {
    let open = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    open.err().map(|error| format!("/dev/kvm: {error}"))
}

/// Skips the test by name, with the reason, when this machine has no KVM. `make test` counts the
/// lines that begin with `SKIPPED`.
#[macro_export]
macro_rules! needs_kvm {
    () => {
        if let Some(reason) = $crate::ground::no_kvm() {
            eprintln!("SKIPPED {}: {reason}", module_path!());
            return Ok(());
        }
    };
}

/// CPU cores this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#![no_main]
//! Target `machine_spec` of `stillpoint-fuzz`.
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(target) = stillpoint_fuzz::target("machine_spec") {
        (target.run)(bytes);
    }
});

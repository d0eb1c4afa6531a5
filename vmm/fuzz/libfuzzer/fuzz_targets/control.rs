#![no_main]
//! Target `control` of `stillpoint-fuzz`.
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(target) = stillpoint_fuzz::target("control") {
        (target.run)(bytes);
    }
});

#![no_main]
//! Target `saved_state` of `stillpoint-fuzz`.
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(target) = stillpoint_fuzz::target("saved_state") {
        (target.run)(bytes);
    }
});

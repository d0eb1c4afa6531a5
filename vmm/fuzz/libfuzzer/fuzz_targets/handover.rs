#![no_main]
//! Target `handover` of `stillpoint-fuzz`.
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(target) = stillpoint_fuzz::target("handover") {
        (target.run)(bytes);
    }
});

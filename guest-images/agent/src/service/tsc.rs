//! Reads the TSC.
#![allow(unsafe_code)] // There is no safe way to the instruction.

use std::arch::x86_64::{_mm_lfence, _rdtsc};

/// The TSC, not before what stands before it in the program, nor after what stands behind.
pub(super) fn now() -> u64 {
    // SAFETY: LFENCE has no effect but on order, and RDTSC reads a counter; every x86-64
    // processor has both, and Linux lets every process read it unless told otherwise.
    unsafe {
        _mm_lfence();
        let now = _rdtsc();
        _mm_lfence();
        now
    }
}

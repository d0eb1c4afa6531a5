//! Memory that is at hand when it is needed: a page fault costs more than most steps of a freeze.
#![allow(unsafe_code)] // The allocator's settings.

use std::ffi::c_int;

/// What a thread allocates between freeze and resume, and a margin; in pieces, as it will be.
const PIECE: usize = 16 << 10;
const PIECES: usize = 6;
/// And what who leads does for each vCPU: its saved section is copied from part to whole, or from whole to part.
const PIECES_PER_VCPU: usize = 3;
/// How deep its stack gets.
const STACK: usize = 16 << 10;

/// Has the calling thread's heap and stack backed by pages for what comes.
pub(crate) fn up() {
    fault_in(PIECES);
}

/// The same for a thread that leads so many vCPUs' through a pause.
pub(crate) fn up_for(vcpus: usize) {
    let pieces = PIECES + PIECES_PER_VCPU * vcpus;
    keep(pieces * PIECE);
    fault_in(pieces);
}

#[inline(never)]
fn fault_in(pieces: usize) {
    let heap: Vec<Vec<u8>> = (0..pieces).map(|_| vec![1; PIECE]).collect();
    std::hint::black_box(&heap);
    let stack = [1u8; STACK];
    std::hint::black_box(&stack);
}

/// Has the allocator take what is large from its heap too, and keep there what is given back, up to so many bytes
/// (mallopt(3); without that it does up to 128 KiB).
fn keep(bytes: usize) {
    let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX);
    for what in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: two numbers of the allocator's, which any thread may set at any time.
        unsafe { libc::mallopt(what, bytes.max(LEAST_KEPT)) };
    }
}

/// What glibc keeps by itself.
const LEAST_KEPT: c_int = 128 << 10;

//! Memory that is at hand when it is needed: a page fault costs more than most steps of a freeze.

/// What a thread allocates between freeze and resume, and a margin; in pieces that the allocator takes from
/// its heap and keeps there (glibc: below `M_MMAP_THRESHOLD`, together below `M_TRIM_THRESHOLD`).
const PIECE: usize = 16 << 10;
const PIECES: usize = 6;
/// How deep its stack gets.
const STACK: usize = 16 << 10;

/// Has the calling thread's heap and stack backed by pages for what comes.
#[inline(never)]
pub(crate) fn up() {
    let heap: Vec<Vec<u8>> = (0..PIECES).map(|_| vec![1; PIECE]).collect();
    std::hint::black_box(&heap);
    let stack = [1u8; STACK];
    std::hint::black_box(&stack);
}

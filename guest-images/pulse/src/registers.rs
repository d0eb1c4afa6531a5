//! Whether the registers keep what was put into them while time passes.

use core::arch::asm;

/// Turns of the wait: some microseconds, so that a good part of all interruptions falls into it.
const TURNS: u64 = 8192;

/// Fills xmm0 to xmm15 and r8 to r15 with a pattern made of `seed`, waits, and compares. Returns
/// the number of registers that differ.
pub(crate) fn check(seed: u64) -> u64 {
    let differ: u64;
    // SAFETY: every register written is named; no memory is touched.
    unsafe {
        asm!(
            // Register n holds the seed rotated by n, twice over.
            ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            "movq xmm\\n, rdi",
            "punpcklqdq xmm\\n, xmm\\n",
            "rol rdi, 1",
            ".endr",
            ".irp n, 8,9,10,11,12,13,14,15",
            "mov r\\n, rdi",
            "rol rdi, 1",
            ".endr",
            "2: dec rcx",
            "jnz 2b",
            "ror rdi, 24",
            "xor eax, eax",
            ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            "movq rdx, xmm\\n",
            "xor rdx, rdi",
            "mov rsi, rdx",
            "psrldq xmm\\n, 8",
            "movq rdx, xmm\\n",
            "xor rdx, rdi",
            "or rsi, rdx",
            "neg rsi",          // carry: the two were not zero
            "adc rax, 0",
            "rol rdi, 1",
            ".endr",
            ".irp n, 8,9,10,11,12,13,14,15",
            "xor r\\n, rdi",
            "neg r\\n",
            "adc rax, 0",
            "rol rdi, 1",
            ".endr",
            inout("rdi") seed | 1 => _,
            inout("rcx") TURNS => _,
            out("rax") differ, out("rdx") _, out("rsi") _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nomem, nostack),
        );
    }
    differ
}

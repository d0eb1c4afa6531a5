//! Values held in registers for a while.
#![allow(unsafe_code)] // Only assembly can say which value is in which register, and for how long.

use std::arch::asm;

/// How long values are held: rounds of a loop of two instructions.
const ROUNDS: u64 = 500_000;
/// MXCSR and x87 control word as programs have them (System V ABI, 3.4.1).
const MXCSR: u32 = 0x1f80;
const X87_CONTROL: u16 = 0x037f;

/// What is held. The layout is the assembly's.
#[repr(C, align(64))]
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Registers {
    /// YMM0 to YMM15; without AVX the lower half of each is XMM0 to XMM15.
    vector: [[u64; 4]; 16],
    /// R8 to R15.
    general: [u64; 8],
    /// Four of the x87 stack, as doubles.
    x87: [f64; 4],
    /// Rounding towards zero, say, where programs round to nearest.
    mxcsr: u32,
    /// The same for the x87.
    x87_control: u16,
}

impl Registers {
    /// Values at random.
    pub(crate) fn random(random: &mut fastrand::Rng) -> Self {
        let rounding = random.u16(..4);
        Self {
            vector: [(); 16].map(|()| [(); 4].map(|()| random.u64(..))),
            general: [(); 8].map(|()| random.u64(..)),
            x87: [(); 4].map(|()| random.f64()),
            mxcsr: MXCSR | u32::from(rounding) << 13,
            x87_control: X87_CONTROL | rounding << 10,
        }
    }

    /// The first register that differs, in words.
    pub(crate) fn difference(&self, kept: &Self) -> Option<String> {
        let width = if have_avx() { 4 } else { 2 };
        for (index, (given, kept)) in self.vector.iter().zip(&kept.vector).enumerate() {
            if given[..width] != kept[..width] {
                return Some(format!("vector {index}: {kept:x?}, not {given:x?}"));
            }
        }
        if self.general != kept.general {
            return Some(format!(
                "R8-R15: {:x?}, not {:x?}",
                kept.general, self.general
            ));
        }
        let control = (self.mxcsr, self.x87_control) != (kept.mxcsr, kept.x87_control);
        (control || self.x87 != kept.x87).then(|| format!("x87, MXCSR: {kept:x?}"))
    }
}

/// Whether the vector registers are AVX's.
pub(crate) fn have_avx() -> bool {
    std::arch::is_x86_feature_detected!("avx")
}

/// Loads them all, waits, and stores them all.
pub(crate) fn hold(given: &Registers) -> Registers {
    let mut kept = Registers {
        vector: [[0; 4]; 16],
        general: [0; 8],
        x87: [0.0; 4],
        mxcsr: 0,
        x87_control: 0,
    };
    if have_avx() {
        hold_avx(given, &mut kept);
    } else {
        hold_sse(given, &mut kept);
    }
    kept
}

/// One instruction for each vector register: from what was given, or to what is kept.
macro_rules! vectors {
    ($way:ident $move:literal $register:literal) => {
        vectors!(@$way $move $register
            0 0, 1 32, 2 64, 3 96, 4 128, 5 160, 6 192, 7 224, 8 256, 9 288, 10 320, 11 352,
            12 384, 13 416, 14 448, 15 480)
    };
    (@load $move:literal $register:literal $($number:literal $at:literal),*) => {
        concat!($($move, " ", $register, $number, ", [{given} + ", $at, "]\n"),*)
    };
    (@store $move:literal $register:literal $($number:literal $at:literal),*) => {
        concat!($($move, " [{kept} + ", $at, "], ", $register, $number, "\n"),*)
    };
}

/// The same code for both, but for the vector instruction, its registers, and what ends it.
macro_rules! hold {
    ($name:ident, $move:literal, $register:literal, $end:literal) => {
        fn $name(given: &Registers, kept: &mut Registers) {
            // SAFETY: reads all of `given` and writes all of `kept`, both valid for it, at the
            // offsets that `repr(C)` gives their fields (checked below). Every register that
            // is changed is listed; the x87 stack, MXCSR and the x87 control word are as the
            // ABI wants them at the end. The instructions are there: the caller has looked.
            unsafe {
                asm!(
                    vectors!(load $move $register),
                    "mov r8, [{given} + 512]", "mov r9, [{given} + 520]",
                    "mov r10, [{given} + 528]", "mov r11, [{given} + 536]",
                    "mov r12, [{given} + 544]", "mov r13, [{given} + 552]",
                    "mov r14, [{given} + 560]", "mov r15, [{given} + 568]",
                    "fld qword ptr [{given} + 600]", "fld qword ptr [{given} + 592]",
                    "fld qword ptr [{given} + 584]", "fld qword ptr [{given} + 576]",
                    "ldmxcsr [{given} + 608]",
                    "fldcw [{given} + 612]",
                    "2:",
                    "dec {rounds}",
                    "jnz 2b",
                    "stmxcsr [{kept} + 608]",
                    "fnstcw [{kept} + 612]",
                    "fldcw [{control}]",
                    "ldmxcsr [{mxcsr}]",
                    "fstp qword ptr [{kept} + 576]", "fstp qword ptr [{kept} + 584]",
                    "fstp qword ptr [{kept} + 592]", "fstp qword ptr [{kept} + 600]",
                    "mov [{kept} + 512], r8", "mov [{kept} + 520], r9",
                    "mov [{kept} + 528], r10", "mov [{kept} + 536], r11",
                    "mov [{kept} + 544], r12", "mov [{kept} + 552], r13",
                    "mov [{kept} + 560], r14", "mov [{kept} + 568], r15",
                    vectors!(store $move $register),
                    $end,
                    given = in(reg) given,
                    kept = in(reg) kept,
                    control = in(reg) &X87_CONTROL,
                    mxcsr = in(reg) &MXCSR,
                    rounds = inout(reg) ROUNDS => _,
                    out("r8") _, out("r9") _, out("r10") _, out("r11") _,
                    out("r12") _, out("r13") _, out("r14") _, out("r15") _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                    out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                    out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                    out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                    options(nostack),
                );
            }
        }
    };
}

hold!(hold_avx, "vmovdqu", "ymm", "vzeroupper");
hold!(hold_sse, "movdqu", "xmm", "");

const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(Registers, vector) == 0 && offset_of!(Registers, general) == 512);
    assert!(offset_of!(Registers, x87) == 576 && offset_of!(Registers, mxcsr) == 608);
    assert!(offset_of!(Registers, x87_control) == 612);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_is_kept_by_both() {
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..3 {
            let given = Registers::random(&mut random);
            assert_eq!(given.difference(&hold(&given)), None);
            let mut kept = Registers::random(&mut random);
            hold_sse(&given, &mut kept);
            for (given, kept) in given.vector.iter().zip(&kept.vector) {
                assert_eq!(given[..2], kept[..2]);
            }
            assert_eq!((given.general, given.x87), (kept.general, kept.x87));
            assert_eq!(
                (given.mxcsr, given.x87_control),
                (kept.mxcsr, kept.x87_control)
            );
        }
    }

    #[test]
    fn every_register_that_changes_shows() {
        let given = Registers::random(&mut fastrand::Rng::with_seed(1));
        let changes: [fn(&mut Registers); 5] = [
            |registers| registers.vector[15][1] ^= 1,
            |registers| registers.general[7] ^= 1,
            |registers| registers.x87[3] += 1.0,
            |registers| registers.mxcsr ^= 1 << 13,
            |registers| registers.x87_control ^= 1 << 10,
        ];
        for change in changes {
            let mut kept = given.clone();
            change(&mut kept);
            assert!(given.difference(&kept).is_some());
        }
    }
}

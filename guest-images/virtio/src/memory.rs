//! Memory that a device reads and writes while we do.
//!
//! `unsafe` lives here, and in no other module of the crate: such memory may only be reached by
//! volatile accesses, since it changes under us, and the device knows it by its address. Pulse maps
//! all memory one to one, so an address is a guest-physical one as well.
//!
//! Accesses are little endian and naturally aligned. One beyond the end is a bug of ours, and
//! panics.
#![allow(unsafe_code)]

use core::sync::atomic::{Ordering, fence};

/// A range of it. Copies are the same memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    base: usize,
    len: usize,
}

macro_rules! access {
    ($get:ident, $set:ident, $int:ty) => {
        /// Reads an integer at an offset.
        pub fn $get(&self, at: usize) -> $int {
            let address = self.at(at, size_of::<$int>());
            // SAFETY: within the area, by `at`; any bytes are an integer.
            unsafe { (address as *const $int).read_volatile() }
        }

        /// Writes one.
        pub fn $set(&self, at: usize, value: $int) {
            let address = self.at(at, size_of::<$int>());
            // SAFETY: within the area, which is ours to write, by `new`.
            unsafe { (address as *mut $int).write_volatile(value) }
        }
    };
}

impl Area {
    /// The `len` bytes at `base`.
    ///
    /// # Safety
    ///
    /// They are memory that nothing reaches but copies of this area, devices that were given
    /// addresses in it, and volatile readers; and that stays for as long as they do.
    pub const unsafe fn new(base: usize, len: usize) -> Self {
        Self { base, len }
    }

    access!(get8, set8, u8);
    access!(get16, set16, u16);
    access!(get32, set32, u32);
    access!(get64, set64, u64);

    /// Where it begins.
    pub const fn address(&self) -> u64 {
        self.base as u64
    }

    /// Its length.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no byte.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes of it from `at` on.
    pub fn part(&self, at: usize, len: usize) -> Self {
        let end = at.checked_add(len).filter(|end| *end <= self.len);
        assert!(end.is_some(), "{len} bytes at {at} of {}", self.len);
        Self {
            base: self.base + at,
            len,
        }
    }

    /// Takes `len` bytes off its front, at a multiple of `align`.
    pub fn take(&mut self, len: usize, align: usize) -> Self {
        let skip = self.base.next_multiple_of(align) - self.base;
        let taken = self.part(skip, len);
        *self = self.part(skip + len, self.len - skip - len);
        taken
    }

    /// Copies bytes in.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        for (offset, byte) in bytes.iter().enumerate() {
            self.set8(at + offset, *byte);
        }
    }

    /// Copies bytes out.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        for (offset, byte) in bytes.iter_mut().enumerate() {
            *byte = self.get8(at + offset);
        }
    }

    /// Writes one byte all over it.
    pub fn fill(&self, byte: u8) {
        let words = if self.base.is_multiple_of(8) {
            self.len / 8
        } else {
            0
        };
        for word in 0..words {
            self.set64(word * 8, u64::from_ne_bytes([byte; 8]));
        }
        for at in words * 8..self.len {
            self.set8(at, byte);
        }
    }

    /// Whether every byte of it is this one.
    pub fn is_all(&self, byte: u8) -> bool {
        let words = if self.base.is_multiple_of(8) {
            self.len / 8
        } else {
            0
        };
        (0..words).all(|word| self.get64(word * 8) == u64::from_ne_bytes([byte; 8]))
            && (words * 8..self.len).all(|at| self.get8(at) == byte)
    }

    fn at(&self, at: usize, size: usize) -> usize {
        let end = at.checked_add(size).filter(|end| *end <= self.len);
        assert!(end.is_some(), "{size} bytes at {at} of {}", self.len);
        let address = self.base + at;
        debug_assert!(address.is_multiple_of(size), "{address:#x} is not aligned");
        address
    }

    /// Memory of a test, never given back.
    #[cfg(test)]
    pub fn of_test(len: usize) -> Self {
        let memory = vec![0u128; len.div_ceil(16) + 256].leak();
        let base = memory.as_mut_ptr().addr();
        memory.as_mut_ptr().expose_provenance();
        let skip = base.next_multiple_of(4096) - base;
        // SAFETY: leaked, and known to nobody else.
        unsafe { Self::new(base + skip, len) }
    }
}

/// What was written before is seen before what is written after (2.7.13.3.1).
pub fn write_barrier() {
    fence(Ordering::Release);
}

/// What is read after was not read before (2.7.14).
pub fn read_barrier() {
    fence(Ordering::Acquire);
}

/// What was written before is seen before anything is read after: for "I have published, do you
/// still sleep?" (2.7.13.4.1).
pub fn full_barrier() {
    fence(Ordering::SeqCst);
}

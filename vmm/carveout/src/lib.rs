//! The carve-out: memory of the host that no kernel counts as its own, so that what lies in it is
//! still there after a kexec (`memmap=SIZE!ADDRESS` and device-dax).
//!
//! ```text
//!  0         1 MiB      2 MiB
//!  | directory | directory | RAM of a | record of a | ...    extents of whole 2 MiB
//!  |  copy 0   |  copy 1   |          |             |
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`layout`] | extents, and finding room |
//! | [`directory`] | whose extents these are, and which jump is under way: written by the daemon alone |
//! | [`record`] | one guest's saved state beside its RAM: written by its VMM alone |
//! | [`mark`] | the word that says whether a record may be run, and by whom |
//! | [`map`] | the memory itself |
//! | [`area`] | the directory in the memory |
//! | [`wall`] | the host's wall clock carried over by its TSC |
//!
//! A crate of its own, as the two contracts beside it are: what one kernel's daemon and VMM leave
//! here, another release of both reads under the next kernel. The daemon reads directory, mark and
//! a record's label; the saved state in a record is bytes to it.
//!
//! **What is flushed, and why.** A kexec keeps the caches coherent: a store that was made before the
//! system call is read by the next kernel through the same cached mapping. So what matters is the
//! *order* of stores, which x86 keeps and fences here keep the compiler to. Lines are written back
//! all the same (CLFLUSH): a processor reset drops dirty lines, and a mark that says *consumed* must
//! not turn back into one that says *stored*. On a file (tests, fsdax) `fdatasync` comes on top.
//!
//! Must never: run anything, open `/dev/kvm`, or look into saved state.

pub mod area;
pub mod directory;
pub mod layout;
pub mod map;
pub mod mark;
pub mod record;
pub mod wall;

//! VMM processes of this host: started, found, watched, paired for a swap, ended.
//!
//! | module | what it does |
//! |---|---|
//! | [`places`] | where things lie in the run and state directories |
//! | [`binaries`] | releases on disk; hands out the very fd whose digest was verified |
//! | [`trust`] | whose signatures of manifests count |
//! | [`launch`] | what runs in the child between fork and the VMM: waits, then becomes it |
//! | [`spawn`] | starts a VMM process and waits for its word |
//! | [`modules`] | KVM's modules: which are loaded, who holds them, their exchange |
//! | [`process`] | one process, held by its pidfd |
//! | [`reaper`] | children that ended and that nobody asked how |
//! | [`find`] | a VMM by its control socket, and the proof that it is the one |
//! | [`pair`] | predecessor and successor of a swap |
//! | [`scope`] | systemd scopes, so that guests outlive the daemon's service |
//! | [`carve_out`] | memory that outlives the kernel, and who has which part of it |
//! | [`kexec`] | the next kernel |
//! | [`custody`] | guest RAM and ownership pages in systemd's fd store |
//!
//! A pid alone is never trusted: every process is held by a pidfd that was checked against its
//! start time, and every socket by a proof of the VM's secret.

pub mod binaries;
pub mod carve_out;
pub mod custody;
pub mod find;
pub mod kernel_releases;
pub mod kexec;
pub mod kvm_releases;
pub mod launch;
pub mod modules;
pub mod next_kernel;
pub mod pair;
mod pidfd;
pub mod places;
pub mod process;
pub mod reaper;
pub mod reserves;
pub mod scope;
pub mod spawn;
pub mod trust;

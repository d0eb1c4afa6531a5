//! Debian's kernels, QEMU and busybox as packages, and guest images made of them.
//!
//! Nothing binary is in the repository: packages come from the mirror that the machine's own apt is
//! set up for, are verified by apt, and are unpacked (never installed) into a cache outside the
//! work tree. With a warm cache nothing here needs a network.
//!
//! | module | what it holds |
//! |---|---|
//! | [`sources`] | which mirror: read from apt's configuration |
//! | [`apt`] | a private apt over other suites |
//! | [`cache`] | the folder outside the work tree, and its lock |
//! | [`packages`] | what is wanted, fetched and unpacked |
//! | [`unpack`] | packages taken apart |
//! | [`luo`] | a kernel with live update, built of Debian's source |
//! | [`kernel`] | `vmlinux` out of a `bzImage` |
//! | [`modules`] | kernel modules in the order they load in |
//! | [`initramfs`] | a cpio archive being written |
//! | [`guest`] | the images that test guests boot |
//! | [`programs`] | programs with their libraries, for an initramfs |
//! | [`etcd`] | an etcd on this machine, for tests and demos |
//! | [`qemu`] | the unpacked QEMU, ready to be started |
//! | [`progress`] | telling whoever waits |

pub mod apt;
pub mod cache;
pub mod etcd;
pub mod guest;
pub mod initramfs;
pub mod kernel;
pub mod luo;
pub mod modules;
pub mod packages;
pub mod programs;
pub mod progress;
pub mod qemu;
pub mod sources;
pub mod unpack;

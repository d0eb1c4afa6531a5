//! A host that jumps without us, on a command line of the caller's choice. At once and with nothing brought
//! to an end it is one that crashes, as far as memory can tell. Only for an emulated host.
#![allow(unsafe_code)] // kexec_file_load has no wrapper.

use std::arch::asm;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, ensure};
use rustix::system::{RebootCommand, reboot};

/// arch/x86/entry/syscalls/syscall_64.tbl
const KEXEC_FILE_LOAD: i64 = 320;

/// Loads a kernel and jumps into it; returns only an error.
pub fn into(image: &Path, initrd: &Path, command_line: &str) -> anyhow::Result<()> {
    load(image, initrd, command_line)?;
    jump()
}

/// Jumps into the kernel that is loaded; returns only an error.
pub fn jump() -> anyhow::Result<()> {
    reboot(RebootCommand::Kexec).context("jumping")
}

/// Loads a kernel.
pub fn load(image: &Path, initrd: &Path, command_line: &str) -> anyhow::Result<()> {
    let (kernel, disk) = (File::open(image)?, File::open(initrd)?);
    let text = CString::new(command_line)?;
    let len = text.as_bytes_with_nul().len();
    let done: i64;
    // SAFETY: the system call reads two open files and a string of `len` bytes, and writes no memory of
    // ours; rcx and r11 are what SYSCALL itself uses.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") KEXEC_FILE_LOAD => done,
            in("rdi") i64::from(kernel.as_raw_fd()),
            in("rsi") i64::from(disk.as_raw_fd()),
            in("rdx") len,
            in("r10") text.as_ptr(),
            in("r8") 0i64,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    ensure!(done == 0, "kexec_file_load: errno {}", -done);
    Ok(())
}

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

/// Takes the kernel away that is loaded, whoever loaded it.
pub fn unload() -> anyhow::Result<()> {
    const UNLOAD: i64 = 1;
    let done = file_load([-1, -1, 0, 0, UNLOAD]);
    ensure!(done == 0, "kexec_file_load: errno {}", -done);
    Ok(())
}

/// Loads a kernel.
pub fn load(image: &Path, initrd: &Path, command_line: &str) -> anyhow::Result<()> {
    let (kernel, disk) = (File::open(image)?, File::open(initrd)?);
    let text = CString::new(command_line)?;
    let len = text.as_bytes_with_nul().len();
    let [kernel, disk] = [&kernel, &disk].map(|file| i64::from(file.as_raw_fd()));
    let text = (i64::try_from(len)?, text.as_ptr() as i64);
    let done = file_load([kernel, disk, text.0, text.1, 0]);
    ensure!(done == 0, "kexec_file_load: errno {}", -done);
    Ok(())
}

/// `kexec_file_load`: two files, length and address of the command line, flags.
fn file_load([kernel, disk, len, text, flags]: [i64; 5]) -> i64 {
    let done: i64;
    // SAFETY: the system call reads two files that are open, if it is given any, and a string of `len` bytes that
    // outlives it, and writes no memory of ours; rcx and r11 are what SYSCALL itself uses.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") KEXEC_FILE_LOAD => done,
            in("rdi") kernel,
            in("rsi") disk,
            in("rdx") len,
            in("r10") text,
            in("r8") flags,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    done
}

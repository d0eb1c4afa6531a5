//! The next kernel: loaded while guests run, jumped into when they stand still.
#![allow(unsafe_code)] // kexec_file_load has no wrapper.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::system::{RebootCommand, reboot};

// include/uapi/linux/kexec.h
const UNLOAD: libc::c_ulong = 1;
const NO_INITRAMFS: libc::c_ulong = 4;

/// Why no kernel was loaded.
#[derive(Debug, thiserror::Error)]
pub enum KexecError {
    /// An image.
    #[error("cannot open {path}: {source}")]
    Image {
        /// Which.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The kernel refuses.
    #[error("this kernel does not load {path}: {source}{remedy}")]
    Load {
        /// Which.
        path: String,
        /// Why not.
        source: std::io::Error,
        /// What to do.
        remedy: &'static str,
    },
}

/// Whether this kernel can load another, as far as can be told without doing it.
pub fn is_known() -> Result<(), String> {
    let read = |path: &str| std::fs::read_to_string(path);
    if read("/sys/kernel/kexec_loaded").is_err() {
        return Err("this kernel has no kexec (CONFIG_KEXEC_FILE)".into());
    }
    let disabled = read("/proc/sys/kernel/kexec_load_disabled");
    match disabled.is_ok_and(|text| text.trim() == "1") {
        true => {
            Err("kexec was switched off until the next boot (kernel.kexec_load_disabled)".into())
        }
        false => Ok(()),
    }
}

/// Loads a kernel, in place of one that is loaded.
pub fn load(image: &Path, initrd: Option<&Path>, command_line: &str) -> Result<(), KexecError> {
    let open = |path: &Path| {
        File::open(path).map_err(|source| KexecError::Image {
            path: path.display().to_string(),
            source,
        })
    };
    let kernel = open(image)?;
    let disk = initrd.map(open).transpose()?;
    let failed = |source: std::io::Error| KexecError::Load {
        path: image.display().to_string(),
        remedy: remedy(&source),
        source,
    };
    let text = CString::new(command_line).map_err(|e| failed(e.into()))?;
    let (fd, flags) = match &disk {
        Some(disk) => (disk.as_raw_fd(), 0),
        None => (-1, NO_INITRAMFS),
    };
    // SAFETY: two descriptors that are open, and a string with its terminator, which is counted.
    let done = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            fd,
            text.as_bytes_with_nul().len(),
            text.as_ptr(),
            flags,
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(failed(std::io::Error::last_os_error())),
    }
}

fn remedy(error: &std::io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => "; the daemon must be root, and the kernel not locked down",
        Some(libc::ENOEXEC) => "; is it a bzImage?",
        Some(libc::EBUSY) => "; another program is loading one",
        Some(libc::ENOKEY | libc::EKEYREJECTED | libc::EBADMSG) => {
            "; its signature is none that this kernel trusts"
        }
        Some(libc::EADDRNOTAVAIL | libc::ENOMEM) => {
            "; there is no room for it in this host's memory"
        }
        _ => "",
    }
}

/// Forgets the kernel that is loaded, if one is.
pub fn unload() {
    // SAFETY: the flag has it look at nothing else.
    let _ = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            -1,
            -1,
            0,
            std::ptr::null::<libc::c_char>(),
            UNLOAD,
        )
    };
}

/// Jumps. Returns only if it could not be done.
pub fn jump() -> std::io::Error {
    match reboot(RebootCommand::Kexec) {
        Ok(()) => std::io::Error::other("the kernel came back from it"),
        Err(errno) => errno.into(),
    }
}

/// `uname -r`.
pub fn running() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// The running kernel's command line.
pub fn command_line() -> String {
    std::fs::read_to_string("/proc/cmdline").unwrap_or_default()
}

//! The kernels that `make images` made bootable.

use std::path::{Path, PathBuf};

use anyhow::Context;

pub use stillpoint_images::packages::Kernel;

use crate::releases::root;

/// The forms a kernel is booted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As the package has it.
    BzImage,
    /// Unpacked, an ELF.
    Vmlinux,
}

/// The files of one kernel's guests.
#[derive(Clone, Debug)]
pub struct Files(PathBuf);

impl Files {
    /// Of this kernel; they must be there.
    pub fn of(kernel: Kernel) -> anyhow::Result<Self> {
        let dir = root().join("target/images").join(kernel.name());
        anyhow::ensure!(
            dir.join("initramfs").is_file(),
            "{} is not there; run `make images`",
            dir.display()
        );
        Ok(Self(dir))
    }

    /// The kernel.
    pub fn kernel(&self, form: Form) -> PathBuf {
        self.0.join(match form {
            Form::BzImage => "bzImage",
            Form::Vmlinux => "vmlinux",
        })
    }

    /// The initramfs with the agent as its init.
    pub fn initramfs(&self) -> PathBuf {
        self.0.join("initramfs")
    }
}

/// Writes an initramfs of that kernel into `dir` in which there is curl too; where it is.
pub fn with_curl(kernel: Kernel, dir: &Path) -> anyhow::Result<PathBuf> {
    let (path, curl) = (dir.join("initrd"), root().join("target/images/curl"));
    let mut bytes = std::fs::read(Files::of(kernel)?.initramfs())?;
    // One archive behind the other: the kernel unpacks both.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let missing = || format!("{} is not there; run `make images`", curl.display());
    bytes.extend(std::fs::read(&curl).with_context(missing)?);
    std::fs::write(&path, bytes)?;
    Ok(path)
}

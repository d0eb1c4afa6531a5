//! The kernels that `make images` made bootable.

use std::path::PathBuf;

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

/// An archive to lay behind any of their initramfs.
pub fn archive(name: &str) -> PathBuf {
    root().join("target/images").join(name)
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

    /// The initramfs, and behind it these archives: the kernel unpacks one after the other.
    pub fn with_archives(&self, names: &[&str]) -> anyhow::Result<Vec<u8>> {
        let mut bytes = std::fs::read(self.initramfs())?;
        for name in names {
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            let path = archive(name);
            let archive = std::fs::read(&path);
            bytes.extend(
                archive.with_context(|| {
                    format!("{} is not there; run `make images`", path.display())
                })?,
            );
        }
        Ok(bytes)
    }

    /// The initramfs with the agent as its init.
    pub fn initramfs(&self) -> PathBuf {
        self.0.join("initramfs")
    }
}

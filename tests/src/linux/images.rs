//! The kernels that `make images` made bootable.

use std::path::PathBuf;

use crate::releases::root;

/// A Debian kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// bookworm's, 6.1.
    Bookworm,
    /// The newest in trixie-backports.
    Backports,
}

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

impl Kernel {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Bookworm, Self::Backports];

    /// Name of its folder among the images.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Backports => "backports",
        }
    }

    /// Its files, which must be there.
    pub fn files(self) -> anyhow::Result<Files> {
        let dir = root().join("target/images").join(self.name());
        anyhow::ensure!(
            dir.join("initramfs").is_file(),
            "{} is not there; run `make images`",
            dir.display()
        );
        Ok(Files(dir))
    }
}

impl Files {
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

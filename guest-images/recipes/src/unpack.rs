//! Packages taken apart: into a folder, never onto the machine; and a kernel's files found in there.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::kernel::{PayloadError, vmlinux};

/// Why a package can't be taken apart.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// `dpkg-deb`, or a file.
    #[error("{}: {why}", path.display())]
    File {
        /// What was unpacked or read.
        path: PathBuf,
        /// Why it failed.
        why: String,
    },
    /// The kernel's image.
    #[error("{}: {error}", path.display())]
    Payload {
        /// The image.
        path: PathBuf,
        /// Why it has no ELF file.
        error: PayloadError,
    },
}

/// A kernel, unpacked.
#[derive(Clone, Debug)]
pub struct KernelFiles {
    /// What `uname -r` says in it.
    pub release: String,
    /// As the boot loader takes it.
    pub bzimage: PathBuf,
    /// The ELF file in it.
    pub vmlinux: PathBuf,
    /// Its `lib/modules/RELEASE`.
    pub modules: PathBuf,
}

/// Unpacks a package into a folder.
pub(crate) fn extract(deb: &Path, into: &Path) -> Result<(), UnpackError> {
    let output = Command::new("dpkg-deb")
        .arg("-x")
        .arg(deb)
        .arg(into)
        .output();
    let why = match output {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => format!("starting dpkg-deb: {error}"),
    };
    Err(UnpackError::File {
        path: deb.to_owned(),
        why,
    })
}

/// Finds a kernel's files; Debian moved them from `/boot` and `/lib` to `/usr/lib/modules`.
pub(crate) fn kernel_files(tree: &Path) -> Result<KernelFiles, UnpackError> {
    let missing = |why: &str| UnpackError::File {
        path: tree.to_owned(),
        why: why.to_owned(),
    };
    let folders = ["usr/lib/modules", "lib/modules"].map(|folder| tree.join(folder));
    let modules = folders
        .iter()
        .flat_map(|folder| std::fs::read_dir(folder).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .find(|path| path.join("kernel").is_dir())
        .ok_or_else(|| missing("the kernel's packages have no lib/modules/RELEASE"))?;
    let release = modules.file_name().and_then(|name| name.to_str());
    let release = release
        .ok_or_else(|| missing("a kernel's release that is no text"))?
        .to_owned();
    let bzimage = [
        tree.join(format!("boot/vmlinuz-{release}")),
        modules.join("vmlinuz"),
    ]
    .into_iter()
    .find(|path| path.is_file())
    .ok_or_else(|| missing("the kernel's packages have no vmlinuz"))?;
    Ok(KernelFiles {
        vmlinux: tree.join("vmlinux"),
        release,
        bzimage,
        modules,
    })
}

pub(crate) fn write_vmlinux(files: &KernelFiles) -> Result<(), UnpackError> {
    let failed = |path: &Path, error: std::io::Error| UnpackError::File {
        path: path.to_owned(),
        why: error.to_string(),
    };
    let image = std::fs::read(&files.bzimage).map_err(|error| failed(&files.bzimage, error))?;
    let elf = vmlinux(&image).map_err(|error| UnpackError::Payload {
        path: files.bzimage.clone(),
        error,
    })?;
    std::fs::write(&files.vmlinux, elf).map_err(|error| failed(&files.vmlinux, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_of_either_layout_is_found() {
        for (modules, image) in [
            ("lib/modules/6.1", "boot/vmlinuz-6.1"),
            ("usr/lib/modules/7.3", "usr/lib/modules/7.3/vmlinuz"),
        ] {
            let dir = tempfile::tempdir().expect("a folder");
            std::fs::create_dir_all(dir.path().join(modules).join("kernel")).expect("a folder");
            std::fs::create_dir_all(dir.path().join("boot")).expect("a folder");
            assert!(kernel_files(dir.path()).is_err(), "no image yet");
            std::fs::write(dir.path().join(image), "").expect("written");
            let files = kernel_files(dir.path()).expect("found");
            assert!(modules.ends_with(&files.release), "{files:?}");
        }
    }
}

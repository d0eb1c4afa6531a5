//! Kernels on this host's disk that rollouts may bring, as packages lay them out. The name of one is what it says of
//! itself (`uname -r`): so a host that runs it already is known to, and needs no jump.
//!
//! ```text
//!  BOOT_DIR/vmlinuz-6.1.0-38-amd64   initrd.img-6.1.0-38-amd64, initramfs-6.1.0-38-amd64.img, or none
//! ```

use std::path::{Path, PathBuf};

use super::{kvm_releases, next_kernel};
use crate::model::validate_version;

/// What images are called.
const IMAGE: &str = "vmlinuz-";

/// A kernel that can be jumped into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelRelease {
    /// Its image.
    pub image: PathBuf,
    /// Its initial RAM disk.
    pub initrd: Option<PathBuf>,
}

/// Why there is none of that name.
#[derive(Debug, thiserror::Error)]
pub enum NoKernelRelease {
    /// No file.
    #[error(
        "there is no kernel {0:?} in {1} (vmlinuz-{0}): install its package, or say where it is by --boot-dir"
    )]
    Absent(String, String),
    /// Another kernel.
    #[error("{0} is {1}, and not the kernel that it is called by")]
    Another(String, String),
    /// Others may write it.
    #[error(transparent)]
    Open(#[from] kvm_releases::NoKvmRelease),
}

/// The kernels that can be brought.
pub fn versions(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let versions = names.filter_map(|name| Some(name.strip_prefix(IMAGE)?.to_owned()));
    let mut found: Vec<_> = versions
        .filter(|version| find(dir, version).is_ok())
        .collect();
    found.sort();
    found
}

/// The kernel of that name.
pub fn find(dir: &Path, version: &str) -> Result<KernelRelease, NoKernelRelease> {
    let image = dir.join(format!("{IMAGE}{version}"));
    if validate_version(version).is_err() || !image.is_file() {
        return Err(NoKernelRelease::Absent(
            version.into(),
            dir.display().to_string(),
        ));
    }
    match next_kernel::release(&image) {
        Some(says) if says == version => {}
        says => {
            let says = says.unwrap_or_else(|| "no image of a kernel".into());
            return Err(NoKernelRelease::Another(image.display().to_string(), says));
        }
    }
    let disks = [
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
    ];
    let initrd = disks
        .map(|name| dir.join(name))
        .into_iter()
        .find(|disk| disk.is_file());
    for path in [Some(dir), Some(image.as_path()), initrd.as_deref()]
        .into_iter()
        .flatten()
    {
        kvm_releases::is_ours(path)?;
    }
    Ok(KernelRelease { image, initrd })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_kernel_is_what_it_says_and_what_is_called_otherwise_is_none() {
        let dir = tempfile::tempdir().expect("a folder");
        let put = |name: &str, bytes: &[u8], mode| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).expect("written");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))
                .expect("its mode");
        };
        let image = next_kernel::tests::image("6.1.0-38-amd64");
        put("vmlinuz-6.1.0-38-amd64", &image, 0o644);
        put("initrd.img-6.1.0-38-amd64", b"", 0o600);
        put("vmlinuz-6.1.0-39-amd64", &image, 0o644);
        put("vmlinuz-text", b"text", 0o644);
        assert_eq!(versions(dir.path()), ["6.1.0-38-amd64"]);
        let found = find(dir.path(), "6.1.0-38-amd64").expect("it");
        assert_eq!(
            found.initrd,
            Some(dir.path().join("initrd.img-6.1.0-38-amd64"))
        );
        let why = |name: &str| find(dir.path(), name).expect_err("none").to_string();
        assert!(why("6.1.0-39-amd64").contains("is 6.1.0-38-amd64, and not"));
        assert!(why("text").contains("no image of a kernel"));
        assert!(why("7.0").contains("install its package"));
        put("initrd.img-6.1.0-38-amd64", b"", 0o666);
        assert!(why("6.1.0-38-amd64").contains("written by others"));
    }
}

//! QEMU out of its unpacked packages: started through the loader and the libraries that came with
//! it, so neither the machine's QEMU nor its C library matters.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::packages::Unpacked;

/// Where Debian puts libraries of the architecture.
const LIBRARIES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

/// An unpacked QEMU.
#[derive(Clone, Debug)]
pub struct Qemu {
    tree: PathBuf,
}

impl Qemu {
    /// That of the set [`crate::packages::Set::Qemu`].
    pub fn of(set: &Unpacked) -> Self {
        Self {
            tree: set.tree.clone(),
        }
    }

    /// `qemu-system-x86_64`, ready for arguments.
    pub fn system(&self) -> Command {
        let loader = self.tree.join(LIBRARIES[0]).join("ld-linux-x86-64.so.2");
        let paths = LIBRARIES.map(|folder| self.tree.join(folder).display().to_string());
        let mut command = Command::new(loader);
        command
            .arg("--library-path")
            .arg(paths.join(":"))
            .arg(self.tree.join("usr/bin/qemu-system-x86_64"))
            .arg("-L")
            .arg(self.tree.join("usr/share/qemu"))
            .arg("-L")
            .arg(self.tree.join("usr/share/seabios"))
            // It finds these (TCG is one) beside its own program, which now is the loader.
            .env("QEMU_MODULE_DIR", self.tree.join(LIBRARIES[1]).join("qemu"));
        command
    }

    /// The smaller program that has only the machine type `microvm`, what it needs, and where each
    /// goes: to be put into an emulated host, where it shows how another VMM does.
    pub fn microvm(&self) -> Vec<(PathBuf, String)> {
        let libraries = [
            "ld-linux-x86-64.so.2",
            "libc.so.6",
            "libm.so.6",
            "libpixman-1.so.0",
            "libz.so.1",
            "libseccomp.so.2",
            "libfdt.so.1",
            "libnuma.so.1",
            "libaio.so.1",
            "liburing.so.2",
            "libglib-2.0.so.0",
            "libpcre2-8.so.0",
        ];
        let blobs = [
            "usr/share/qemu/qboot.rom",
            "usr/share/qemu/pvh.bin",
            "usr/share/qemu/linuxboot_dma.bin",
            "usr/share/qemu/kvmvapic.bin",
            "usr/share/seabios/bios-microvm.bin",
        ];
        let mut files = vec![(
            self.tree.join("usr/bin/qemu-system-x86_64-microvm"),
            "/qemu/qemu".to_owned(),
        )];
        let find = |name: &str| {
            let places = LIBRARIES.map(|folder| self.tree.join(folder).join(name));
            places.into_iter().find(|path| path.exists())
        };
        for name in libraries {
            files.extend(find(name).map(|path| (path, format!("/qemu/lib/{name}"))));
        }
        for blob in blobs {
            let path = self.tree.join(blob);
            let name = Path::new(blob)
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            files.push((path, format!("/qemu/share/{name}")));
        }
        files
    }
}

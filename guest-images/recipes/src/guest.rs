//! The images that test guests boot: kernel, and an initramfs with the agent as `/init`.
//!
//! In the initramfs: `/init`; `/bin` with busybox under all its names, and the workloads; the kernel
//! modules that a guest of ours needs, listed in `/modules.order` in the order they load in.

use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::initramfs::{ArchiveError, Initramfs};
use crate::modules::{Module, ModuleError, Modules};
use crate::unpack::KernelFiles;

/// What every guest of ours needs.
const NEEDED: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "button",
    "evdev",
    "ptp_kvm",
];
/// What it may have: only newer kernels do.
const WELCOME: &[&str] = &["ptp_vmclock"];

/// `/init` where no agent is given: a shell.
const SHELL_INIT: &str = "\
#!/bin/busybox sh
busybox mkdir -p /proc /sys /dev /run /tmp
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs devtmpfs /dev
while read -r module; do busybox insmod \"$module\" || echo \"init: $module failed\"; done </modules.order
echo 'init: no agent in this image; a shell'
exec busybox setsid busybox cttyhack busybox sh
";

/// Why an image can't be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Modules.
    #[error(transparent)]
    Modules(#[from] ModuleError),
    /// The archive.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// A program.
    #[error("{} is no program that can go into an image: {why}", path.display())]
    Program {
        /// Which.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// A library that a program names.
    #[error("no package in {} has the library {name}", tree.display())]
    Library {
        /// Which.
        name: String,
        /// Where it was looked for.
        tree: PathBuf,
    },
    /// A file.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
}

/// What goes into a guest's initramfs.
#[derive(Clone, Debug)]
pub struct GuestRecipe {
    /// The kernel.
    pub kernel: KernelFiles,
    /// A static busybox.
    pub busybox: PathBuf,
    /// A static program that becomes `/init`; a shell where there is none.
    pub agent: Option<PathBuf>,
    /// A static program that becomes `/bin/load`.
    pub load: Option<PathBuf>,
}

/// What [`GuestRecipe::make`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    /// It was as it is.
    Already,
    /// Written, with this many bytes of initramfs.
    Written(u64),
}

impl GuestRecipe {
    /// Makes `dir` hold `bzImage`, `vmlinux`, `initramfs` and `release` of this recipe.
    pub fn make(&self, dir: &Path) -> Result<Made, ImageError> {
        let key = self.key()?;
        if std::fs::read_to_string(dir.join("key")).is_ok_and(|old| old == key) {
            return Ok(Made::Already);
        }
        file(dir, |dir| std::fs::create_dir_all(dir))?;
        // Whoever reads this folder meanwhile must not take it for complete.
        let _ = std::fs::remove_file(dir.join("key"));
        link(&self.kernel.bzimage, &dir.join("bzImage"))?;
        link(&self.kernel.vmlinux, &dir.join("vmlinux"))?;
        let initramfs = self.initramfs()?;
        let (new, path) = (dir.join("initramfs.new"), dir.join("initramfs"));
        file(&new, |new| std::fs::write(new, &initramfs))?;
        file(&path, |path| std::fs::rename(&new, path))?;
        file(&dir.join("release"), |path| {
            std::fs::write(path, &self.kernel.release)
        })?;
        file(&dir.join("key"), |path| std::fs::write(path, &key))?;
        Ok(Made::Written(initramfs.len() as u64))
    }

    /// The archive.
    pub fn initramfs(&self) -> Result<Vec<u8>, ImageError> {
        let mut archive = Initramfs::new(Vec::new());
        skeleton(&mut archive, &self.busybox)?;
        match &self.agent {
            Some(agent) => archive.copy("init", 0o755, agent)?,
            None => archive.file("init", 0o755, SHELL_INIT.as_bytes())?,
        }
        if let Some(load) = &self.load {
            archive.copy("bin/load", 0o755, load)?;
        }
        let modules = Modules::of(&self.kernel.release, &self.kernel.modules)?;
        let welcome = WELCOME.iter().filter(|name| modules.has(name));
        let wanted: Vec<&str> = NEEDED.iter().chain(welcome).copied().collect();
        add_modules(&mut archive, &modules.closure(&wanted)?)?;
        Ok(archive.finish()?)
    }

    /// What it is made of, in one text: changes when the result would.
    fn key(&self) -> Result<String, ImageError> {
        let mut digest = Sha256::new();
        digest.update(SHELL_INIT);
        for part in [Some(&self.busybox), self.agent.as_ref(), self.load.as_ref()] {
            let content = part
                .map(|path| file(path, |path| std::fs::read(path)))
                .transpose()?;
            digest.update(Sha256::digest(content.unwrap_or_default()));
        }
        for name in NEEDED.iter().chain(WELCOME) {
            digest.update(name);
        }
        let digest: String = digest
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Ok(format!("{} {digest}\n", self.kernel.vmlinux.display()))
    }
}

/// Folders, the console, and busybox under all its names: what any initramfs of ours begins with.
pub fn skeleton<W: Write>(archive: &mut Initramfs<W>, busybox: &Path) -> Result<(), ImageError> {
    for folder in [
        "dev", "proc", "sys", "run", "tmp", "root", "etc", "bin", "mnt",
    ] {
        archive.folder(folder)?;
    }
    // The kernel opens it for /init before devtmpfs is mounted.
    archive.device("dev/console", 5, 1)?;
    archive.copy("bin/busybox", 0o755, busybox)?;
    for applet in applets(busybox)? {
        archive.link(&format!("bin/{applet}"), "busybox")?;
    }
    archive.link("sbin", "bin")?;
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    archive.file("etc/group", 0o644, b"root:x:0:\n")?;
    Ok(())
}

/// The modules under `/lib/modules`, and `/modules.order`.
pub fn add_modules<W: Write>(
    archive: &mut Initramfs<W>,
    modules: &[Module],
) -> Result<(), ImageError> {
    let mut order = String::new();
    for module in modules {
        let path = format!("/lib/modules/{}.ko", module.name);
        archive.file(&path, 0o644, &module.elf)?;
        order.push_str(&path);
        order.push('\n');
    }
    archive.file("modules.order", 0o644, order.as_bytes())?;
    Ok(())
}

/// The names that busybox goes by; it is asked itself.
fn applets(busybox: &Path) -> Result<Vec<String>, ImageError> {
    let output = file(busybox, |path| {
        std::process::Command::new(path).arg("--list").output()
    })?;
    let names = String::from_utf8_lossy(&output.stdout).into_owned();
    let plain = |name: &&str| *name != "busybox" && !name.contains('/') && !name.is_empty();
    Ok(names.lines().filter(plain).map(str::to_owned).collect())
}

fn link(to: &Path, at: &Path) -> Result<(), ImageError> {
    let new = at.with_extension("new");
    let _ = std::fs::remove_file(&new);
    file(&new, |new| std::os::unix::fs::symlink(to, new))?;
    file(at, |at| std::fs::rename(&new, at))
}

fn file<T>(path: &Path, act: impl FnOnce(&Path) -> std::io::Result<T>) -> Result<T, ImageError> {
    act(path).map_err(|error| ImageError::File {
        path: path.to_owned(),
        error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A recipe of small things in `dir`: modules of these names, and a busybox with two names.
    fn recipe(dir: &Path, modules: &[&str]) -> GuestRecipe {
        let files: Vec<String> = modules.iter().map(|name| format!("{name}.ko")).collect();
        let files: Vec<(&str, &str)> = files.iter().map(|file| (file.as_str(), "")).collect();
        crate::modules::tests::fill(dir, &files, "");
        let busybox = dir.join("busybox");
        std::fs::write(&busybox, "#!/bin/sh\necho busybox; echo sh; echo ls\n").expect("written");
        std::fs::set_permissions(&busybox, std::fs::Permissions::from_mode(0o755)).expect("a mode");
        GuestRecipe {
            kernel: KernelFiles {
                release: "6.1-x".into(),
                bzimage: dir.join("vmlinuz"),
                vmlinux: dir.join("vmlinux"),
                modules: dir.to_owned(),
            },
            busybox,
            agent: None,
            load: None,
        }
    }

    fn holds(archive: &[u8], text: &str) -> bool {
        archive
            .windows(text.len())
            .any(|window| window == text.as_bytes())
    }

    #[test]
    fn an_image_is_made_again_only_when_it_would_differ() {
        let (dir, out) = (
            tempfile::tempdir().expect("a folder"),
            tempfile::tempdir().expect("one"),
        );
        let mut recipe = recipe(dir.path(), NEEDED);
        assert!(matches!(
            recipe.make(out.path()).expect("made"),
            Made::Written(_)
        ));
        assert_eq!(recipe.make(out.path()).expect("made"), Made::Already);
        let agent = dir.path().join("agent");
        std::fs::write(&agent, "agent one").expect("written");
        recipe.agent = Some(agent.clone());
        assert!(matches!(
            recipe.make(out.path()).expect("made"),
            Made::Written(_)
        ));
        std::fs::write(&agent, "agent two").expect("written");
        assert!(matches!(
            recipe.make(out.path()).expect("made"),
            Made::Written(_)
        ));
        let initramfs = std::fs::read(out.path().join("initramfs")).expect("it is there");
        assert!(holds(&initramfs, "agent two") && !holds(&initramfs, "agent one"));
        assert_eq!(
            std::fs::read_to_string(out.path().join("release")).expect("text"),
            "6.1-x"
        );
    }

    #[test]
    fn modules_are_listed_and_busybox_has_its_names() {
        let dir = tempfile::tempdir().expect("a folder");
        let modules = [NEEDED, WELCOME].concat();
        let initramfs = recipe(dir.path(), &modules).initramfs().expect("made");
        for name in [
            "/lib/modules/virtio_mmio.ko\n",
            "/lib/modules/ptp_vmclock.ko\n",
            "bin/ls",
        ] {
            assert!(holds(&initramfs, name), "{name}");
        }
    }

    #[test]
    fn a_kernel_that_lacks_a_module_is_refused_with_its_name() {
        let dir = tempfile::tempdir().expect("a folder");
        let error = recipe(dir.path(), &NEEDED[1..])
            .initramfs()
            .expect_err("one is missing");
        assert!(error.to_string().contains(NEEDED[0]), "{error}");
    }
}

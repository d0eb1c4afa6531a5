//! Sets of packages: which, from which suites, and their unpacked trees in the cache.
//!
//! A set is chosen once, by asking apt, and then stays as it was chosen until someone refreshes it:
//! the same cache gives the same images. Its manifest is written last, so a set that has one is
//! complete, and reading it needs neither lock nor network.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::apt::{Apt, AptError, Deb};
use crate::cache::{Cache, CacheError};
use crate::luo;
use crate::progress::Progress;
use crate::sources::{Mirror, NoMirror};
use crate::unpack::{KernelFiles, UnpackError, extract, kernel_files, write_vmlinux};

/// Changes when a set would be unpacked or chosen differently.
const RECIPE: u32 = 1;

/// Which Debian kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kernel {
    /// The one of bookworm, 6.1.
    Bookworm,
    /// The newest in trixie-backports.
    Backports,
    /// 7.3 with live update, which Debian builds without: built on this machine ([`crate::luo`]). For hosts alone.
    Luo,
}

impl Kernel {
    /// Those that Debian has.
    pub const ALL: [Self; 2] = [Self::Bookworm, Self::Backports];

    /// Its name in commands and folders.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Backports => "backports",
            Self::Luo => "luo",
        }
    }
}

impl std::str::FromStr for Kernel {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let mut all = Self::ALL.into_iter().chain([Self::Luo]);
        all.find(|kernel| kernel.name() == name).ok_or_else(|| {
            format!(
                "no kernel {name:?}; there are bookworm (6.1), backports (the newest), and luo, which `make \
                 rig-luo` builds"
            )
        })
    }
}

/// A set of packages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// A kernel with its modules.
    Kernel(Kernel),
    /// A QEMU that emulates SVM soundly, with every library it needs.
    ///
    /// It is bookworm-backports' 10.0: nested guests of bookworm's 7.2 lose memory to its XSAVE.
    Qemu,
    /// A static busybox.
    Busybox,
    /// A daemon that sets a guest's clock by ptp_kvm, and its C library.
    Phc2sys,
    /// curl, for guests, with every library it needs.
    Curl,
    /// `ip` and `tc`, for emulated hosts, with every library they need.
    Iproute,
    /// etcd, the store that a fleet shares.
    Etcd,
    /// The source of Linux 7.3.
    LinuxSource,
    /// What building a kernel needs beside a C compiler, make and tar.
    BuildTools,
}

/// Why a set can't be had.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No mirror.
    #[error(transparent)]
    Mirror(#[from] NoMirror),
    /// apt.
    #[error(
        "{set}: {error}; what the cache has needs no network, what it lacks comes from apt's mirror"
    )]
    Apt {
        /// For which set.
        set: &'static str,
        /// What it said.
        error: AptError,
    },
    /// The cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// Unpacking.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// Nobody packages it.
    #[error(
        "the kernel with live update is not built here, or of another configuration; run `make rig-luo`"
    )]
    NotBuilt,
}

/// What a set consists of, as it is written down in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    recipe: u32,
    packages: Vec<String>,
    tree: String,
}

impl Manifest {
    /// For a tree of this name in the cache, made of these packages.
    pub(crate) fn new(tree: String, packages: Vec<String>) -> Self {
        Self {
            recipe: RECIPE,
            packages,
            tree,
        }
    }
}

/// A set, unpacked.
#[derive(Clone, Debug)]
pub struct Unpacked {
    /// The root of its files.
    pub tree: PathBuf,
    /// The package files it came from, which name the versions.
    pub packages: Vec<String>,
}

impl Set {
    /// Every set that tests and images need.
    pub const ALL: [Self; 8] = [
        Self::Kernel(Kernel::Bookworm),
        Self::Kernel(Kernel::Backports),
        Self::Qemu,
        Self::Busybox,
        Self::Phc2sys,
        Self::Curl,
        Self::Iproute,
        Self::Etcd,
    ];

    /// Its name in the cache and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel(Kernel::Bookworm) => "kernel-bookworm",
            Self::Kernel(Kernel::Backports) => "kernel-backports",
            Self::Kernel(Kernel::Luo) => "kernel-luo",
            Self::Qemu => "qemu",
            Self::Busybox => "busybox",
            Self::Phc2sys => "phc2sys",
            Self::Curl => "curl",
            Self::Iproute => "iproute2",
            Self::Etcd => "etcd-server",
            Self::LinuxSource => "linux-source-7.3",
            Self::BuildTools => "build-tools",
        }
    }

    /// The set as the cache has it; `None` if it does not, or not completely.
    pub fn cached(self, cache: &Cache) -> Option<Unpacked> {
        let text = std::fs::read(self.manifest(cache)).ok()?;
        let manifest: Manifest = serde_json::from_slice(&text).ok()?;
        let is_current = self != Self::Kernel(Kernel::Luo) || luo::is_current(&manifest.tree);
        let tree = cache.dir().join(manifest.tree);
        (manifest.recipe == RECIPE && is_current && tree.is_dir()).then_some(Unpacked {
            tree,
            packages: manifest.packages,
        })
    }

    /// The set; what the cache lacks is fetched. With `refresh` it is chosen anew.
    pub fn fetch(
        self,
        cache: &Cache,
        refresh: bool,
        progress: Progress,
    ) -> Result<Unpacked, FetchError> {
        if let Some(unpacked) = self.cached(cache).filter(|_| !refresh) {
            return Ok(unpacked);
        }
        if self == Self::Kernel(Kernel::Luo) {
            return Err(FetchError::NotBuilt);
        }
        let lock = cache.lock(progress)?;
        // Another program may have fetched it while this one waited.
        if let Some(unpacked) = self.cached(cache).filter(|_| !refresh) {
            return Ok(unpacked);
        }
        let unpacked = self.fetch_locked(cache, refresh, progress)?;
        drop(lock);
        Ok(unpacked)
    }

    fn manifest(self, cache: &Cache) -> PathBuf {
        cache.dir().join(format!("{}.json", self.name()))
    }

    fn fetch_locked(
        self,
        cache: &Cache,
        refresh: bool,
        progress: Progress,
    ) -> Result<Unpacked, FetchError> {
        let failed = |error| FetchError::Apt {
            set: self.name(),
            error,
        };
        let apt = self.apt(cache)?;
        if refresh || !apt.is_updated() {
            self.update(&apt, progress).map_err(failed)?;
        }
        let scratch = cache.scratch(self.name())?;
        let debs = match self.download(&apt, &scratch, progress) {
            // A mirror keeps no superseded package: the lists may have been too old.
            Err(AptError::Failed { .. }) if !refresh => {
                self.update(&apt, progress).map_err(failed)?;
                self.download(&apt, &scratch, progress).map_err(failed)?
            }
            other => other.map_err(failed)?,
        };
        let packages: Vec<String> = debs.into_iter().map(|deb| deb.file).collect();
        let step = progress.step(&format!("unpack {}", self.name()), None);
        let unpacked = self.unpack(cache, &scratch, packages)?;
        step.done(&unpacked.tree.display().to_string());
        Ok(unpacked)
    }

    fn update(self, apt: &Apt, progress: Progress) -> Result<(), AptError> {
        let step = progress.step(&format!("package lists for {}", self.name()), None);
        apt.update()?;
        step.done("");
        Ok(())
    }

    /// The private apt of its suites.
    fn apt(self, cache: &Cache) -> Result<Apt, FetchError> {
        let mirror = Mirror::of_this_machine(Path::new("/etc/apt"))?;
        let archive = |suite| (mirror.archive.as_str(), suite);
        let (dir, suites) = match self {
            Self::Kernel(Kernel::Backports) | Self::LinuxSource => {
                ("apt-trixie", vec![archive("trixie-backports")])
            }
            _ => {
                let mut suites = ["bookworm", "bookworm-updates", "bookworm-backports"]
                    .map(archive)
                    .to_vec();
                let security = mirror.security.as_deref();
                suites.extend(security.map(|security| (security, "bookworm-security")));
                ("apt-bookworm", suites)
            }
        };
        Apt::new(&cache.dir().join(dir), &suites).map_err(|error| FetchError::Apt {
            set: self.name(),
            error,
        })
    }

    fn download(self, apt: &Apt, into: &Path, progress: Progress) -> Result<Vec<Deb>, AptError> {
        let debs = match self {
            Self::Kernel(_) => apt.alone(&kernel_packages(apt)?)?,
            Self::Qemu => {
                let suite = |name: &&str| format!("{name}/bookworm-backports");
                let names = [
                    "qemu-system-x86",
                    "qemu-system-common",
                    "qemu-system-data",
                    "seabios",
                ];
                apt.with_dependencies(&names.iter().map(suite).collect::<Vec<_>>())?
            }
            Self::Busybox => apt.alone(&["busybox-static".to_owned()])?,
            // A Go program: it needs nothing but libc.
            Self::Etcd | Self::LinuxSource => apt.alone(&[self.name().to_owned()])?,
            Self::BuildTools => apt.alone(&luo::TOOLS.map(str::to_owned))?,
            Self::Phc2sys => apt.alone(&["linuxptp".to_owned(), "libc6".to_owned()])?,
            Self::Curl | Self::Iproute => apt.with_dependencies(&[self.name().to_owned()])?,
        };
        apt.download(&debs, into, progress, &format!("download {}", self.name()))?;
        Ok(debs)
    }

    fn unpack(
        self,
        cache: &Cache,
        debs: &Path,
        packages: Vec<String>,
    ) -> Result<Unpacked, FetchError> {
        let digest = Sha256::digest(packages.join("\n"));
        let digest: String = digest
            .iter()
            .take(6)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let name = format!("{}-{RECIPE}-{digest}", self.name());
        let (tree, scratch) = (cache.dir().join(&name), cache.scratch(&name)?);
        for package in &packages {
            extract(&debs.join(package), &scratch)?;
        }
        if let Self::Kernel(_) = self {
            let files = kernel_files(&scratch)?;
            write_vmlinux(&files)?;
        }
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error: std::io::Error| UnpackError::File {
                path,
                why: error.to_string(),
            }
        };
        let _ = std::fs::remove_dir_all(&tree);
        std::fs::rename(&scratch, &tree).map_err(failed(&tree))?;
        let _ = std::fs::remove_dir_all(debs);
        let manifest = Manifest::new(name, packages);
        self.write(cache, &manifest)?;
        Ok(Unpacked {
            tree,
            packages: manifest.packages,
        })
    }

    /// Writes down what it consists of: from then on it is complete.
    pub(crate) fn write(self, cache: &Cache, manifest: &Manifest) -> Result<(), UnpackError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error: std::io::Error| UnpackError::File {
                path,
                why: error.to_string(),
            }
        };
        let path = self.manifest(cache);
        let new = path.with_extension("json.new");
        let text = serde_json::to_vec_pretty(manifest).unwrap_or_default();
        std::fs::write(&new, text).map_err(failed(&new))?;
        std::fs::rename(&new, &path).map_err(failed(&path))
    }
}

impl Unpacked {
    /// Its files as a kernel's.
    pub fn kernel(&self) -> Result<KernelFiles, FetchError> {
        Ok(kernel_files(&self.tree)?)
    }

    /// The server of [`Set::Etcd`].
    pub fn etcd(&self) -> PathBuf {
        self.tree.join("usr/bin/etcd")
    }

    /// Its files as a busybox's.
    pub fn busybox(&self) -> PathBuf {
        self.tree.join("bin/busybox")
    }
}

/// The metapackage of the cloud flavour names the newest image; newer Debians have split that into
/// packages of the same release beside it.
fn kernel_packages(apt: &Apt) -> Result<Vec<String>, AptError> {
    let meta = "linux-image-cloud-amd64";
    let image = image_of(&apt.depends(meta)?).ok_or_else(|| AptError::Nothing {
        what: format!("looking up the package {meta}"),
        missing: "kernel image that it depends on".into(),
    })?;
    let beside = apt.depends(&image)?;
    Ok(packages_of(image, beside))
}

fn image_of(depends: &[String]) -> Option<String> {
    let versioned = |name: &&String| {
        let rest = name.strip_prefix("linux-image-");
        rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    depends.iter().find(versioned).cloned()
}

fn packages_of(image: String, beside: Vec<String>) -> Vec<String> {
    let release = image.trim_start_matches("linux-image-").to_owned();
    let same =
        |name: &String| name.starts_with("linux-") && name.ends_with(&release) && *name != image;
    let mut packages: Vec<String> = beside.into_iter().filter(same).collect();
    packages.insert(0, image);
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_kernel_is_one_package_or_those_of_the_same_release() {
        let image =
            image_of(&words("linux-base linux-image-6.1.0-56-cloud-amd64")).expect("an image");
        let beside = words("kmod linux-base initramfs-tools");
        assert_eq!(
            packages_of(image, beside),
            ["linux-image-6.1.0-56-cloud-amd64"]
        );

        let split = words(
            "linux-base-cloud-amd64 linux-image-7.3.4+deb13-cloud-amd64 linux-modules-cloud-amd64",
        );
        let image = image_of(&split).expect("an image");
        let beside = words(
            "dracut linux-base-7.3.4+deb13-cloud-amd64 linux-modules-7.3.4+deb13-cloud-amd64",
        );
        assert_eq!(
            packages_of(image, beside),
            [
                "linux-image-7.3.4+deb13-cloud-amd64",
                "linux-base-7.3.4+deb13-cloud-amd64",
                "linux-modules-7.3.4+deb13-cloud-amd64",
            ]
        );
        assert_eq!(image_of(&words("linux-image-amd64 kmod")), None);
    }

    #[test]
    fn a_set_is_there_only_when_it_is_complete() {
        let dir = tempfile::tempdir().expect("a folder");
        let cache = Cache::at(dir.path().to_owned()).expect("a cache");
        assert!(Set::Busybox.cached(&cache).is_none());
        let mut manifest = Manifest {
            recipe: RECIPE,
            packages: vec!["b.deb".into()],
            tree: "b-1".into(),
        };
        let write = |manifest: &Manifest| {
            let text = serde_json::to_vec(manifest).expect("JSON");
            std::fs::write(Set::Busybox.manifest(&cache), text).expect("written");
        };
        write(&manifest);
        assert!(Set::Busybox.cached(&cache).is_none(), "its tree is gone");
        std::fs::create_dir(cache.dir().join("b-1")).expect("a folder");
        assert_eq!(
            Set::Busybox.cached(&cache).expect("it is there").packages,
            ["b.deb"]
        );
        manifest.recipe = RECIPE + 1;
        write(&manifest);
        assert!(Set::Busybox.cached(&cache).is_none(), "of another recipe");
    }
}

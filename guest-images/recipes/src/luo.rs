//! A kernel with live update (`CONFIG_LIVEUPDATE`, `CONFIG_KEXEC_HANDOVER`) for emulated hosts: no kernel of
//! Debian's has it. Built from Debian's source with `luo/kernel.config`, in the cache, once for a version of
//! the one and a digest of the other.
//!
//! Of the machine it takes a C compiler with its linker, make, and perl and awk, which every Debian has. The
//! rest, flex and bison among it, is unpacked from packages and found by the environment: nothing is installed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

use crate::cache::{Cache, CacheError};
use crate::packages::{FetchError, Kernel, Manifest, Set, Unpacked};
use crate::progress::Progress;
use crate::unpack::{KernelFiles, UnpackError, write_vmlinux};

/// What is on top of `allnoconfig`.
const CONFIG: &str = include_str!("../luo/kernel.config");
/// Packages of programs and libraries that the build needs, with those that they need beside libc.
pub(crate) const TOOLS: [&str; 11] = [
    "flex",
    "bison",
    "m4",
    "bc",
    "lz4",
    "liblz4-1",
    "libelf-dev",
    "libelf1",
    "libreadline8",
    "libtinfo6",
    "libsigsegv2",
];
/// Where Debian puts libraries of the architecture.
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
const SET: Set = Set::Kernel(Kernel::Luo);

/// Why it can't be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A package.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// What was built.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// A file.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// The source has no such option, or something that it depends on is missing.
    #[error("this source does not take {0:?} of luo/kernel.config")]
    Refused(String),
    /// make.
    #[error("make {what} failed ({status}); the last it said:\n{said}\nall of it is in {}", log.display())]
    Make {
        /// What was made.
        what: &'static str,
        /// How it ended.
        status: String,
        /// The last of it.
        said: String,
        /// Its output.
        log: PathBuf,
    },
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> BuildError {
    move |error| BuildError::File {
        path: path.to_owned(),
        error,
    }
}

/// What says which configuration it is of.
fn digest() -> String {
    let digest = Sha256::digest(CONFIG);
    let first = digest.iter().take(6);
    first.map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a tree of the cache is of this configuration.
pub(crate) fn is_current(tree: &str) -> bool {
    tree.ends_with(&digest())
}

/// The kernel; built if the cache lacks it. With `refresh` the newest source is asked for.
pub fn build(cache: &Cache, refresh: bool, progress: Progress) -> Result<KernelFiles, BuildError> {
    let path = cache.dir().join("kernel-luo.lock");
    let lock = File::create(&path).map_err(failed(&path))?;
    lock.lock().map_err(failed(&path))?;
    let source = Set::LinuxSource.fetch(cache, refresh, progress)?;
    if let Some(built) = SET
        .cached(cache)
        .filter(|built| built.packages == source.packages)
    {
        return Ok(built.kernel()?);
    }
    let tools = Set::BuildTools.fetch(cache, refresh, progress)?;
    let place = cache.dir().join("kernel-luo.build");
    let work = Work {
        source: unpacked(&source, &place, progress)?,
        build: place.join("build"),
        log: place.join("log"),
        tools: tools.tree,
    };
    work.configure()?;
    work.make("bzImage modules", &["bzImage", "modules"], progress)?;
    let version = source.packages.join(" ");
    let version = version.split('_').nth(1).unwrap_or("unknown");
    let name = format!("kernel-luo-{version}-{}", digest()).replace([':', '~', '%'], "-");
    work.bring_out(&cache.dir().join(&name))?;
    SET.write(cache, &Manifest::new(name, source.packages))?;
    let _ = std::fs::remove_dir_all(&place);
    let built = SET.cached(cache).ok_or(FetchError::NotBuilt)?;
    Ok(built.kernel()?)
}

/// The source's folder.
fn unpacked(source: &Unpacked, place: &Path, progress: Progress) -> Result<PathBuf, BuildError> {
    let folder = place.join("linux-source-7.3");
    let whole = place.join("unpacked");
    if whole.is_file() {
        return Ok(folder);
    }
    let step = progress.step("unpack the kernel's source", None);
    let _ = std::fs::remove_dir_all(place);
    std::fs::create_dir_all(place).map_err(failed(place))?;
    let archive = source.tree.join("usr/src/linux-source-7.3.tar.xz");
    let file = File::open(&archive).map_err(failed(&archive))?;
    let reader = liblzma::read::XzDecoder::new(std::io::BufReader::new(file));
    let mut tar = tar::Archive::new(reader);
    // make compares times; they are the archive's.
    tar.set_preserve_mtime(true);
    tar.unpack(place).map_err(failed(&archive))?;
    File::create(&whole).map_err(failed(&whole))?;
    step.done(&folder.display().to_string());
    Ok(folder)
}

/// The folders of a build. One that was cut off goes on where it was.
struct Work {
    source: PathBuf,
    build: PathBuf,
    log: PathBuf,
    tools: PathBuf,
}

impl Work {
    /// Writes the configuration, and sees that all of ours is in it.
    fn configure(&self) -> Result<(), BuildError> {
        std::fs::create_dir_all(&self.build).map_err(failed(&self.build))?;
        let ours = self.build.join("ours.config");
        std::fs::write(&ours, CONFIG).map_err(failed(&ours))?;
        let mut command = self.command();
        command.env("KCONFIG_ALLCONFIG", &ours).arg("allnoconfig");
        self.run(command, "allnoconfig")?;
        let path = self.build.join(".config");
        let config = std::fs::read_to_string(&path).map_err(failed(&path))?;
        match refused(CONFIG, &config) {
            Some(line) => Err(BuildError::Refused(line)),
            None => Ok(()),
        }
    }

    fn make(
        &self,
        what: &'static str,
        targets: &[&str],
        progress: Progress,
    ) -> Result<(), BuildError> {
        let cpus = std::thread::available_parallelism().map_or(2, usize::from);
        let step = progress.step("build the kernel (20 minutes of CPU time)", None);
        let mut command = self.command();
        command.arg(format!("-j{cpus}")).args(targets);
        self.run(command, what)?;
        step.done(&self.build.display().to_string());
        Ok(())
    }

    fn command(&self) -> Command {
        let tool = |path: &str| self.tools.join(path);
        let libraries = LIBRARIES.map(|folder| tool(folder).display().to_string());
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("make");
        command
            .arg("-s")
            .arg("-C")
            .arg(&self.source)
            .arg(format!("O={}", self.build.display()))
            .arg("LOCALVERSION=-luo")
            .env("PATH", format!("{}:{path}", tool("usr/bin").display()))
            .env("LD_LIBRARY_PATH", libraries.join(":"))
            .env("LIBRARY_PATH", tool(LIBRARIES[0]))
            .env("C_INCLUDE_PATH", tool("usr/include"))
            .env("BISON_PKGDATADIR", tool("usr/share/bison"))
            .env("M4", tool("usr/bin/m4"))
            .env("LC_ALL", "C")
            // A make above this one has words of its own.
            .env_remove("MAKEFLAGS")
            .env_remove("MAKELEVEL");
        command
    }

    fn run(&self, mut command: Command, what: &'static str) -> Result<(), BuildError> {
        let log = File::create(&self.log).map_err(failed(&self.log))?;
        let both = log.try_clone().map_err(failed(&self.log))?;
        command.stdin(Stdio::null()).stdout(log).stderr(both);
        let status = command.status().map_err(failed(Path::new("make")))?;
        if status.success() {
            return Ok(());
        }
        let text = std::fs::read(&self.log).map_err(failed(&self.log))?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<_> = text.lines().collect();
        Err(BuildError::Make {
            what,
            status: status.to_string(),
            said: lines[lines.len().saturating_sub(12)..].join("\n"),
            log: self.log.clone(),
        })
    }

    /// Lays out what a host needs as a package would.
    fn bring_out(&self, tree: &Path) -> Result<(), BuildError> {
        let new = tree.with_extension("new");
        let _ = std::fs::remove_dir_all(&new);
        let text = |name: &str| {
            let path = self.build.join(name);
            std::fs::read_to_string(&path).map_err(failed(&path))
        };
        let release = text("include/config/kernel.release")?.trim().to_owned();
        let (boot, modules) = (new.join("boot"), new.join("lib/modules").join(&release));
        let vmlinuz = boot.join(format!("vmlinuz-{release}"));
        self.copy("arch/x86/boot/bzImage", &vmlinuz)?;
        self.copy(".config", &boot.join(format!("config-{release}")))?;
        self.copy("modules.builtin", &modules.join("modules.builtin"))?;
        for line in text("modules.order")?.lines() {
            // Either is written there, by the version.
            let module = Path::new(line).with_extension("ko");
            let to = modules.join("kernel").join(&module);
            self.copy(&module.display().to_string(), &to)?;
        }
        write_vmlinux(&KernelFiles {
            release,
            bzimage: vmlinuz,
            vmlinux: new.join("vmlinux"),
            modules,
        })?;
        let _ = std::fs::remove_dir_all(tree);
        std::fs::rename(&new, tree).map_err(failed(tree))
    }

    fn copy(&self, from: &str, to: &Path) -> Result<(), BuildError> {
        let from = self.build.join(from);
        let folder = to.parent().unwrap_or(to);
        std::fs::create_dir_all(folder).map_err(failed(folder))?;
        std::fs::copy(&from, to).map(drop).map_err(failed(&from))
    }
}

/// The first line of ours that is not in the configuration.
fn refused(ours: &str, config: &str) -> Option<String> {
    let holds = |line: &&str| match line.split_once("=n") {
        Some((option, "")) => !config.lines().any(|line| {
            line.strip_prefix(option)
                .is_some_and(|rest| rest.starts_with('='))
        }),
        _ => config.lines().any(|other| other == *line),
    };
    let lines = ours.lines().filter(|line| line.starts_with("CONFIG_"));
    let mut lost = lines.filter(|line| !holds(line));
    lost.next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_the_source_did_not_take_is_named() {
        let ours = "# words\nCONFIG_A=y\nCONFIG_B=n\n\nCONFIG_C=m\n";
        let taken = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_BB=y\nCONFIG_C=m\n";
        assert_eq!(refused(ours, taken), None);
        let other = taken.replace("CONFIG_C=m", "CONFIG_C=y");
        assert_eq!(refused(ours, &other).as_deref(), Some("CONFIG_C=m"));
        let set = format!("{taken}CONFIG_B=y\n");
        assert_eq!(refused(ours, &set).as_deref(), Some("CONFIG_B=n"));
    }

    #[test]
    fn a_tree_of_another_configuration_is_not_this_one() {
        assert!(is_current(&format!("kernel-luo-7.3.4-{}", digest())));
        assert!(!is_current("kernel-luo-7.3.4-000000000000"));
        let options: Vec<_> = CONFIG
            .lines()
            .filter(|line| line.starts_with("CONFIG_"))
            .collect();
        for wanted in ["LIVEUPDATE", "LIVEUPDATE_MEMFD", "KEXEC_HANDOVER"] {
            assert!(options.contains(&format!("CONFIG_{wanted}=y").as_str()));
        }
    }
}

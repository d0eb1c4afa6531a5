//! KVM's modules: which are loaded and from where, who holds them, and their exchange.
//!
//! The kernel's interfaces are `/sys/module/NAME` (holders, parameters), `/proc/PID/fd` (who has KVM
//! open), and the calls `delete_module` and `finit_module` (kernel/module/main.c). A module with users
//! can't be removed; every virtual machine and every vCPU is one, until its last file descriptor is closed.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::model::Module;

/// Where the kernel tells of its modules.
const SYS: &str = "/sys/module";
/// Between two looks at whether a module has no user any more.
const GLANCE: Duration = Duration::from_millis(2);
/// `MODULE_INIT_COMPRESSED_FILE` (include/uapi/linux/module.h): the kernel unpacks the file itself.
const COMPRESSED: u32 = 4;

/// Why modules can't be exchanged, or were not.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// Nothing to exchange.
    #[error(
        "KVM is built into this kernel: there are no modules to exchange; swap the kernel instead"
    )]
    BuiltIn,
    /// No KVM.
    #[error("KVM's modules are not loaded on this host")]
    Absent,
    /// No way back.
    #[error(
        "cannot find the file that `{name}` was loaded from (looked in {}): without it there would be no \
         way back; give the kernel's modules their folder again",
        folder.display()
    )]
    NoFile {
        /// The module.
        name: String,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// Not in the folder.
    #[error("there is no `{name}.ko` in {}", folder.display())]
    Missing {
        /// The module.
        name: String,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// For another kernel.
    #[error("{file} is made for the kernel {of}, and this one is {running}: it would be refused")]
    OtherKernel {
        /// The file.
        file: String,
        /// Its kernel.
        of: String,
        /// Ours.
        running: String,
    },
    /// Compressed in a way that this kernel doesn't know.
    #[error("{0} is compressed, and this kernel does not unpack such modules: unpack it first")]
    Compressed(String),
    /// A parameter that names no module of KVM.
    #[error("`{0}`: a parameter is given as MODULE.NAME=VALUE, of one of {1}")]
    Parameter(String, String),
    /// Still used.
    #[error("`{0}` is still in use after {1:?}{2}")]
    InUse(String, Duration, String),
    /// The kernel.
    #[error("the kernel refused to {0}: {1}")]
    Kernel(String, Errno),
    /// A file.
    #[error("{0}: {1}")]
    File(String, std::io::Error),
}

/// A process that has KVM open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its id.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {})", self.name, self.pid)
    }
}

/// KVM's modules as they are loaded now, in the order in which they load.
pub fn present() -> Result<Vec<Module>, ModulesError> {
    let kvm = Path::new(SYS).join("kvm");
    if !kvm.exists() {
        return Err(ModulesError::Absent);
    }
    // A module that is built in has parameters at most.
    let Ok(holders) = fs::read_dir(kvm.join("holders")) else {
        return Err(ModulesError::BuiltIn);
    };
    let mut names = vec!["kvm".to_owned()];
    let holders = holders.flatten().map(|entry| entry.file_name());
    names.extend(holders.map(|name| name.to_string_lossy().into_owned()));
    let folder = Path::new("/lib/modules").join(running());
    let files = files(&folder);
    let module = |name: String| match files.get(&name) {
        Some(file) => Ok(Module {
            parameters: parameters(&name),
            file: file.display().to_string(),
            name,
        }),
        None => Err(ModulesError::NoFile {
            name,
            folder: folder.clone(),
        }),
    };
    names.into_iter().map(module).collect()
}

/// What is to be loaded instead of `before`: the modules of the same names in `folder`, or the same files
/// again, with these parameters besides those that there are.
pub fn instead(
    before: &[Module],
    folder: Option<&Path>,
    given: &[String],
) -> Result<Vec<Module>, ModulesError> {
    let known: Vec<_> = before.iter().map(|module| module.name.as_str()).collect();
    let known = known.join(", ");
    let mut to = before.to_vec();
    if let Some(folder) = folder {
        let files = files(folder);
        for module in &mut to {
            let missing = || ModulesError::Missing {
                name: module.name.clone(),
                folder: folder.to_owned(),
            };
            let file = files.get(&module.name).ok_or_else(missing)?;
            module.file = file.display().to_string();
        }
    }
    for text in given {
        let bad = || ModulesError::Parameter(text.clone(), known.clone());
        let (name, assignment) = text.split_once('.').ok_or_else(bad)?;
        let (parameter, value) = assignment.split_once('=').ok_or_else(bad)?;
        let fits = |c: char| c.is_ascii_graphic() && c != '"';
        if parameter.is_empty() || !assignment.chars().all(fits) || value.is_empty() {
            return Err(bad());
        }
        let module = to.iter_mut().find(|module| module.name == plain(name));
        let module = module.ok_or_else(bad)?;
        let same = |there: &String| there.split_once('=').map(|(name, _)| name) == Some(parameter);
        module.parameters.retain(|there| !same(there));
        module.parameters.push(assignment.to_owned());
    }
    to.iter().try_for_each(check)?;
    Ok(to)
}

/// Who has KVM open besides the processes with these ids.
pub fn holders(but: &[u32]) -> Vec<Holder> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| !but.contains(pid) && holds(*pid))
        .map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let name = name.trim().to_owned();
            Holder { pid, name }
        })
        .collect()
}

/// Removes them, last first, as soon as nobody uses them.
pub fn unload(modules: &[Module], deadline: Instant) -> Result<(), ModulesError> {
    let began = Instant::now();
    for module in modules.iter().rev() {
        let name = text(&module.name)?;
        loop {
            // O_NONBLOCK: one that is used is refused, and not waited for behind our back.
            match rustix::system::delete_module(&name, rustix::fs::OFlags::NONBLOCK.bits() as _) {
                Ok(()) | Err(Errno::NOENT) => break,
                Err(Errno::AGAIN | Errno::BUSY) if Instant::now() < deadline => {
                    std::thread::sleep(GLANCE);
                }
                Err(Errno::AGAIN | Errno::BUSY) => {
                    let by: Vec<_> = holders(&[]).iter().map(Holder::to_string).collect();
                    let by = match by.is_empty() {
                        true => String::new(),
                        false => format!(", by {}", by.join(", ")),
                    };
                    let name = module.name.clone();
                    return Err(ModulesError::InUse(name, began.elapsed(), by));
                }
                Err(error) => {
                    let what = format!("remove `{}`", module.name);
                    return Err(ModulesError::Kernel(what, error));
                }
            }
        }
    }
    Ok(())
}

/// Loads them, first first. One that is there already is left as it is.
pub fn load(modules: &[Module]) -> Result<(), ModulesError> {
    modules
        .iter()
        .try_for_each(|module| load_one(module, &module.parameters.join(" ")))
}

/// As [`load`], of modules that were there before: not every parameter is taken as the kernel showed it, and
/// one that is not must not keep them away.
pub fn put_back(modules: &[Module]) -> Result<(), ModulesError> {
    modules.iter().try_for_each(
        |module| match load_one(module, &module.parameters.join(" ")) {
            Err(ModulesError::Kernel(what, Errno::INVAL)) => {
                tracing::warn!("the kernel refused to {what}; loading it without parameters");
                load_one(module, "")
            }
            done => done,
        },
    )
}

fn load_one(module: &Module, parameters: &str) -> Result<(), ModulesError> {
    let file = File::open(&module.file);
    let file = file.map_err(|error| ModulesError::File(module.file.clone(), error))?;
    let flags = if is_compressed(&module.file) {
        COMPRESSED
    } else {
        0
    };
    match rustix::system::finit_module(&file, &text(parameters)?, flags as _) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => {
            let what = format!("load {} with `{parameters}`", module.file);
            Err(ModulesError::Kernel(what, error))
        }
    }
}

fn running() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// As the kernel writes names of modules.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

/// The modules below a folder, by their names: those that `modules.dep` lists, and those in the folder itself.
pub(super) fn files(folder: &Path) -> BTreeMap<String, PathBuf> {
    let listed = fs::read_to_string(folder.join("modules.dep")).unwrap_or_default();
    let listed = listed.lines().filter_map(|line| line.split_once(':'));
    let listed = listed.map(|(path, _)| folder.join(path));
    let beside = fs::read_dir(folder).into_iter().flatten().flatten();
    let beside = beside.map(|entry| entry.path());
    let named = |path: PathBuf| {
        let name = path.file_name()?.to_str()?;
        let (stem, rest) = name.split_once(".ko")?;
        matches!(rest, "" | ".xz" | ".zst" | ".gz").then(|| (plain(stem), path.clone()))
    };
    listed.chain(beside).filter_map(named).collect()
}

/// Whether it is a file that may be executed.
pub fn is_executable(path: &Path) -> bool {
    use rustix::fs::{Access, access};
    path.is_file() && access(path, Access::EXEC_OK).is_ok()
}

/// Its parameters as they are. What the kernel doesn't show, or shows as nothing, stays unsaid.
fn parameters(name: &str) -> Vec<String> {
    let folder = Path::new(SYS).join(name).join("parameters");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut told: Vec<_> = entries
        .filter_map(|entry| {
            let value = fs::read_to_string(entry.path()).ok()?;
            let value = value.trim();
            let says =
                !value.is_empty() && value != "(null)" && !value.contains(char::is_whitespace);
            says.then(|| format!("{}={value}", entry.file_name().to_string_lossy()))
        })
        .collect();
    told.sort();
    told
}

fn is_compressed(file: &str) -> bool {
    !file.ends_with(".ko")
}

/// Whether the kernel will take it, as far as that can be told before.
fn check(module: &Module) -> Result<(), ModulesError> {
    let bytes = fs::read(&module.file);
    let bytes = bytes.map_err(|error| ModulesError::File(module.file.clone(), error))?;
    if is_compressed(&module.file) {
        let known = fs::read_to_string(Path::new(SYS).join("compression")).unwrap_or_default();
        return match module.file.ends_with(known.trim()) && !known.trim().is_empty() {
            true => Ok(()),
            false => Err(ModulesError::Compressed(module.file.clone())),
        };
    }
    let running = running();
    match kernel_of(&bytes) {
        Some(of) if of != running => Err(ModulesError::OtherKernel {
            file: module.file.clone(),
            of,
            running,
        }),
        _ => Ok(()),
    }
}

/// The kernel that a module is made for: the first word of its `vermagic`.
fn kernel_of(bytes: &[u8]) -> Option<String> {
    const KEY: &[u8] = b"\0vermagic=";
    let at = bytes.windows(KEY.len()).position(|window| window == KEY)? + KEY.len();
    let word = bytes[at..].split(|byte| matches!(byte, 0 | b' ')).next()?;
    String::from_utf8(word.to_vec()).ok()
}

fn holds(pid: u32) -> bool {
    let fds = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten();
    let mut targets = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
    targets.any(|target| {
        let target = target.to_string_lossy();
        target == "/dev/kvm" || target.starts_with("anon_inode:kvm-")
    })
}

fn text(words: &str) -> Result<CString, ModulesError> {
    CString::new(words).map_err(|error| ModulesError::File(words.to_owned(), error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, folder: &Path) -> Module {
        Module {
            name: name.into(),
            file: folder.join(format!("{name}.ko")).display().to_string(),
            parameters: vec!["nested=1".into(), "npt=Y".into()],
        }
    }

    /// A folder with modules made for `kernel`.
    fn folder(kernel: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a folder");
        for name in ["kvm", "kvm-amd"] {
            let text = format!("\x7fELF\0license=GPL\0vermagic={kernel} SMP preempt\0");
            fs::write(dir.path().join(format!("{name}.ko")), text).expect("written");
        }
        dir
    }

    #[test]
    fn the_same_modules_are_taken_from_another_folder_with_parameters_changed() {
        let (old, new) = (folder(&running()), folder(&running()));
        let before = [module("kvm", old.path()), module("kvm_amd", old.path())];
        let given = ["kvm-amd.npt=0".to_owned(), "kvm.halt_poll_ns=0".to_owned()];
        let to = instead(&before, Some(new.path()), &given).expect("found");
        assert_eq!(
            to[1].file,
            new.path().join("kvm-amd.ko").display().to_string()
        );
        assert_eq!(to[1].parameters, ["nested=1", "npt=0"]);
        assert_eq!(to[0].parameters, ["nested=1", "npt=Y", "halt_poll_ns=0"]);
    }

    #[test]
    fn what_would_be_refused_is_refused_before() {
        let (old, other) = (folder(&running()), folder("5.0.0-other"));
        let before = [module("kvm", old.path())];
        let said = |folder: &Path, given: &str| {
            let given: Vec<_> = given.split_whitespace().map(str::to_owned).collect();
            let error = instead(&before, Some(folder), &given).expect_err("refused");
            error.to_string()
        };
        assert!(said(other.path(), "").contains("made for the kernel 5.0.0-other"));
        assert!(said(Path::new("/nonesuch"), "").contains("no `kvm.ko` in /nonesuch"));
        for bad in ["npt=0", "kvm_intel.ept=0", "kvm.npt", "kvm.=1", "kvm.npt="] {
            assert!(said(old.path(), bad).contains("MODULE.NAME=VALUE"), "{bad}");
        }
        let packed = old.path().join("kvm.ko.nonesuch");
        fs::rename(old.path().join("kvm.ko"), &packed).expect("renamed");
        assert!(said(old.path(), "").contains("no `kvm.ko`"));
    }

    #[test]
    fn who_has_kvm_open_is_found() {
        let Ok(_kvm) = File::open("/dev/kvm") else {
            println!("SKIPPED who_has_kvm_open_is_found: no /dev/kvm");
            return;
        };
        let us = std::process::id();
        assert!(holders(&[]).iter().any(|holder| holder.pid == us));
        assert!(!holders(&[us]).iter().any(|holder| holder.pid == us));
    }
}

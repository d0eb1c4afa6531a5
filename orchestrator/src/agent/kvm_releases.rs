//! Releases of KVM on this host's disk, which rollouts bring by their names: whoever may start a rollout says
//! which of them, and what they are says whoever may write this folder.
//!
//! ```text
//!  KVM_DIR/6.1.0-38/  kvm.ko kvm_amd.ko …        the modules that are loaded
//!                     parameters                 (may be there) MODULE.NAME=VALUE, one a line
//!  KVM_DIR/vendor-7/  exchange undo              or programs: what exchanges KVM, and what puts it back
//! ```
//!
//! Must never: take a file as root's that others may write.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::modules;
use crate::model::validate_version;

/// The program that exchanges KVM, in a release that is programs.
const EXCHANGE: &str = "exchange";
/// The one that puts back what was there.
const UNDO: &str = "undo";
/// Parameters that are to be other than they are.
const PARAMETERS: &str = "parameters";

/// What a release of KVM is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvmRelease {
    /// Modules in this folder, with these parameters besides those that there are.
    Modules(PathBuf, Vec<String>),
    /// Programs that exchange KVM and put it back.
    Programs {
        /// Exchanges it, while no guest holds it.
        exchange: PathBuf,
        /// Puts back what was there.
        undo: PathBuf,
    },
}

/// Why a folder is no release of KVM.
#[derive(Debug, thiserror::Error)]
pub enum NoKvmRelease {
    /// Nothing of that name.
    #[error(
        "there is no release of KVM {0:?} in {1}; lay its modules out there, in a folder of that name"
    )]
    Absent(String, String),
    /// Neither modules nor programs.
    #[error(
        "{0} is no release of KVM: it has neither modules (kvm.ko and the vendor's) nor the programs `exchange` and \
         `undo`, both executable"
    )]
    Empty(String),
    /// Others may write it.
    #[error(
        "{0} may be written by others than its owner, or belongs to neither root nor the daemon's user: \
             chown and chmod go-w it, or whoever writes it has this host"
    )]
    Open(String),
    /// A file.
    #[error("{0}: {1}")]
    File(String, std::io::Error),
}

/// The versions that can be brought.
pub fn versions(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut found: Vec<_> = names.filter(|name| find(dir, name).is_ok()).collect();
    found.sort();
    found
}

/// The release of that version.
pub fn find(dir: &Path, version: &str) -> Result<KvmRelease, NoKvmRelease> {
    let folder = dir.join(version);
    if validate_version(version).is_err() || !folder.is_dir() {
        let dir = dir.display().to_string();
        return Err(NoKvmRelease::Absent(version.into(), dir));
    }
    is_ours(dir)?;
    is_ours(&folder)?;
    let modules = modules::files(&folder);
    if modules.contains_key("kvm") {
        modules.values().try_for_each(|file| is_ours(file))?;
        return Ok(KvmRelease::Modules(folder.clone(), parameters(&folder)?));
    }
    let programs = [EXCHANGE, UNDO].map(|name| folder.join(name));
    if !programs
        .iter()
        .all(|program| modules::is_executable(program))
    {
        return Err(NoKvmRelease::Empty(folder.display().to_string()));
    }
    programs.iter().try_for_each(|program| is_ours(program))?;
    let [exchange, undo] = programs;
    Ok(KvmRelease::Programs { exchange, undo })
}

fn parameters(folder: &Path) -> Result<Vec<String>, NoKvmRelease> {
    let path = folder.join(PARAMETERS);
    if !path.exists() {
        return Ok(Vec::new());
    }
    is_ours(&path)?;
    let wrong = |error| NoKvmRelease::File(path.display().to_string(), error);
    let text = fs::read_to_string(&path).map_err(wrong)?;
    let lines = text.lines().map(str::trim);
    let said = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    Ok(said.map(str::to_owned).collect())
}

/// Whether nobody but its owner may write it, who is root or the daemon's own user.
pub(super) fn is_ours(path: &Path) -> Result<(), NoKvmRelease> {
    let wrong = |error| NoKvmRelease::File(path.display().to_string(), error);
    let seen = fs::metadata(path).map_err(wrong)?;
    let us = rustix::process::geteuid().as_raw();
    let is_ours = [0, us].contains(&seen.uid()) && seen.mode() & 0o022 == 0;
    match is_ours {
        true => Ok(()),
        false => Err(NoKvmRelease::Open(path.display().to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn put(folder: &Path, name: &str, text: &str, mode: u32) {
        fs::create_dir_all(folder).expect("a folder");
        // Whatever this user's umask is.
        let closed = fs::Permissions::from_mode(0o755);
        fs::set_permissions(folder, closed).expect("its mode");
        let path = folder.join(name);
        fs::write(&path, text).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("its mode");
    }

    #[test]
    fn folders_of_modules_and_of_programs_are_releases_and_others_say_why_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let of = |name: &str| dir.path().join(name);
        put(&of("1.0"), "kvm.ko", "", 0o644);
        put(
            &of("1.0"),
            "parameters",
            "# of the vendor's\nkvm_amd.nested=0\n\n",
            0o644,
        );
        put(&of("vendor"), "exchange", "", 0o755);
        put(&of("vendor"), "undo", "", 0o755);
        put(&of("half"), "exchange", "", 0o755);
        put(&of("open"), "kvm.ko", "", 0o666);
        put(&of("as booted"), "kvm.ko", "", 0o644);
        assert_eq!(versions(dir.path()), ["1.0", "vendor"]);
        let parameters = vec!["kvm_amd.nested=0".to_owned()];
        let found = find(dir.path(), "1.0").expect("modules");
        assert_eq!(found, KvmRelease::Modules(of("1.0"), parameters));
        let why = |name: &str| find(dir.path(), name).expect_err("none").to_string();
        assert!(why("half").contains("neither modules"), "{}", why("half"));
        assert!(why("open").contains("written by others"), "{}", why("open"));
        assert!(why("none").contains("no release of KVM \"none\""));
        assert!(why("../1.0").contains("no release of KVM"));
        assert!(versions(&of("nowhere")).is_empty());
    }
}

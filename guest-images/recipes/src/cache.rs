//! The folder that packages are kept in, outside the work tree: `STILLPOINT_CACHE`, or
//! `stillpoint` in the user's cache folder (XDG Base Directory Specification).
//!
//! Several programs may use it at once. Who changes it holds its lock; what is complete appears by a
//! rename, so that readers need none.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use crate::progress::Progress;

/// Why there is no cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Neither variable nor home.
    #[error("no folder for packages: none of STILLPOINT_CACHE, XDG_CACHE_HOME and HOME is set")]
    Nowhere,
    /// It can't be made or used.
    #[error("the package cache {}: {error}; name another folder by STILLPOINT_CACHE", path.display())]
    Unusable {
        /// Which file or folder.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
}

/// The cache.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: PathBuf,
}

/// The right to change it, until dropped.
#[derive(Debug)]
pub struct CacheLock {
    _file: File,
}

impl Cache {
    /// Where the environment says.
    pub fn of_this_user() -> Result<Self, CacheError> {
        let set = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let dir = set("STILLPOINT_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("stillpoint")))
            .or_else(|| set("HOME").map(|dir| dir.join(".cache/stillpoint")));
        Self::at(dir.ok_or(CacheError::Nowhere)?)
    }

    /// In this folder, which is made.
    pub fn at(dir: PathBuf) -> Result<Self, CacheError> {
        let made = std::fs::create_dir_all(&dir).and_then(|()| dir.canonicalize());
        let dir = made.map_err(|error| CacheError::Unusable { path: dir, error })?;
        Ok(Self { dir })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Waits for the right to change it.
    pub fn lock(&self, progress: Progress) -> Result<CacheLock, CacheError> {
        let path = self.dir.join("lock");
        let locked = File::create(&path).and_then(|file| {
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    progress.note(&format!(
                        "waiting for another program to leave {}",
                        path.display()
                    ));
                    file.lock()?;
                }
                Err(TryLockError::Error(error)) => return Err(error),
            }
            Ok(file)
        });
        let unusable = |error| CacheError::Unusable { path, error };
        locked.map(|_file| CacheLock { _file }).map_err(unusable)
    }

    /// An empty folder that becomes something by a rename.
    pub(crate) fn scratch(&self, name: &str) -> Result<PathBuf, CacheError> {
        let path = self.dir.join(format!("{name}.new"));
        let _ = std::fs::remove_dir_all(&path);
        match std::fs::create_dir_all(&path) {
            Ok(()) => Ok(path),
            Err(error) => Err(CacheError::Unusable { path, error }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_keeps_a_second_one_out() {
        let dir = tempfile::tempdir().expect("a folder");
        let cache = Cache::at(dir.path().join("deep/er")).expect("a cache");
        let held = cache.lock(Progress::Silent).expect("the lock");
        let second = File::create(cache.dir().join("lock")).expect("the file");
        assert!(matches!(second.try_lock(), Err(TryLockError::WouldBlock)));
        drop(held);
        assert!(second.try_lock().is_ok());
    }

    #[test]
    fn a_folder_that_cannot_be_is_refused_with_its_name() {
        let error = Cache::at("/proc/nonesuch".into()).expect_err("it can't be made");
        assert!(error.to_string().contains("/proc/nonesuch"), "{error}");
    }
}

//! Programs out of unpacked packages, each with the libraries that it needs, for an initramfs.
//!
//! Libraries go where a Debian has them, so its loader finds them by itself: nothing is relinked,
//! and no program is wrapped. Afterwards the archive holds every library that a program or one of its
//! libraries names (`DT_NEEDED`), each once; one that the packages lack is an error with its name.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use object::read::elf::ElfFile64;

use crate::guest::{ImageError, Made};
use crate::initramfs::Initramfs;
use crate::packages::Unpacked;

/// Where Debian puts libraries of the architecture.
const LIBRARIES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
/// Where they go: before busybox's in the `PATH` of guests and emulated hosts.
pub const PROGRAMS: &str = "usr/bin";
/// What every program names as its loader.
const LOADER: &str = "lib64/ld-linux-x86-64.so.2";

/// Programs of one set of packages.
#[derive(Debug)]
pub struct Programs<'a> {
    tree: &'a Path,
    names: &'a [&'a str],
}

impl<'a> Programs<'a> {
    /// These, by their paths in the packages, such as `usr/bin/curl`.
    pub fn of(set: &'a Unpacked, names: &'a [&'a str]) -> Self {
        Self {
            tree: &set.tree,
            names,
        }
    }

    /// Adds them, their libraries and the loader.
    pub fn add<W: Write>(&self, archive: &mut Initramfs<W>) -> Result<(), ImageError> {
        let mut missing: Vec<String> = Vec::new();
        for name in self.names {
            let path = self.tree.join(name);
            missing.extend(needs(&path)?);
            let program = path.file_name().unwrap_or_default().to_string_lossy();
            archive.copy(&format!("{PROGRAMS}/{program}"), 0o755, &path)?;
        }
        let mut had = BTreeSet::new();
        while let Some(library) = missing.pop() {
            if !had.insert(library.clone()) {
                continue;
            }
            let path = self.library(&library)?;
            missing.extend(needs(&path)?);
            archive.copy(&format!("{}/{library}", LIBRARIES[0]), 0o755, &path)?;
        }
        let loader = Path::new(LOADER).file_name().unwrap_or_default();
        archive.copy(LOADER, 0o755, &self.library(&loader.to_string_lossy())?)?;
        Ok(())
    }

    /// Makes `path` an archive of them, to be laid behind a guest's initramfs; with it, `path.key`.
    pub fn make(&self, path: &Path) -> Result<Made, ImageError> {
        let key = format!("{} {}\n", self.tree.display(), self.names.join(" "));
        let key_path = path.with_extension("key");
        if path.is_file() && std::fs::read_to_string(&key_path).is_ok_and(|old| old == key) {
            return Ok(Made::Already);
        }
        let _ = std::fs::remove_file(&key_path);
        let mut archive = Initramfs::new(Vec::new());
        self.add(&mut archive)?;
        let bytes = archive.finish()?;
        let new = path.with_extension("new");
        write(&new, &bytes)?;
        std::fs::rename(&new, path).map_err(|error| file(path, error))?;
        write(&key_path, key.as_bytes())?;
        Ok(Made::Written(bytes.len() as u64))
    }

    fn library(&self, name: &str) -> Result<PathBuf, ImageError> {
        let places = LIBRARIES.map(|folder| self.tree.join(folder).join(name));
        let found = places.into_iter().find(|path| path.is_file());
        found.ok_or_else(|| ImageError::Library {
            name: name.to_owned(),
            tree: self.tree.to_owned(),
        })
    }
}

fn file(path: &Path, error: std::io::Error) -> ImageError {
    let path = path.to_owned();
    ImageError::File { path, error }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
    std::fs::write(path, bytes).map_err(|error| file(path, error))
}

/// The libraries that an ELF file names.
fn needs(path: &Path) -> Result<Vec<String>, ImageError> {
    let unreadable = |why: String| ImageError::Program {
        path: path.to_owned(),
        why,
    };
    let bytes = std::fs::read(path).map_err(|error| unreadable(error.to_string()))?;
    let named = || -> object::Result<Vec<String>> {
        let file: ElfFile64<'_> = ElfFile64::parse(bytes.as_slice())?;
        let table = file.elf_dynamic_table()?;
        let needed = table
            .iter()
            .filter(|entry| entry.tag == object::elf::DT_NEEDED);
        needed
            .map(|entry| Ok(String::from_utf8_lossy(table.string(entry)?).into_owned()))
            .collect()
    };
    named().map_err(|error| unreadable(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_none_is_named() {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::create_dir_all(dir.path().join("usr/bin")).expect("folders");
        std::fs::write(dir.path().join("usr/bin/curl"), "no ELF").expect("written");
        let set = Unpacked {
            tree: dir.path().to_owned(),
            packages: Vec::new(),
        };
        let mut archive = Initramfs::new(Vec::new());
        let error = Programs::of(&set, &["usr/bin/curl"]).add(&mut archive);
        assert!(error.expect_err("no program").to_string().contains("curl"));
    }

    /// This very test is a program with libraries; where it is linked statically it has none.
    #[test]
    fn what_a_program_names_is_found() {
        let needed = needs(&std::env::current_exe().expect("this test")).expect("an ELF file");
        if cfg!(target_feature = "crt-static") {
            assert_eq!(needed, [""; 0]);
        } else {
            assert!(needed.contains(&"libc.so.6".to_owned()), "{needed:?}");
        }
    }

    #[test]
    fn a_library_that_the_packages_lack_is_named() {
        let dir = tempfile::tempdir().expect("a folder");
        let program = std::env::current_exe().expect("this test");
        std::os::unix::fs::symlink(program, dir.path().join("program")).expect("a link");
        let set = Unpacked {
            tree: dir.path().to_owned(),
            packages: Vec::new(),
        };
        let added = Programs::of(&set, &["program"]).add(&mut Initramfs::new(Vec::new()));
        assert!(added.expect_err("no libraries").to_string().contains(".so"));
    }
}

//! An initramfs: a newc cpio archive (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! It is written unpacked. A kernel that is emulated unpacks at a few MB a second, and copies at
//! hundreds; and what ships it (a file, guest RAM) is on the same machine. Archives may be laid one
//! behind the other, so what is the same in every run is made once.
//!
//! Owner and times are always zero: the same content gives the same bytes.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, ModeFileType, trailer};

/// Why a file could not be put in.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file that was to be put in.
    #[error("reading {} for the initramfs: {error}", path.display())]
    Source {
        /// Which.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// The archive itself.
    #[error("writing the initramfs entry {name}: {error}")]
    Write {
        /// Which entry.
        name: String,
        /// Why not.
        error: std::io::Error,
    },
}

/// An archive being written.
#[derive(Debug)]
pub struct Initramfs<W> {
    out: Option<W>,
    folders: BTreeSet<String>,
    next_inode: u32,
}

impl<W: Write> Initramfs<W> {
    /// An empty one.
    pub fn new(out: W) -> Self {
        Self {
            out: Some(out),
            folders: BTreeSet::new(),
            next_inode: 1,
        }
    }

    /// A folder, and those above it.
    pub fn folder(&mut self, name: &str) -> Result<(), ArchiveError> {
        let name = name.trim_matches('/');
        if name.is_empty() || !self.folders.insert(name.to_owned()) {
            return Ok(());
        }
        self.parents(name)?;
        self.entry(name, ModeFileType::Directory, 0o755, (0, 0), &[])
    }

    /// A file with this content.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), ArchiveError> {
        self.parents(name)?;
        self.entry(name, ModeFileType::Regular, mode, (0, 0), content)
    }

    /// A copy of a file of this machine.
    pub fn copy(&mut self, name: &str, mode: u32, from: &Path) -> Result<(), ArchiveError> {
        let content = std::fs::read(from).map_err(|error| ArchiveError::Source {
            path: from.to_owned(),
            error,
        })?;
        self.file(name, mode, &content)
    }

    /// A symbolic link.
    pub fn link(&mut self, name: &str, to: &str) -> Result<(), ArchiveError> {
        self.parents(name)?;
        self.entry(name, ModeFileType::Symlink, 0o777, (0, 0), to.as_bytes())
    }

    /// A character device.
    pub fn device(&mut self, name: &str, major: u32, minor: u32) -> Result<(), ArchiveError> {
        self.parents(name)?;
        self.entry(name, ModeFileType::Char, 0o600, (major, minor), &[])
    }

    /// Writes its end.
    pub fn finish(mut self) -> Result<W, ArchiveError> {
        let end = |error| ArchiveError::Write {
            name: "TRAILER!!!".into(),
            error,
        };
        let out = self
            .out
            .take()
            .ok_or_else(|| end(std::io::ErrorKind::BrokenPipe.into()))?;
        trailer(out).map_err(end)
    }

    fn parents(&mut self, name: &str) -> Result<(), ArchiveError> {
        match name.trim_matches('/').rsplit_once('/') {
            Some((parent, _)) => self.folder(parent),
            None => Ok(()),
        }
    }

    fn entry(
        &mut self,
        name: &str,
        kind: ModeFileType,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> Result<(), ArchiveError> {
        let name = name.trim_matches('/');
        let failed = |error| ArchiveError::Write {
            name: name.to_owned(),
            error,
        };
        let too_large = || failed(std::io::ErrorKind::FileTooLarge.into());
        let size = u32::try_from(content.len()).map_err(|_| too_large())?;
        let out = self
            .out
            .take()
            .ok_or_else(|| failed(std::io::ErrorKind::BrokenPipe.into()))?;
        let builder = Builder::new(name)
            .ino(self.next_inode)
            .mode(mode)
            .set_mode_file_type(kind)
            .rdev_major(device.0)
            .rdev_minor(device.1);
        self.next_inode += 1;
        let mut writer = builder.write(out, size);
        writer.write_all(content).map_err(failed)?;
        self.out = Some(writer.finish().map_err(failed)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpio::newc::Reader;

    /// Name, mode and content of every entry up to the end mark.
    fn entries(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            let mut reader = Reader::new(archive).expect("an entry");
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            if reader.entry().is_trailer() {
                return found;
            }
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut reader, &mut content).expect("its content");
            archive = reader.finish().expect("its end");
            found.push((name, mode, content));
        }
    }

    fn sample() -> Vec<u8> {
        let mut archive = Initramfs::new(Vec::new());
        archive
            .file("/lib/deep/a.ko", 0o644, b"abc")
            .expect("a file");
        archive.folder("lib/deep").expect("it is there");
        archive.file("init", 0o755, b"#!").expect("a file");
        archive.link("bin/sh", "busybox").expect("a link");
        archive.device("dev/console", 5, 1).expect("a device");
        archive.finish().expect("its end")
    }

    #[test]
    fn folders_come_before_what_is_in_them_and_once() {
        let found = entries(&sample());
        let names: Vec<&str> = found.iter().map(|(name, ..)| name.as_str()).collect();
        let expected = [
            "lib",
            "lib/deep",
            "lib/deep/a.ko",
            "init",
            "bin",
            "bin/sh",
            "dev",
            "dev/console",
        ];
        assert_eq!(names, expected);
        let modes: Vec<u32> = found.iter().map(|(_, mode, _)| *mode).collect();
        let (folder, link) = (0o040_755, 0o120_777);
        assert_eq!(
            modes,
            [
                folder, folder, 0o100_644, 0o100_755, folder, link, folder, 0o020_600
            ]
        );
        assert_eq!(found[2].2, b"abc");
        assert_eq!(found[5].2, b"busybox");
    }

    #[test]
    fn the_same_content_gives_the_same_bytes() {
        assert_eq!(sample(), sample());
    }

    #[test]
    fn a_source_that_is_missing_is_named() {
        let mut archive = Initramfs::new(Vec::new());
        let error = archive
            .copy("x", 0o644, Path::new("/nonesuch"))
            .expect_err("it is missing");
        assert!(error.to_string().contains("/nonesuch"), "{error}");
    }
}

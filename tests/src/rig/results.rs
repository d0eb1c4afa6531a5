//! What comes out of a host: a tar archive, written straight onto a disk that has no file system.
//! A disk can be written by any kernel that has a driver for it, and read when QEMU is gone.

use std::fs::File;
use std::path::Path;

use anyhow::Context;

use super::order::{ANSWER, Answer};

/// Room for results; the file is sparse.
pub(super) const DISK_MIB: u32 = 2048;

/// An empty disk.
pub(super) fn make_disk(path: &Path, mib: u32) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    file.set_len(u64::from(mib) << 20)
        .with_context(|| format!("{}: making it {mib} MiB", path.display()))
}

/// Unpacks what is on the disk into `into`, anew. A host that died early left nothing.
pub(super) fn unpack(disk: &Path, into: &Path) -> anyhow::Result<()> {
    let _ = std::fs::remove_dir_all(into);
    std::fs::create_dir_all(into).with_context(|| into.display().to_string())?;
    let mut archive = tar::Archive::new(File::open(disk)?);
    archive.set_preserve_permissions(false);
    archive.set_preserve_mtime(false);
    archive
        .unpack(into)
        .with_context(|| format!("unpacking the results from {}", disk.display()))
}

/// How the command ended, as the host's init wrote it down last of all.
pub(super) fn answer(results: &Path) -> anyhow::Result<Answer> {
    let text = std::fs::read(results.join(ANSWER)).context("the host left no answer")?;
    Ok(serde_json::from_slice(&text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_disk_has_no_answer_and_a_written_one_has() {
        let dir = tempfile::tempdir().expect("a folder");
        let (disk, into) = (dir.path().join("disk"), dir.path().join("results"));
        make_disk(&disk, 4).expect("a disk");
        unpack(&disk, &into).expect("nothing is unpacked");
        assert!(answer(&into).is_err());

        let file = File::options().write(true).open(&disk).expect("the disk");
        let mut archive = tar::Builder::new(file);
        let text = serde_json::to_vec(&Answer { status: 3 }).expect("JSON");
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        archive
            .append_data(&mut header, ANSWER, text.as_slice())
            .expect("written");
        archive.finish().expect("written");
        unpack(&disk, &into).expect("unpacked");
        assert_eq!(answer(&into).expect("an answer").status, 3);
    }
}

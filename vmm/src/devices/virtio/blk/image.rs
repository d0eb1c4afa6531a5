//! A disk's host side: a raw image or a block device, open and locked.
//!
//! Opened once, at the boot of a machine; handed on afterwards, with its lock, which belongs to
//! the open description and is never taken a second time. So there is no moment at which another
//! program could take the disk of a guest that is being swapped.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use stillpoint_control::spec::DiskSpec;

use super::disk::{Disk, Media, SECTOR};
use super::holder;
use super::pool::Pool;
use crate::raw::file::{Lock, lock};

/// Bytes of the name that a driver can ask for (virtio 1.2, 5.2.6).
pub const SERIAL: usize = 20;

/// How a QCOW2 image begins: the most likely thing to be taken for a raw one.
const QCOW2: [u8; 4] = *b"QFI\xfb";

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
#[error("machine spec: field `disks.path`: {}: {problem}", path.display())]
pub struct ImageError {
    path: PathBuf,
    #[source]
    problem: Problem,
}

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("there is no such file; make one with `truncate -s 10G`, or correct the path")]
    Missing,
    #[error("this is a {0}; a disk is a raw image or a block device")]
    Kind(&'static str),
    #[error("it is empty; give it a size with `truncate -s 10G`")]
    Empty,
    #[error(
        "its {0} bytes are no multiple of {SECTOR}, so it was cut off or is no raw image; \
         `truncate -s %{SECTOR}` rounds it up"
    )]
    Uneven(u64),
    #[error("this is a QCOW2 image; make a raw one of it with `qemu-img convert -O raw`")]
    Qcow2,
    #[error(
        "uid {uid} has no right to {what} it; give it that right{}",
        read_only_remedy(what)
    )]
    Forbidden { uid: u32, what: &'static str },
    #[error("it is on a read-only filesystem; say `read_only`")]
    ReadOnly,
    #[error("this host uses the device itself, it may be mounted; unmount it, or say `read_only`")]
    InUse,
    #[error(
        "it is locked by {by}; stop that, or give this guest another disk (several guests can \
         share one that is `read_only` for each of them)"
    )]
    Locked { by: String },
    #[error(
        "the guest has another disk open than the one that is found there now, and would go on with this one: put its \
         own back, or stop the guest and start it anew"
    )]
    Another,
    #[error("its filesystem can't lock it ({0}); move it to one that can")]
    NoLocks(Errno),
    #[error("it can't be opened: {0}")]
    Open(Errno),
    #[error("it can't be looked at: {0}")]
    Look(Errno),
    #[error("no threads to be had for its I/O: {0}; raise this user's limit of tasks")]
    Threads(std::io::Error),
}

fn read_only_remedy(what: &str) -> &'static str {
    match what {
        "write" => ", or say `read_only`",
        _ => "",
    }
}

/// An open disk with threads that wait for work.
#[derive(Debug)]
pub struct Image {
    pub(super) disk: Arc<Disk>,
    pub(super) pool: Pool,
    pub(super) serial: [u8; SERIAL],
}

/// What the guest is told of as the disk's serial number: the same at every boot and swap.
fn serial(machine: &str, name: &str) -> [u8; SERIAL] {
    let mut serial = [0; SERIAL];
    // The number at the end tells a guest's disks apart, so the machine's name gives way.
    let room = SERIAL.saturating_sub(name.len() + 1);
    let machine = machine.bytes().take(room);
    for (to, from) in serial
        .iter_mut()
        .zip(machine.chain([b'-']).chain(name.bytes()))
    {
        *to = from;
    }
    serial
}

impl Image {
    /// Opens and locks what `spec` names, for the device `name` of this machine.
    pub fn open(machine: &str, name: &str, spec: &DiskSpec) -> Result<Self, ImageError> {
        let problem = |problem| ImageError {
            path: spec.path.clone(),
            problem,
        };
        let (file, media) = open(&spec.path, spec.read_only).map_err(problem)?;
        let kind = match spec.read_only {
            true => Lock::Shared,
            false => Lock::Exclusive,
        };
        lock(&file, kind).map_err(|error| {
            problem(match error {
                Errno::AGAIN | Errno::ACCESS => {
                    let by = holder::name(&file);
                    Problem::Locked { by }
                }
                error => Problem::NoLocks(error),
            })
        })?;
        // After the lock: before it, another program may still have been making it.
        let size = size(&file).map_err(problem)?;
        if size == 0 {
            return Err(problem(Problem::Empty));
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(problem(Problem::Uneven(size)));
        }
        let mut magic = [0; QCOW2.len()];
        if media == Media::File && file.read_exact_at(&mut magic, 0).is_ok() && magic == QCOW2 {
            return Err(problem(Problem::Qcow2));
        }
        Self::of(machine, name, spec, file, media).map_err(problem)
    }

    /// Takes one that was opened and locked by [`Image::open`], maybe in another process.
    pub fn adopt(
        machine: &str,
        name: &str,
        spec: &DiskSpec,
        fd: OwnedFd,
    ) -> Result<Self, ImageError> {
        let problem = |problem| ImageError {
            path: spec.path.clone(),
            problem,
        };
        let media = media(&fd).map_err(problem)?;
        Self::of(machine, name, spec, File::from(fd), media).map_err(problem)
    }

    /// Whether who opens the disk by its path finds this one. It is opened for reading only, and not locked.
    pub fn is_found_by(&self, spec: &DiskSpec) -> Result<(), ImageError> {
        let found = open(&spec.path, true).and_then(|(file, media)| {
            let of = |file: BorrowedFd<'_>| rustix::fs::fstat(file).map_err(Problem::Look);
            let (ours, there) = (of(self.as_fd())?, of(file.as_fd())?);
            let same = match media {
                // Several nodes may be of one device.
                Media::Block => ours.st_rdev == there.st_rdev,
                Media::File => (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino),
            };
            match same {
                true => Ok(()),
                false => Err(Problem::Another),
            }
        });
        found.map_err(|problem| ImageError {
            path: spec.path.clone(),
            problem,
        })
    }

    fn of(
        machine: &str,
        name: &str,
        spec: &DiskSpec,
        file: File,
        media: Media,
    ) -> Result<Self, Problem> {
        // Whole sectors: somebody may have resized an image while its guest ran.
        let size = size(&file)? / SECTOR * SECTOR;
        let disk = Disk::new(name, file, media, size, spec.read_only).map_err(Problem::Look)?;
        let disk = Arc::new(disk);
        Ok(Self {
            pool: Pool::start(name, &disk).map_err(Problem::Threads)?,
            disk,
            serial: serial(machine, name),
        })
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.disk.as_fd()
    }
}

fn open(path: &Path, read_only: bool) -> Result<(File, Media), Problem> {
    let access = match read_only {
        true => OFlags::RDONLY,
        false => OFlags::RDWR,
    };
    // Not to wait for the other end, should it be a FIFO.
    let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let what = if read_only { "read" } else { "write" };
    let wrong = |error| match error {
        Errno::NOENT | Errno::NOTDIR => Problem::Missing,
        Errno::ISDIR => Problem::Kind("directory"),
        Errno::ACCESS | Errno::PERM => Problem::Forbidden {
            uid: rustix::process::geteuid().as_raw(),
            what,
        },
        Errno::ROFS => Problem::ReadOnly,
        Errno::BUSY => Problem::InUse,
        Errno::NXIO => Problem::Kind("FIFO, a socket, or a device that is not there"),
        error => Problem::Open(error),
    };
    let mut fd = rustix::fs::open(path, flags, Mode::empty()).map_err(wrong)?;
    let media = media(&fd)?;
    if media == Media::Block && !read_only {
        // For itself alone, which the kernel gives only of a device that is not mounted (open(2));
        // and by the same path again, so it is judged again.
        fd = rustix::fs::open(path, flags | OFlags::EXCL, Mode::empty()).map_err(wrong)?;
        if self::media(&fd)? != Media::Block {
            return Err(Problem::Kind("file that was just exchanged"));
        }
    }
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(Problem::Look)?;
    rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK).map_err(Problem::Look)?;
    Ok((File::from(fd), media))
}

fn media(file: impl AsFd) -> Result<Media, Problem> {
    let mode = rustix::fs::fstat(file).map_err(Problem::Look)?.st_mode;
    match FileType::from_raw_mode(mode) {
        FileType::RegularFile => Ok(Media::File),
        FileType::BlockDevice => Ok(Media::Block),
        FileType::Directory => Err(Problem::Kind("directory")),
        FileType::CharacterDevice => Err(Problem::Kind("character device")),
        FileType::Fifo => Err(Problem::Kind("FIFO")),
        _ => Err(Problem::Kind("socket, or something stranger")),
    }
}

/// Of files and block devices alike.
fn size(file: impl AsFd) -> Result<u64, Problem> {
    rustix::fs::seek(file, SeekFrom::End(0)).map_err(Problem::Look)
}

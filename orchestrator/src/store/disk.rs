//! A disk that forgets what was not synced, for tests (feature `fault-injection`).
//!
//! What SQLite writes stays in this process's memory until SQLite syncs the file; only then is the real
//! file changed. So the end of this process is to the store what a power cut is, and `kill -9` at a
//! counted sync is a power cut at that very write: before it, in the middle of it, or right after it.
//!
//! ```text
//!  xWrite ─▶ memory ─▶ xSync:  sync ─▶ half of the pages ─▶ torn ─▶ the rest ─▶ synced
//! ```
#![allow(unsafe_code)] // SQLite's interface to a file system is one of C.

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rusqlite::{Connection, OpenFlags, ffi};

const NAME: &CStr = c"forgetful";
const PAGE: usize = 4096;

/// A moment of a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// Nothing is on disk.
    Sync,
    /// Some pages are.
    Torn,
    /// All of it is, and nobody heard of it.
    Synced,
}

/// At which sync the power is cut, if at any, and at which moment of it.
static CUT: OnceLock<Option<(Moment, u64)>> = OnceLock::new();
static SYNCS: AtomicU64 = AtomicU64::new(0);

/// From now on stores are on such a disk. The text says when its power is cut: `sync=N`, `torn=N` or
/// `synced=N`, the first sync being number 1; or `never`.
pub fn arm(text: &str) -> Result<(), String> {
    let bad = || format!("`{text}` is no cut; write for example synced=7, or never");
    let cut = match text.split_once('=') {
        None if text == "never" => None,
        None => return Err(bad()),
        Some((moment, number)) => {
            let moment = match moment {
                "sync" => Moment::Sync,
                "torn" => Moment::Torn,
                "synced" => Moment::Synced,
                _ => return Err(bad()),
            };
            Some((moment, number.parse().map_err(|_| bad())?))
        }
    };
    CUT.set(cut).map_err(|_| "armed twice".to_owned())
}

/// Opens a database: on such a disk, if one was asked for.
pub(super) fn connect(path: &Path, flags: OpenFlags) -> rusqlite::Result<Connection> {
    if CUT.get().is_none() {
        return Connection::open_with_flags(path, flags);
    }
    register();
    Connection::open_with_flags_and_vfs(path, flags, NAME)
}

fn reach(moment: Moment, number: u64) {
    if CUT.get() == Some(&Some((moment, number))) {
        let us = rustix::process::getpid();
        let _ = rustix::process::kill_process(us, rustix::process::Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}

/// A file as SQLite sees it.
struct Image {
    /// What is on disk; none for a file that has no name.
    file: Option<File>,
    bytes: Vec<u8>,
    /// Pages that differ from the disk's.
    dirty: std::collections::BTreeSet<usize>,
}

impl Image {
    fn open(path: Option<&Path>) -> std::io::Result<Self> {
        let options = |path| {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
        };
        let file = path.map(options).transpose()?;
        let mut bytes = Vec::new();
        if let Some(file) = &file {
            bytes.resize(usize::try_from(file.metadata()?.len()).unwrap_or(0), 0);
            file.read_exact_at(&mut bytes, 0)?;
        }
        Ok(Self {
            file,
            bytes,
            dirty: std::collections::BTreeSet::new(),
        })
    }

    fn write(&mut self, from: &[u8], at: usize) {
        let end = at + from.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[at..end].copy_from_slice(from);
        self.dirty.extend(at / PAGE..end.div_ceil(PAGE));
    }

    fn sync(&mut self) -> std::io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let number = SYNCS.fetch_add(1, Ordering::Relaxed) + 1;
        reach(Moment::Sync, number);
        // A cut in the middle: of the pages, in whatever order the disk likes, some are there.
        let (early, late): (Vec<usize>, Vec<usize>) =
            self.dirty.iter().partition(|&page| page % 2 == 1);
        for (pages, then) in [(early, Moment::Torn), (late, Moment::Synced)] {
            for page in pages {
                let from = (page * PAGE).min(self.bytes.len());
                let to = (from + PAGE).min(self.bytes.len());
                file.write_all_at(&self.bytes[from..to], from as u64)?;
            }
            if then == Moment::Synced {
                file.set_len(self.bytes.len() as u64)?;
            }
            reach(then, number);
        }
        self.dirty.clear();
        Ok(())
    }
}

/// What SQLite allocates for each file that is open.
#[repr(C)]
struct Handle {
    base: ffi::sqlite3_file,
    image: *mut Image,
}

/// The image behind an open file.
///
/// # Safety
/// `file` was opened by [`open`] and is not closed, and no other reference to its image lives: SQLite
/// calls for one connection come one after the other, and each call here makes one.
unsafe fn image<'a>(file: *mut ffi::sqlite3_file) -> &'a mut Image {
    // SAFETY: see above; `szOsFile` made SQLite allocate a `Handle`, whose first field `base` is.
    unsafe { &mut *(*file.cast::<Handle>()).image }
}

unsafe extern "C" fn open(
    _: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    let handle = file.cast::<Handle>();
    // SAFETY: SQLite gives a terminated name or none, and room for a `Handle` of its own.
    let opened = unsafe {
        (*handle).base.pMethods = std::ptr::null();
        let name = (!name.is_null()).then(|| CStr::from_ptr(name));
        Image::open(name.map(|name| Path::new(OsStr::from_bytes(name.to_bytes()))))
    };
    let Ok(opened) = opened else {
        return ffi::SQLITE_CANTOPEN;
    };
    // SAFETY: as above; `out_flags` may be null, and is written only if it is not.
    unsafe {
        (*handle).image = Box::into_raw(Box::new(opened));
        (*handle).base.pMethods = &raw const METHODS;
        if !out_flags.is_null() {
            *out_flags = flags;
        }
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: the box was leaked by `open`; SQLite closes a file once and uses it no more.
    drop(unsafe { Box::from_raw((*file.cast::<Handle>()).image) });
    ffi::SQLITE_OK
}

unsafe extern "C" fn read(
    file: *mut ffi::sqlite3_file,
    to: *mut c_void,
    amount: c_int,
    at: ffi::sqlite3_int64,
) -> c_int {
    let (amount, at) = (to_usize(amount.into()), to_usize(at));
    // SAFETY: the file is open, and SQLite gives a buffer of `amount` bytes.
    let (image, to) = unsafe {
        let to = std::slice::from_raw_parts_mut(to.cast::<u8>(), amount);
        (image(file), to)
    };
    let from = image.bytes.get(at..).unwrap_or_default();
    let n = from.len().min(amount);
    to[..n].copy_from_slice(&from[..n]);
    to[n..].fill(0);
    match n == amount {
        true => ffi::SQLITE_OK,
        false => ffi::SQLITE_IOERR_SHORT_READ,
    }
}

unsafe extern "C" fn write(
    file: *mut ffi::sqlite3_file,
    from: *const c_void,
    amount: c_int,
    at: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: the file is open, and SQLite gives `amount` bytes.
    unsafe {
        let from = std::slice::from_raw_parts(from.cast::<u8>(), to_usize(amount.into()));
        image(file).write(from, to_usize(at));
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, size: ffi::sqlite3_int64) -> c_int {
    // SAFETY: the file is open.
    unsafe { image(file) }.bytes.truncate(to_usize(size));
    ffi::SQLITE_OK
}

unsafe extern "C" fn sync(file: *mut ffi::sqlite3_file, _: c_int) -> c_int {
    // SAFETY: the file is open.
    match unsafe { image(file) }.sync() {
        Ok(()) => ffi::SQLITE_OK,
        Err(_) => ffi::SQLITE_IOERR_FSYNC,
    }
}

unsafe extern "C" fn size(file: *mut ffi::sqlite3_file, to: *mut ffi::sqlite3_int64) -> c_int {
    // SAFETY: the file is open, and SQLite gives a place for the answer.
    unsafe { *to = ffi::sqlite3_int64::try_from(image(file).bytes.len()).unwrap_or(0) };
    ffi::SQLITE_OK
}

// One daemon has the file, by the lock of its run directory: nobody else is to be kept out.
unsafe extern "C" fn lock(_: *mut ffi::sqlite3_file, _: c_int) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn is_reserved(_: *mut ffi::sqlite3_file, to: *mut c_int) -> c_int {
    // SAFETY: SQLite gives a place for the answer.
    unsafe { *to = 0 };
    ffi::SQLITE_OK
}

unsafe extern "C" fn control(_: *mut ffi::sqlite3_file, _: c_int, _: *mut c_void) -> c_int {
    ffi::SQLITE_NOTFOUND
}

unsafe extern "C" fn sector(_: *mut ffi::sqlite3_file) -> c_int {
    4096
}

unsafe extern "C" fn characteristics(_: *mut ffi::sqlite3_file) -> c_int {
    0
}

/// A position or a length; SQLite gives none below zero.
fn to_usize(number: i64) -> usize {
    usize::try_from(number).unwrap_or(0)
}

/// Version 1: no shared memory, which a store that is opened exclusively does without.
static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 1,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(size),
    xLock: Some(lock),
    xUnlock: Some(lock),
    xCheckReservedLock: Some(is_reserved),
    xFileControl: Some(control),
    xSectorSize: Some(sector),
    xDeviceCharacteristics: Some(characteristics),
    xShmMap: None,
    xShmLock: None,
    xShmBarrier: None,
    xShmUnmap: None,
    xFetch: None,
    xUnfetch: None,
};

/// Makes the disk known to SQLite, once. Names, times and randomness are those of its usual one.
fn register() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // SAFETY: the usual file system is there for good once SQLite is initialised, and its plain
        // values may be copied; the copy lives for ever, as SQLite wants it.
        unsafe {
            ffi::sqlite3_initialize();
            let usual = ffi::sqlite3_vfs_find(std::ptr::null());
            let mut ours = *usual;
            ours.iVersion = 1;
            ours.szOsFile = c_int::try_from(size_of::<Handle>()).unwrap_or(c_int::MAX);
            ours.pNext = std::ptr::null_mut();
            ours.zName = NAME.as_ptr();
            ours.xOpen = Some(open);
            ffi::sqlite3_vfs_register(Box::into_raw(Box::new(ours)), 0);
        }
    });
}

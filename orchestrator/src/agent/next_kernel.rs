//! What the kernel that is to be jumped into will find: the modules without which guests' memory has no device,
//! and no guest a KVM. Looked for in its initial RAM disk and among the modules of its release on this host.
//!
//! An initial RAM disk is a chain of cpio archives, each as it is or compressed as a whole
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Names are read of those that are not compressed.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// Modules that adoption may need of a carve-out's device.
const OF_CARVE_OUT: [&str; 6] = [
    "nd_e820",
    "nfit",
    "libnvdimm",
    "nd_pmem",
    "dax_pmem",
    "device_dax",
];
/// Modules that it may need of KVM.
const OF_KVM: [&str; 3] = ["kvm", "kvm_amd", "kvm_intel"];
/// The longest name in an archive.
const LONGEST: u64 = 4096;

/// What was found of the modules that are needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// All of them, there.
    There(String),
    /// These are nowhere.
    Missing {
        /// The kernel.
        release: String,
        /// Which.
        modules: Vec<String>,
    },
    /// It can't be told, for this reason.
    Unknown(String),
}

/// Which kernel an image is, if it says so.
pub fn release(image: &Path) -> Option<String> {
    release_of(&mut File::open(image).ok()?).ok()?
}

/// Looks for them; for those of a carve-out only if guests lie in one.
pub fn look(image: &Path, initrd: Option<&Path>, carve_out: bool) -> Found {
    let of_carve_out = OF_CARVE_OUT.iter().filter(|_| carve_out);
    let wanted = of_carve_out.chain(&OF_KVM).copied();
    let loaded = |name: &&str| Path::new("/sys/module").join(name).is_dir();
    // What this kernel has them for, the next will.
    let needed: Vec<_> = wanted.filter(loaded).collect();
    look_in(Path::new("/lib/modules"), image, initrd, &needed)
}

fn look_in(modules: &Path, image: &Path, initrd: Option<&Path>, needed: &[&str]) -> Found {
    let release = match File::open(image).and_then(|mut file| release_of(&mut file)) {
        Ok(Some(release)) => release,
        Ok(None) => {
            return Found::Unknown(format!(
                "{} does not say which kernel it is",
                image.display()
            ));
        }
        Err(error) => return Found::Unknown(format!("{}: {error}", image.display())),
    };
    let disk = match initrd
        .map(|path| File::open(path).and_then(|file| names(&mut BufReader::new(file))))
    {
        None => Ok(Archive::default()),
        Some(Ok(archive)) => Ok(archive),
        Some(Err(error)) => Err(error.to_string()),
    };
    let folder = modules.join(&release);
    let lists = ["modules.dep", "modules.builtin"];
    let lists = lists.map(|list| std::fs::read_to_string(folder.join(list)).unwrap_or_default());
    let mut known: BTreeSet<String> = lists
        .iter()
        .flat_map(|list| list.lines())
        .filter_map(module)
        .collect();
    let is_whole = disk.as_ref().is_ok_and(|archive| !archive.is_cut);
    known.extend(
        disk.iter()
            .flat_map(|archive| &archive.names)
            .filter_map(|name| module(name)),
    );
    let missing = needed.iter().filter(|name| !known.contains(**name));
    let missing: Vec<_> = missing.map(|&name| name.to_owned()).collect();
    match (missing.is_empty(), is_whole || folder.is_dir()) {
        (true, _) => Found::There(format!("kernel {release} finds {}", needed.join(", "))),
        (false, true) => Found::Missing {
            release,
            modules: missing,
        },
        (false, false) => Found::Unknown(format!(
            "{} is not there, and the initial RAM disk is compressed or can't be read",
            folder.display()
        )),
    }
}

/// The module that a line of `modules.dep`, or a file's name, speaks of.
fn module(line: &str) -> Option<String> {
    let path = line.split(':').next()?;
    let file = path.rsplit('/').next()?;
    let (name, _) = file.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

/// `uname -r` of a bzImage (Documentation/arch/x86/boot.rst: `kernel_version`).
fn release_of(image: &mut (impl Read + Seek)) -> io::Result<Option<String>> {
    let mut head = [0; 0x210];
    image.read_exact(&mut head)?;
    if head[0x202..0x206] != *b"HdrS" {
        return Ok(None);
    }
    let at = u16::from_le_bytes([head[0x20e], head[0x20f]]);
    if at == 0 {
        return Ok(None);
    }
    image.seek(SeekFrom::Start(u64::from(at) + 0x200))?;
    let mut text = Vec::new();
    image.take(256).read_to_end(&mut text)?;
    let text = text
        .split(|byte| *byte == 0 || *byte == b' ')
        .next()
        .unwrap_or_default();
    let text = std::str::from_utf8(text)
        .ok()
        .filter(|text| !text.is_empty());
    Ok(text.map(str::to_owned))
}

/// Names in an initial RAM disk.
#[derive(Debug, Default, PartialEq, Eq)]
struct Archive {
    names: Vec<String>,
    /// There is more behind them, which is compressed.
    is_cut: bool,
}

fn names(disk: &mut (impl Read + Seek)) -> io::Result<Archive> {
    let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let mut archive = Archive::default();
    let end = disk.seek(SeekFrom::End(0))?;
    let mut at = 0;
    while at < end {
        disk.seek(SeekFrom::Start(at))?;
        let mut head = [0; 110];
        let rest = usize::try_from((end - at).min(110)).unwrap_or(110);
        disk.read_exact(&mut head[..rest])?;
        if head[..4] == [0; 4] {
            // Between archives.
            at += 4;
            continue;
        }
        if !matches!(&head[..6], b"070701" | b"070702") {
            archive.is_cut = true;
            break;
        }
        let field = |number: usize| {
            let digits = std::str::from_utf8(&head[6 + number * 8..14 + number * 8]).unwrap_or("");
            u64::from_str_radix(digits, 16).map_err(|_| bad("its archive is damaged"))
        };
        let (size, long) = (field(6)?, field(11)?);
        if long > LONGEST || size > end {
            return Err(bad("its archive is damaged"));
        }
        let mut name = vec![0; usize::try_from(long).unwrap_or(0)];
        disk.read_exact(&mut name)?;
        name.pop();
        let data = (at + 110 + long).next_multiple_of(4);
        at = (data + size).next_multiple_of(4);
        let name = String::from_utf8_lossy(&name).into_owned();
        if name != "TRAILER!!!" {
            archive.names.push(name);
        }
    }
    Ok(archive)
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Cursor;

    use super::*;

    fn cpio(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, data) in files.iter().chain([&("TRAILER!!!", &[][..])]) {
            let numbers = [0, 0, 0, 0, 0, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0];
            bytes.extend(b"070701");
            for number in numbers {
                bytes.extend(format!("{number:08x}").bytes());
            }
            bytes.extend(name.bytes());
            bytes.push(0);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes.extend(*data);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    pub(in crate::agent) fn image(release: &str) -> Vec<u8> {
        let mut bytes = vec![0; 0x400];
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        let text = format!("{release} (somebody@somewhere) #1 SMP\0");
        bytes[0x300..0x300 + text.len()].copy_from_slice(text.as_bytes());
        bytes
    }

    #[test]
    fn names_are_read_of_archives_in_a_row_and_not_of_what_is_compressed() {
        let mut bytes = cpio(&[("init", b"abc"), ("lib/modules/nd_pmem.ko", b"")]);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes.extend(cpio(&[("lib/kvm-amd.ko.xz", b"12345")]));
        let read = names(&mut Cursor::new(&bytes)).expect("read");
        assert_eq!(
            read.names,
            ["init", "lib/modules/nd_pmem.ko", "lib/kvm-amd.ko.xz"]
        );
        assert!(!read.is_cut);
        bytes.extend(b"\x28\xb5\x2f\xfd and more");
        let read = names(&mut Cursor::new(&bytes)).expect("read");
        assert!(read.is_cut && read.names.len() == 3);
        for cut in [3, 50, 112, 130] {
            // Whatever is cut off is an error or less of it, and no panic.
            let _ = names(&mut Cursor::new(&bytes[..cut]));
        }
        let mut bent = bytes.clone();
        bent[6 + 11 * 8..14 + 11 * 8].copy_from_slice(b"ffffffff");
        names(&mut Cursor::new(&bent)).expect_err("no name is as long");
    }

    #[test]
    fn an_image_says_which_kernel_it_is() {
        let release = release_of(&mut Cursor::new(image("7.3.4+deb13-cloud-amd64"))).expect("read");
        assert_eq!(release.as_deref(), Some("7.3.4+deb13-cloud-amd64"));
        assert_eq!(
            release_of(&mut Cursor::new(vec![0; 0x400])).expect("read"),
            None
        );
        release_of(&mut Cursor::new(vec![0; 4])).expect_err("too short");
    }

    #[test]
    fn what_the_next_kernel_lacks_is_named() {
        let dir = tempfile::tempdir().expect("a folder");
        let (kernel, disk) = (dir.path().join("image"), dir.path().join("initrd"));
        std::fs::write(&kernel, image("1.2.3")).expect("written");
        std::fs::write(&disk, cpio(&[("lib/kvm.ko", b"")])).expect("written");
        let needed = ["kvm", "nd_pmem"];
        let look = || look_in(dir.path(), &kernel, Some(&disk), &needed);
        let lacks = |modules: &[&str]| Found::Missing {
            release: "1.2.3".into(),
            modules: modules.iter().map(|&name| name.into()).collect(),
        };
        assert_eq!(look(), lacks(&["nd_pmem"]));
        // On the root file system they count as well, also those that are built in.
        let folder = dir.path().join("1.2.3");
        std::fs::create_dir(&folder).expect("made");
        std::fs::write(
            folder.join("modules.builtin"),
            "kernel/drivers/nvdimm/nd_pmem.ko\n",
        )
        .expect("written");
        assert!(matches!(look(), Found::There(_)), "{:?}", look());
        std::fs::write(&disk, b"\x1f\x8b compressed").expect("written");
        assert_eq!(look(), lacks(&["kvm"]));
        std::fs::remove_dir_all(&folder).expect("gone");
        assert!(matches!(look(), Found::Unknown(why) if why.contains("compressed")));
    }
}

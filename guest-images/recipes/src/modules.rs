//! Kernel modules: which files are needed for those that are wanted, in the order they load in.
//!
//! A package has the module files, not `modules.dep` (depmod writes that at an installation). What a
//! module needs is in the file itself, in the section `.modinfo`, as `depends=a,b`. Names there have
//! `_` where file names may have `-`; both are the same module.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection};

/// Why the modules can't be had.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// Neither a file nor built in.
    #[error("kernel {release} has no module {name}, neither as a file nor built in")]
    Missing {
        /// The kernel's release.
        release: String,
        /// The module.
        name: String,
    },
    /// It can't be read or unpacked.
    #[error("reading {}: {why}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// Modules that need each other.
    #[error("module {0} needs itself, by way of others")]
    Cycle(String),
}

/// The module files of one kernel.
#[derive(Debug)]
pub struct Modules {
    release: String,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// A module, ready to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, with `_`.
    pub name: String,
    /// The ELF file, unpacked.
    pub elf: Vec<u8>,
}

impl Modules {
    /// Those of a kernel: `dir` is its `lib/modules/RELEASE`.
    pub fn of(release: &str, dir: &Path) -> Result<Self, ModuleError> {
        let mut files = BTreeMap::new();
        find(&dir.join("kernel"), &mut files)?;
        let builtin = std::fs::read_to_string(dir.join("modules.builtin")).unwrap_or_default();
        Ok(Self {
            release: release.to_owned(),
            files,
            builtin: builtin
                .lines()
                .filter_map(|line| name_of(Path::new(line)))
                .collect(),
        })
    }

    /// Whether there is such a module, as a file or built in.
    pub fn has(&self, name: &str) -> bool {
        let name = normal(name);
        self.files.contains_key(&name) || self.builtin.contains(&name)
    }

    /// These modules, each behind all that it needs, each once. Built-in ones need no file.
    pub fn closure(&self, wanted: &[&str]) -> Result<Vec<Module>, ModuleError> {
        let mut order = Vec::new();
        for name in wanted {
            self.visit(&normal(name), &mut order, &mut BTreeSet::new())?;
        }
        Ok(order)
    }

    fn visit(
        &self,
        name: &str,
        order: &mut Vec<Module>,
        above: &mut BTreeSet<String>,
    ) -> Result<(), ModuleError> {
        if order.iter().any(|module| module.name == name) || self.builtin.contains(name) {
            return Ok(());
        }
        if !above.insert(name.to_owned()) {
            return Err(ModuleError::Cycle(name.to_owned()));
        }
        let path = self.files.get(name).ok_or_else(|| ModuleError::Missing {
            release: self.release.clone(),
            name: name.to_owned(),
        })?;
        let unreadable = |why: String| ModuleError::Unreadable {
            path: path.clone(),
            why,
        };
        let elf = read(path).map_err(|error| unreadable(error.to_string()))?;
        for needed in depends(&elf).map_err(unreadable)? {
            self.visit(&needed, order, above)?;
        }
        above.remove(name);
        let name = name.to_owned();
        order.push(Module { name, elf });
        Ok(())
    }
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// `x.ko`, `x.ko.xz`: the module's name.
fn name_of(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let name = file
        .strip_suffix(".xz")
        .unwrap_or(file)
        .strip_suffix(".ko")?;
    Some(normal(name))
}

fn find(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), ModuleError> {
    let unreadable = |error: std::io::Error| ModuleError::Unreadable {
        path: dir.to_owned(),
        why: error.to_string(),
    };
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find(&path, files)?;
        } else if let Some(name) = name_of(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// The ELF file, unpacked where the package has it packed: `finit_module` of a guest must not depend
/// on what its kernel can unpack.
fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let bytes = std::fs::read(path)?;
    if path.extension().is_none_or(|extension| extension != "xz") {
        return Ok(bytes);
    }
    let mut elf = Vec::new();
    liblzma::read::XzDecoder::new(bytes.as_slice()).read_to_end(&mut elf)?;
    Ok(elf)
}

/// The names that a module says it depends on.
fn depends(elf: &[u8]) -> Result<Vec<String>, String> {
    let file = object::File::parse(elf).map_err(|error| error.to_string())?;
    let info = file
        .section_by_name(".modinfo")
        .ok_or("no .modinfo in it")?;
    let info = info.data().map_err(|error| error.to_string())?;
    let texts = info
        .split(|byte| *byte == 0)
        .filter_map(|text| std::str::from_utf8(text).ok());
    let names = texts.filter_map(|text| text.strip_prefix("depends="));
    Ok(names
        .flat_map(|names| names.split(','))
        .filter(|name| !name.is_empty())
        .map(normal)
        .collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use object::write::{Object as Writer, StandardSegment};
    use object::{Architecture, BinaryFormat, Endianness, SectionKind};

    fn module(depends: &str) -> Vec<u8> {
        let mut elf = Writer::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        let segment = elf.segment_name(StandardSegment::Data).to_vec();
        let section = elf.add_section(segment, b".modinfo".to_vec(), SectionKind::ReadOnlyData);
        let info = format!("license=GPL\0depends={depends}\0name=x\0");
        elf.append_section_data(section, info.as_bytes(), 1);
        elf.write().expect("an ELF file")
    }

    /// Makes `dir` a kernel's folder with these module files, each with what it depends on.
    pub(crate) fn fill(dir: &Path, modules: &[(&str, &str)], builtin: &str) {
        std::fs::create_dir_all(dir.join("kernel/deep/er")).expect("folders");
        for (name, depends) in modules {
            let elf = module(depends);
            let bytes = if name.ends_with(".xz") { xz(&elf) } else { elf };
            std::fs::write(dir.join("kernel/deep/er").join(name), bytes).expect("written");
        }
        std::fs::write(dir.join("modules.builtin"), builtin).expect("written");
    }

    fn tree(modules: &[(&str, &str)], builtin: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a folder");
        fill(dir.path(), modules, builtin);
        dir
    }

    fn xz(plain: &[u8]) -> Vec<u8> {
        let mut packed = Vec::new();
        let mut encoder = liblzma::read::XzEncoder::new(plain, 1);
        encoder.read_to_end(&mut packed).expect("packed");
        packed
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn each_comes_behind_what_it_needs_and_once() {
        let dir = tree(
            &[
                ("virtio_net.ko", "net_failover"),
                ("net_failover.ko.xz", "failover"),
                ("failover.ko", ""),
                ("kvm-amd.ko", "kvm,failover"),
                ("kvm.ko", ""),
            ],
            "kernel/drivers/virtio/virtio-pci.ko\n",
        );
        let modules = Modules::of("1", dir.path()).expect("a tree");
        let order = modules
            .closure(&["virtio_net", "kvm-amd", "virtio_pci", "kvm"])
            .expect("an order");
        assert_eq!(
            names(&order),
            ["failover", "net_failover", "virtio_net", "kvm", "kvm_amd"]
        );
        assert!(
            order
                .iter()
                .all(|module| module.elf.starts_with(b"\x7fELF"))
        );
        assert!(modules.has("virtio-pci") && modules.has("kvm_amd") && !modules.has("nonesuch"));
    }

    #[test]
    fn what_is_missing_is_named_with_its_kernel() {
        let dir = tree(&[("a.ko", "b")], "");
        let modules = Modules::of("6.1-x", dir.path()).expect("a tree");
        let error = modules
            .closure(&["a"])
            .expect_err("b is missing")
            .to_string();
        assert_eq!(
            error,
            "kernel 6.1-x has no module b, neither as a file nor built in"
        );
    }

    #[test]
    fn modules_that_need_each_other_are_refused() {
        let dir = tree(&[("a.ko", "b"), ("b.ko", "a")], "");
        let modules = Modules::of("1", dir.path()).expect("a tree");
        assert!(matches!(
            modules.closure(&["a"]),
            Err(ModuleError::Cycle(_))
        ));
    }

    #[test]
    fn a_file_that_is_no_module_is_refused() {
        let dir = tree(&[], "");
        std::fs::write(dir.path().join("kernel/a.ko"), "no ELF").expect("written");
        let modules = Modules::of("1", dir.path()).expect("a tree");
        assert!(matches!(
            modules.closure(&["a"]),
            Err(ModuleError::Unreadable { .. })
        ));
    }
}

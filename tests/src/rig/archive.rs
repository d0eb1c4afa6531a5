//! The host's initramfs: modules, init, and what the run brings with it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use stillpoint_images::guest::{add_modules, skeleton};
use stillpoint_images::initramfs::Initramfs;
use stillpoint_images::modules::Modules;
use stillpoint_images::programs::Programs;

use super::Ingredients;
use super::order::{ORDER, Order, ROOT};

/// What a host needs: KVM, what leads packets to guests, or keeps them from the host, and the disks
/// of the rig.
const MODULES: &[&str] = &[
    "kvm_amd",
    "kvm_intel",
    "tun",
    "bridge",
    "veth",
    "macvlan",
    "sch_ingress",
    "cls_u32",
    "act_mirred",
    "nf_tables",
    "nft_fib_netdev",
    "nft_fib_inet",
    "nft_meta_bridge",
    "vhost_net",
    "loop",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
];

/// What makes a device-dax of memory that the kernel left alone.
const CARVE_OUT: &[&str] = &["nd_e820", "nd_pmem", "dax_pmem", "device_dax"];

/// Starts the QEMU that [`super::Rig::with_qemu`] brings, by the loader that came with it.
const QEMU_SCRIPT: &str = "#!/bin/sh\n\
    exec /qemu/lib/ld-linux-x86-64.so.2 --library-path /qemu/lib /qemu/qemu -L /qemu/share \"$@\"\n";

/// Writes it to `path`.
pub(super) fn write(
    path: &Path,
    found: &Ingredients,
    files: &[(PathBuf, String)],
    order: &Order,
) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let mut archive = Initramfs::new(BufWriter::new(file));
    skeleton(&mut archive, &found.busybox)?;
    let modules = Modules::of(&found.kernel.release, &found.kernel.modules)?;
    let carve_out = if order.carve_out { CARVE_OUT } else { &[] };
    let wanted = [MODULES, carve_out].concat();
    add_modules(&mut archive, &modules.closure(&wanted)?)?;
    Programs::of(&found.iproute, &["sbin/tc", "bin/ip"]).add(&mut archive)?;
    archive.copy("init", 0o755, &super::program("rig-init")?)?;
    archive.file(ORDER, 0o644, &serde_json::to_vec(order)?)?;
    archive.link("images", &format!("{ROOT}/target/images"))?;
    archive.file("bin/qemu-microvm", 0o755, QEMU_SCRIPT.as_bytes())?;
    for (from, to) in files {
        add(&mut archive, from, to)?;
    }
    archive
        .finish()?
        .flush()
        .with_context(|| format!("writing {}", path.display()))
}

/// A file, or a folder with all in it.
fn add<W: Write>(archive: &mut Initramfs<W>, from: &Path, to: &str) -> anyhow::Result<()> {
    let meta = from
        .metadata()
        .with_context(|| format!("{} for the emulated host", from.display()))?;
    if meta.is_dir() {
        archive.folder(to)?;
        let mut entries = from.read_dir()?.collect::<Result<Vec<_>, _>>()?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let name = entry.file_name();
            add(
                archive,
                &entry.path(),
                &format!("{to}/{}", name.to_string_lossy()),
            )?;
        }
        return Ok(());
    }
    Ok(archive.copy(to, meta.permissions().mode() & 0o777, from)?)
}

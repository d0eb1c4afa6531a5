//! virtio devices of a pulse guest: which it has, what it says of them, and what its disks must
//! hold, sector by sector.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, ensure};
use stillpoint_control::spec::{DiskSpec, NetSpec, VsockSpec};
use stillpoint_guest_abi::attack;
use stillpoint_guest_abi::disk::{BLOCK_SECTORS, Block, Content, SECTOR, content};
use stillpoint_guest_abi::pulse::Report;

use crate::guest::Pulse;

/// The devices of a guest, in the order in which it finds them.
#[derive(Clone, Debug, Default)]
pub struct Devices {
    /// Disks.
    pub disks: Vec<DiskSpec>,
    /// Network interfaces.
    pub nets: Vec<NetSpec>,
    /// A vsock device.
    pub vsock: Option<VsockSpec>,
    /// An entropy device.
    pub rng: bool,
}

/// Everything that must be zero of the devices that a vCPU drove, by name.
pub(crate) fn faults(report: &Report) -> Vec<(String, u64)> {
    let Report {
        driver,
        blk,
        net,
        rng,
        vsock,
        hostile,
        ..
    } = report;
    let counts = [
        ("virtio devices not there", driver.absent),
        ("virtio devices that did not start", driver.refused),
        ("virtio requests done twice", driver.doubled),
        ("virtio requests lost", driver.lost),
        ("used rings torn", driver.torn),
        ("virtio devices that needed a reset", driver.needs_reset),
        ("virtio interrupts lost", driver.interrupts_lost),
        ("disk requests failed", blk.errors),
        ("disk sectors wrong", blk.wrong),
        ("disk requests without status", blk.bad_status),
        ("frames doubled", net.duplicated),
        ("frames corrupted", net.corrupted),
        ("frame headers wrong", net.bad_headers),
        ("hollow entropy", rng.hollow),
        ("repeated entropy", rng.repeated),
        ("vsock connections broken", vsock.broken),
        ("vsock bytes wrong", vsock.wrong),
        ("vsock packets wrong", vsock.bad_packets),
        ("vsock records stalled", vsock.stalled),
    ];
    let counts = counts.map(|(name, count)| (name.to_owned(), count));
    // Each kind of attack by its name; the sums beside them say no more.
    let attacks = attack::NAMES
        .iter()
        .zip(&hostile.each)
        .map(|(name, tally)| {
            let sums = [
                ("stuck", hostile.stuck),
                ("reset stuck", hostile.reset_stuck),
                ("dead", hostile.dead),
                ("scribbled", hostile.scribbled),
            ];
            let which: Vec<_> = sums
                .iter()
                .filter(|(_, n)| *n > 0)
                .map(|(s, _)| *s)
                .collect();
            let name = format!("attacks `{name}` that succeeded ({})", which.join(", "));
            (name, u64::from(tally.succeeded))
        });
    counts.into_iter().chain(attacks).collect()
}

/// What was found on a disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskFound {
    /// Blocks of which the guest was told that something is durable.
    pub durable_blocks: u64,
    /// Sectors that hold writes of this run.
    pub written: u64,
    /// Sectors that hold zeros.
    pub zeros: u64,
}

/// Checks a disk image against what the guest that wrote it knows to be durable. The guest's vCPU
/// `vcpu` has been in mode `blk`; it stands still, or is done with the disk.
pub fn check_disk(pulse: &Pulse, vcpu: usize, image: &Path) -> anyhow::Result<DiskFound> {
    let blk = pulse.look()?.vcpus[vcpu].blk;
    ensure!(blk.table_gpa != 0, "vCPU {vcpu} has written no disk");
    let table: Vec<Block> = pulse.blocks(blk.table_gpa, blk.blocks)?;
    let file = File::open(image).with_context(|| format!("open {}", image.display()))?;
    let mut found = DiskFound::default();
    for (block, first) in table.iter().zip((0..).step_by(blk.stride.try_into()?)) {
        found.durable_blocks += u64::from(block.durable > 0);
        for sector in (0..BLOCK_SECTORS).map(|n| first + n) {
            let mut bytes = [0; SECTOR];
            file.read_exact_at(&mut bytes, sector * SECTOR as u64)?;
            let word = |index: usize| {
                let mut word = [0; 8];
                word.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
                u64::from_le_bytes(word)
            };
            let holds = content(blk.run, sector, word);
            ensure!(
                block.allows(holds),
                "sector {sector} holds {holds:?}, and the guest knows {block:?}"
            );
            found.written += u64::from(matches!(holds, Content::Written(_)));
            found.zeros += u64::from(holds == Content::Zeros);
        }
    }
    Ok(found)
}

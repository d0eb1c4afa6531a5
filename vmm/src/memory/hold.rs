//! Where the host keeps guest RAM: on which of its memory nodes, and whether it may be swapped out. The first is the
//! file's, and goes along with it; the second is each process's own, so whoever maps RAM asks for it anew.

use std::path::Path;

use rustix::io::Errno;
use rustix::mm::{MlockFlags, mlock_with};
use stillpoint_control::spec::{MAX_NODES, MemorySpec};
use vm_memory::GuestMemoryBackend;

use super::{Memory, MemoryError};

/// Bits of a word of the kernel's node masks.
const WORD: usize = u64::BITS as usize;

/// Does what the spec asks for to a mapping of all RAM, before a page of it is made.
pub(super) fn hold(map: &Memory, spec: &MemorySpec) -> Result<(), MemoryError> {
    for region in map.iter() {
        let (at, len) = (region.as_ptr(), region.size());
        if !spec.nodes.is_empty() {
            bind(at, len, &spec.nodes).map_err(|source| {
                let nodes: Vec<String> = spec.nodes.iter().map(u16::to_string).collect();
                MemoryError::Nodes {
                    nodes: nodes.join(", "),
                    source,
                }
            })?;
        }
        if spec.lock {
            // SAFETY: a mapping of ours; pages are locked when they are there, none is made.
            unsafe { mlock_with(at.cast(), len, MlockFlags::ONFAULT) }
                .map_err(MemoryError::Lock)?;
        }
    }
    Ok(())
}

/// mbind(2), MPOL_BIND.
fn bind(at: *mut u8, len: usize, nodes: &[u16]) -> Result<(), Errno> {
    let mut mask = [0_u64; MAX_NODES as usize / WORD];
    for &node in nodes {
        // The kernel leaves out in silence what it doesn't have, as long as one is left.
        if !Path::new(&format!("/sys/devices/system/node/node{node}")).exists() {
            return Err(Errno::NODEV);
        }
        let node = usize::from(node);
        let word = mask.get_mut(node / WORD).ok_or(Errno::INVAL)?;
        *word |= 1 << (node % WORD);
    }
    // The kernel takes one bit less than it is told.
    let bits = mask.len() * WORD + 1;
    // SAFETY: a mapping of ours, and a mask of as many bits.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            at,
            len,
            libc::MPOL_BIND,
            mask.as_ptr(),
            bits,
            0,
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)),
    }
}

//! What was saved again, read and compared.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use stillpoint_state::codec::MAX_STATE;
use stillpoint_state::{StateError, likeness};

/// Reads a state that another process wrote; at most as much as any may have.
pub(super) fn read(from: &OwnedFd, len: u64) -> Result<Vec<u8>, Errno> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > MAX_STATE {
        return Err(Errno::FBIG);
    }
    // What is not there is not allocated either.
    let there = rustix::fs::fstat(from)?.st_size;
    let mut bytes = vec![0; len.min(usize::try_from(there).unwrap_or(0))];
    let mut at = 0;
    while at < bytes.len() {
        match rustix::io::pread(from, &mut bytes[at..], at as u64)? {
            0 => break,
            n => at += n,
        }
    }
    bytes.truncate(at);
    Ok(bytes)
}

/// What differs. MSRs that were left out read as nothing, which is none of the release's doing.
pub(super) fn differences(
    before: &[u8],
    again: &[u8],
    without_late: bool,
) -> Result<Vec<String>, StateError> {
    let mut found = likeness::differences(before, again)?;
    if without_late {
        found.retain(|difference| !crate::vcpu::msrs::is_late(difference));
    }
    Ok(found)
}

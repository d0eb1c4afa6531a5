//! A machine's virtio devices, as its owner wanted them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{SpecError, field, one};

/// The most pairs of queues of a network interface.
pub const MAX_QUEUE_PAIRS: u8 = 8;
/// The least context id of a guest: 0 to 2 are the hypervisor's, the loopback's and the host's.
pub const MIN_CID: u32 = 3;

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_one(value: &u8) -> bool {
    *value == 1
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// A raw image, or a block device.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub path: PathBuf,
    /// The guest can't write to it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// Name of a tap interface of the host.
    pub tap: String,
    /// The guest's MAC address, such as `52:54:00:12:34:56`; made from the machine's name and
    /// the interface's number when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Pairs of queues, 1 to [`MAX_QUEUE_PAIRS`]; more than one needs a tap with `IFF_MULTI_QUEUE`.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub queue_pairs: u8,
}

/// A vsock device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// The guest's context id, at least [`MIN_CID`].
    pub cid: u32,
}

impl VsockSpec {
    /// For a machine of that name when nobody chose a context id: always the same. Two machines
    /// may have one in common, since the host reaches each by its own Unix socket.
    pub fn for_name(name: &str) -> Self {
        // FNV-1a, 32 bits.
        let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
        // The last one means "any" (`VMADDR_CID_ANY`).
        Self {
            cid: MIN_CID + hash % (u32::MAX - MIN_CID),
        }
    }
}

pub(super) fn validate_net(net: &NetSpec) -> Result<(), SpecError> {
    // IFNAMSIZ, with the terminating zero (include/uapi/linux/if.h).
    let name_ok = (1..16).contains(&net.tap.len())
        && net
            .tap
            .bytes()
            .all(|b| b.is_ascii_graphic() && b != b'/' && b != b':');
    if !name_ok {
        let text = format!("{:?} is no interface name: 1 to 15 characters", net.tap);
        return Err(field("nets.tap", text));
    }
    if net.queue_pairs == 0 || net.queue_pairs > MAX_QUEUE_PAIRS {
        let text = format!("{} is not in 1 to {MAX_QUEUE_PAIRS}", net.queue_pairs);
        return Err(field("nets.queue_pairs", text));
    }
    match net.mac.as_deref().map(parse_mac) {
        Some(Err(problem)) => Err(field("nets.mac", problem)),
        _ => Ok(()),
    }
}

/// FNV-1a of the name and the number, 64 bits, folded into the 46 that a locally administered
/// address of one machine has free (IEEE 802: the second-lowest bit of the first byte set, the
/// lowest clear).
pub(super) fn default_mac(name: &str, number: usize) -> [u8; 6] {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let bytes = name
        .bytes()
        .chain([b'/'])
        .chain((number as u64).to_le_bytes());
    let hash = bytes.fold(OFFSET, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(PRIME)
    });
    let [a, b, c, d, e, f, g, h] = hash.to_le_bytes();
    [a & 0xfc | 0x02, b, c ^ g, d ^ h, e, f]
}

/// Writes a MAC address as [`parse_mac`] reads it.
pub fn format_mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Reads a MAC address such as `52:54:00:12:34:56`.
pub fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("`{text}` is no MAC address; write 52:54:00:12:34:56");
    let parts: Vec<_> = text.split(':').collect();
    let parts: [&str; 6] = parts.try_into().map_err(|_| wrong())?;
    let mut mac = [0; 6];
    for (byte, part) in mac.iter_mut().zip(parts) {
        if part.len() != 2 {
            return Err(wrong());
        }
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(format!(
            "`{text}` is a group's address or none; a guest needs one of its own"
        ));
    }
    Ok(mac)
}

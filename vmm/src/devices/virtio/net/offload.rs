//! Checksums and segmentation left to the other side: virtio's features and the tap's flags.
//!
//! `GUEST_*` is what a guest takes from us, and so what the tap may hand out (TUNSETOFFLOAD);
//! `HOST_*` is what we take from a guest, which a tap with a header before each frame always does.

use virtio_bindings::virtio_net::*;

/// (feature that the driver accepts, `TUN_F_*` flag: include/uapi/linux/if_tun.h).
const PAIRS: [(u32, u32); 7] = [
    (VIRTIO_NET_F_GUEST_CSUM, CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, TSO6),
    (VIRTIO_NET_F_GUEST_ECN, TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, UFO),
    (VIRTIO_NET_F_GUEST_USO4, USO4),
    (VIRTIO_NET_F_GUEST_USO6, USO6),
];
const CSUM: u32 = 0x01;
const TSO4: u32 = 0x02;
const TSO6: u32 = 0x04;
const TSO_ECN: u32 = 0x08;
const UFO: u32 = 0x10;
const USO4: u32 = 0x20;
const USO6: u32 = 0x40;

/// What kernels take, best first: `USO*` is of 6.2, and a few have no UFO.
pub(super) const LEVELS: [u32; 5] = [
    CSUM | TSO4 | TSO6 | TSO_ECN | UFO | USO4 | USO6,
    CSUM | TSO4 | TSO6 | TSO_ECN | UFO,
    CSUM | TSO4 | TSO6 | TSO_ECN,
    CSUM,
    0,
];

const fn bit(number: u32) -> u64 {
    1 << number
}

/// Features to offer with a tap that takes these flags.
pub(super) fn offered(flags: u32) -> u64 {
    let mut features = bit(VIRTIO_NET_F_CSUM)
        | bit(VIRTIO_NET_F_HOST_TSO4)
        | bit(VIRTIO_NET_F_HOST_TSO6)
        | bit(VIRTIO_NET_F_HOST_ECN);
    if flags & UFO != 0 {
        features |= bit(VIRTIO_NET_F_HOST_UFO);
    }
    if flags & USO4 != 0 {
        features |= bit(VIRTIO_NET_F_HOST_USO);
    }
    for (feature, flag) in PAIRS {
        if flags & flag != 0 {
            features |= bit(feature);
        }
    }
    features
}

/// Those of `features` that say what the guest takes.
pub(super) fn guest(features: u64) -> u64 {
    let all = PAIRS
        .iter()
        .fold(0, |all, &(feature, _)| all | bit(feature));
    features & all
}

/// The tap's flags for what a guest takes. Leaves out what a tap refuses without something else
/// (`set_offload` in drivers/net/tun.c); it is always right to hand out less.
pub(super) fn flags(guest: u64) -> u32 {
    let has = |(feature, _): &&(u32, u32)| guest & bit(*feature) != 0;
    let mut flags = PAIRS
        .iter()
        .filter(has)
        .fold(0, |all, &(_, flag)| all | flag);
    if flags & CSUM == 0 {
        return 0;
    }
    if flags & (TSO4 | TSO6) == 0 {
        flags &= !TSO_ECN;
    }
    if flags & (USO4 | USO6) != USO4 | USO6 {
        flags &= !(USO4 | USO6);
    }
    flags
}

/// Whether frames may be longer than the wire's.
pub(super) fn long_frames(guest: u64) -> bool {
    flags(guest) & !(CSUM | TSO_ECN) != 0
}

/// Whether frames may come without their checksum.
pub(super) fn no_checksums(guest: u64) -> bool {
    flags(guest) & CSUM != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_is_asked_for_nothing_that_it_refuses() {
        let csum = bit(VIRTIO_NET_F_GUEST_CSUM);
        let (tso4, ecn) = (bit(VIRTIO_NET_F_GUEST_TSO4), bit(VIRTIO_NET_F_GUEST_ECN));
        let uso4 = bit(VIRTIO_NET_F_GUEST_USO4);
        assert_eq!(flags(tso4), 0, "TSO wants checksums");
        assert_eq!(flags(csum | ecn), CSUM, "ECN wants TSO");
        assert_eq!(flags(csum | tso4 | ecn), CSUM | TSO4 | TSO_ECN);
        assert_eq!(flags(csum | uso4), CSUM, "USO4 and USO6 go together");
        for level in LEVELS {
            assert_eq!(flags(guest(offered(level))), level, "{level:#x}");
        }
        assert!(long_frames(csum | tso4) && !long_frames(csum));
        assert!(no_checksums(csum) && !no_checksums(tso4));
    }
}

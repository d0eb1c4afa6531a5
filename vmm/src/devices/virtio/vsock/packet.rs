//! Packets between driver and device (virtio 1.2, section 5.10.6).
//!
//! A header is the guest's claim like all else: whoever reads one judges its ports, its length and
//! its credit before anything is done with them.

/// Bytes of a header.
pub(super) const HEADER: usize = 44;
/// The host's context id.
pub(super) const HOST_CID: u64 = 2;
/// Socket type: a stream, the only one there is without VIRTIO_VSOCK_F_SEQPACKET.
pub(super) const STREAM: u16 = 1;

/// Whoever says so receives no more (`VIRTIO_VSOCK_SHUTDOWN_RCV`).
pub(super) const NO_MORE_IN: u32 = 1;
/// Whoever says so sends no more (`VIRTIO_VSOCK_SHUTDOWN_SEND`).
pub(super) const NO_MORE_OUT: u32 = 2;
/// Both.
pub(super) const NO_MORE: u32 = NO_MORE_IN | NO_MORE_OUT;

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    pub(super) fn of(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// Both ends of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// The header of a packet, `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) from_cid: u64,
    pub(super) to_cid: u64,
    pub(super) from_port: u32,
    pub(super) to_port: u32,
    /// Bytes that follow it.
    pub(super) len: u32,
    /// Socket type.
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// What the sender can hold of this connection.
    pub(super) buf_alloc: u32,
    /// What the sender has taken out of that so far, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        let mut rest = Fields(bytes);
        Self {
            from_cid: u64::from_le_bytes(rest.take()),
            to_cid: u64::from_le_bytes(rest.take()),
            from_port: u32::from_le_bytes(rest.take()),
            to_port: u32::from_le_bytes(rest.take()),
            len: u32::from_le_bytes(rest.take()),
            kind: u16::from_le_bytes(rest.take()),
            op: u16::from_le_bytes(rest.take()),
            flags: u32::from_le_bytes(rest.take()),
            buf_alloc: u32::from_le_bytes(rest.take()),
            fwd_cnt: u32::from_le_bytes(rest.take()),
        }
    }

    pub(super) fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend(self.from_cid.to_le_bytes());
        bytes.extend(self.to_cid.to_le_bytes());
        bytes.extend(self.from_port.to_le_bytes());
        bytes.extend(self.to_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The connection it belongs to, if it came from the guest.
    pub(super) fn ports(&self) -> Ports {
        Ports {
            host: self.to_port,
            guest: self.from_port,
        }
    }
}

/// The fields of a header, first to last.
struct Fields<'b>(&'b [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            // Can't be: the fields of a header are 44 bytes together.
            None => [0; N],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_the_same_after_the_way_through_bytes() {
        let bytes: [u8; HEADER] = std::array::from_fn(|at| at as u8 + 1);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.from_cid, 0x0807_0605_0403_0201);
        assert_eq!(header.op, 0x201f);
        assert_eq!(header.fwd_cnt, 0x2c2b_2a29);
        assert_eq!(header.to_bytes(), bytes);
    }
}

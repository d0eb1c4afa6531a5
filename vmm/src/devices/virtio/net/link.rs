//! What the host says of a network interface (rtnetlink, RTM_GETLINK).
//!
//! Only asks. One question tells all that has to be known before a tap is opened: opening a name
//! that does not exist would make an interface, and a tap with several queues lets a second
//! process in without a word.

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

// Message types and flags (include/uapi/linux/netlink.h, rtnetlink.h).
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const NLM_F_REQUEST: u16 = 1;
/// `struct nlmsghdr`, and `struct ifinfomsg` behind it.
const HEADER: usize = 16;
const IFINFO: usize = 16;
/// Offset of `ifi_flags` in `struct ifinfomsg`.
const IFI_FLAGS: usize = 8;
const IFF_UP: u32 = 1;
// Attributes (include/uapi/linux/if_link.h).
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
const IFLA_TUN_NUM_QUEUES: u16 = 8;
const IFLA_TUN_NUM_DISABLED_QUEUES: u16 = 9;
/// `IFF_TAP` (include/uapi/linux/if_tun.h).
const TAP: u8 = 2;
/// Flag bits in an attribute's type.
const NLA_TYPE_MASK: u16 = 0x3fff;

/// An interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    /// Bytes of a frame's payload.
    pub(super) mtu: u32,
    /// Whether it is up.
    pub(super) up: bool,
    /// Set when it is a tap.
    pub(super) tap: Option<TapLink>,
}

/// What is special about a tap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TapLink {
    /// It was made to have several queues.
    pub(super) multi_queue: bool,
    /// Queues that some process has open now.
    pub(super) queues: u32,
}

/// Looks for the interface `name` in this process's network namespace.
pub(super) fn find(name: &str) -> Result<Option<Link>, Errno> {
    // Protocol 0 is NETLINK_ROUTE.
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None,
    )?;
    send(&socket, &question(name), SendFlags::empty())?;
    // The kernel answers within the send; the attributes of one link are some 2 KiB.
    let mut answer = vec![0; 64 << 10];
    let (len, _) = recv(&socket, &mut answer[..], RecvFlags::DONTWAIT)?;
    read_answer(&answer[..len])
}

fn question(name: &str) -> Vec<u8> {
    let attribute = 4 + name.len() + 1;
    let len = HEADER + IFINFO + attribute.next_multiple_of(4);
    let mut message = Vec::with_capacity(len);
    message.extend((len as u32).to_ne_bytes());
    message.extend(RTM_GETLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.resize(HEADER + IFINFO, 0); // sequence and port 0, any family, by name
    message.extend((attribute as u16).to_ne_bytes());
    message.extend(IFLA_IFNAME.to_ne_bytes());
    message.extend(name.as_bytes());
    message.resize(len, 0);
    message
}

fn read_answer(answer: &[u8]) -> Result<Option<Link>, Errno> {
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok());
    match kind.map(u16::from_ne_bytes) {
        Some(RTM_NEWLINK) => {}
        Some(NLMSG_ERROR) => {
            let code = word(answer.get(HEADER..).unwrap_or_default()) as i32;
            return match Errno::from_raw_os_error(-code) {
                Errno::NODEV => Ok(None),
                other => Err(other),
            };
        }
        _ => return Err(Errno::PROTO),
    }
    let Some(body) = answer.get(HEADER + IFINFO..) else {
        return Err(Errno::PROTO);
    };
    let mut link = Link {
        up: word(&answer[HEADER + IFI_FLAGS..]) & IFF_UP != 0,
        ..Link::default()
    };
    for (kind, value) in attributes(body) {
        match kind {
            IFLA_MTU => link.mtu = word(value),
            IFLA_LINKINFO => link.tap = tap(value),
            _ => {}
        }
    }
    Ok(Some(link))
}

fn tap(info: &[u8]) -> Option<TapLink> {
    let mut is_tun = false;
    let mut is_tap = false;
    let mut tap = TapLink::default();
    for (kind, value) in attributes(info) {
        match kind {
            IFLA_INFO_KIND => is_tun = value == b"tun\0",
            IFLA_INFO_DATA => {
                for (kind, value) in attributes(value) {
                    match kind {
                        IFLA_TUN_TYPE => is_tap = value == [TAP],
                        IFLA_TUN_MULTI_QUEUE => tap.multi_queue = value != [0],
                        IFLA_TUN_NUM_QUEUES | IFLA_TUN_NUM_DISABLED_QUEUES => {
                            tap.queues += word(value);
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    (is_tun && is_tap).then_some(tap)
}

/// The attributes in `bytes`: type and value.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?);
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..usize::from(len))?;
        bytes = bytes
            .get(usize::from(len).next_multiple_of(4)..)
            .unwrap_or_default();
        Some((kind & NLA_TYPE_MASK, value))
    })
}

/// The first 32 bits; 0 where there are fewer.
fn word(bytes: &[u8]) -> u32 {
    let word = bytes.get(..4).and_then(|bytes| bytes.try_into().ok());
    word.map_or(0, u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_there_and_no_tap() {
        let link = find("lo").expect("asked").expect("there");
        assert_eq!(link.tap, None);
        assert!(link.mtu >= 1500, "{link:?}");
    }

    #[test]
    fn a_name_that_nothing_has() {
        assert_eq!(find("no-such-tap-0").expect("asked"), None);
    }

    #[test]
    fn answers_cut_off_anywhere_are_no_panic() {
        let mut whole = question("lo");
        whole[4..6].copy_from_slice(&RTM_NEWLINK.to_ne_bytes());
        for len in 0..whole.len() {
            let _ = read_answer(&whole[..len]);
        }
        whole[HEADER + IFINFO] = 0;
        read_answer(&whole)
            .expect("an attribute of no length ends the list")
            .expect("a link");
    }
}

//! Brings up `lo`, and an address on the first virtio NIC.
//!
//! By route netlink (rtnetlink(7)): three kinds of message, each acknowledged. There is no
//! other way that needs neither a program in the image nor unsafe code.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

// uapi/linux/netlink.h and rtnetlink.h.
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST: u16 = 0x001;
const NLM_F_ACK: u16 = 0x004;
const NLM_F_CREATE: u16 = 0x400;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_GATEWAY: u16 = 5;
const RTA_OIF: u16 = 4;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RTN_UNICAST: u8 = 1;
const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;

/// Brings up what was asked for, and tells what was not possible.
pub(super) fn bring_up(address: Option<&str>, gateway: Option<&str>) {
    if let Err(error) = index("lo").and_then(|lo| Netlink::open()?.up(lo)) {
        say!("bringing up lo: {error}");
    }
    let Some(address) = address else {
        return;
    };
    if let Err(error) = configure(address, gateway) {
        say!("agent.ip={address}: {error}");
    }
}

fn configure(address: &str, gateway: Option<&str>) -> io::Result<()> {
    let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidInput, text.to_owned());
    let (address, prefix) = parse(address).ok_or_else(|| invalid("is not ADDRESS/BITS"))?;
    let gateway = match gateway {
        None => None,
        Some(text) => {
            let gateway = text.parse::<Ipv4Addr>();
            Some(gateway.map_err(|_| invalid("agent.gw is not an IPv4 address"))?)
        }
    };
    let name = first_nic()?.ok_or_else(|| invalid("there is no network interface"))?;
    let nic = index(&name)?;
    let mut netlink = Netlink::open()?;
    netlink.address(nic, address, prefix)?;
    // An interface that is down has no routes.
    netlink.up(nic)?;
    if let Some(gateway) = gateway {
        netlink.default_route(nic, gateway)?;
    }
    say!("{name} has {address}/{prefix}");
    Ok(())
}

fn parse(text: &str) -> Option<(Ipv4Addr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
    Some((address.parse().ok()?, prefix))
}

/// Of the interfaces that belong to a device the first, by index; a virtio one before others.
fn first_nic() -> io::Result<Option<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/class/net")? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(driver) = std::fs::read_link(entry.path().join("device/driver")) else {
            continue;
        };
        found.push((!driver.ends_with("virtio_net"), index(&name)?, name));
    }
    Ok(found.into_iter().min().map(|(_, _, name)| name))
}

fn index(name: &str) -> io::Result<u32> {
    let text = std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))?;
    text.trim()
        .parse()
        .map_err(|_| io::ErrorKind::InvalidData.into())
}

/// A socket to the kernel's networking.
struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        // No protocol is the first: NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        let sequence = 0;
        Ok(Self { socket, sequence })
    }

    /// `struct ifinfomsg`: family, pad, type, index, flags, and the mask of those to change.
    fn up(&mut self, interface: u32) -> io::Result<()> {
        let mut body = vec![0; 4];
        body.extend(interface.to_ne_bytes());
        body.extend(IFF_UP.to_ne_bytes());
        body.extend(IFF_UP.to_ne_bytes());
        self.ask(RTM_NEWLINK, 0, &body)
    }

    /// `struct ifaddrmsg`: family, prefix, flags, scope, index; then attributes.
    fn address(&mut self, interface: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let mut body = vec![AF_INET, prefix, 0, RT_SCOPE_UNIVERSE];
        body.extend(interface.to_ne_bytes());
        attribute(&mut body, IFA_LOCAL, address.octets());
        attribute(&mut body, IFA_ADDRESS, address.octets());
        self.ask(RTM_NEWADDR, NLM_F_CREATE, &body)
    }

    /// `struct rtmsg`: family, two prefixes, TOS, table, protocol, scope, type, flags.
    fn default_route(&mut self, interface: u32, gateway: Ipv4Addr) -> io::Result<()> {
        let mut body = vec![AF_INET, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT];
        body.extend([RT_SCOPE_UNIVERSE, RTN_UNICAST, 0, 0, 0, 0]);
        attribute(&mut body, RTA_GATEWAY, gateway.octets());
        attribute(&mut body, RTA_OIF, interface.to_ne_bytes());
        self.ask(RTM_NEWROUTE, NLM_F_CREATE, &body)
    }

    /// Sends one message and waits for its acknowledgement.
    fn ask(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.sequence += 1;
        let message = message(kind, flags, self.sequence, body);
        let kernel = SocketAddrNetlink::new(0, 0);
        sendto(&self.socket, &message, SendFlags::empty(), &kernel)?;
        let mut reply = [0; 4096];
        let (length, _) = recv(&self.socket, &mut reply, RecvFlags::empty())?;
        acknowledged(&reply[..length])
    }
}

/// `struct nlmsghdr`, and the body behind it.
fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
    let mut message = Vec::from(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    message.extend([0; 4]);
    message.extend(body);
    message
}

/// `struct rtattr` and its four bytes; every attribute here has four.
fn attribute(body: &mut Vec<u8>, kind: u16, value: [u8; 4]) {
    body.extend(8_u16.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
}

/// An acknowledgement is an error message whose error is 0, right behind the header.
fn acknowledged(reply: &[u8]) -> io::Result<()> {
    let kind = reply
        .get(4..6)
        .map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
    let error = reply
        .get(16..20)
        .and_then(|error| error.try_into().ok())
        .map(i32::from_ne_bytes);
    match (kind, error) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(error)) => {
            Err(Errno::from_raw_os_error(error.saturating_neg()).into())
        }
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "netlink answered no acknowledgement",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart() {
        assert_eq!(parse("10.0.0.2/24"), Some((Ipv4Addr::new(10, 0, 0, 2), 24)));
        assert_eq!(parse("10.0.0.2/33"), None);
        assert_eq!(parse("10.0.0.2"), None);
    }

    /// What the kernel says to a message shows whether it understood it (EINVAL if not): there is no
    /// such interface. Without the right to change anything it says no more than that.
    #[test]
    fn the_kernel_understands_our_messages() {
        let mut netlink = Netlink::open().unwrap();
        let nowhere = 0x7fff_fff0;
        let address = Ipv4Addr::new(192, 0, 2, 1);
        for answer in [
            netlink.up(nowhere),
            netlink.address(nowhere, address, 24),
            netlink.default_route(nowhere, address),
        ] {
            let error = answer.unwrap_err();
            let error = Errno::from_io_error(&error).unwrap();
            assert!(
                matches!(error, Errno::NODEV | Errno::NETUNREACH | Errno::PERM),
                "{error}"
            );
        }
    }
}

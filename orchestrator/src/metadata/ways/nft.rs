//! Messages to the kernel's nf_tables (uapi/linux/netfilter/nf_tables.h), as many in one transaction
//! as are needed: all of it comes to be, or nothing.
//!
//! It is spoken here, and not by `nft`, so that a guest is kept from its host on every host whose
//! kernel can do it, and so that nothing has to be read out of a program's text.

use std::io;
use std::net::Ipv4Addr;

use rustix::io::Errno;
use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 0x001;
const NLM_F_ACK: u16 = 0x004;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
const NLA_F_NESTED: u16 = 0x8000;
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
/// The ethertype of IPv4.
pub(super) const IP: u16 = 0x0800;

/// A family of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// IPv4 and IPv6, where the host itself receives.
    Inet,
    /// One interface, before all else.
    Netdev,
    /// Bridges, where a bridge itself receives.
    Bridge,
}

impl Family {
    fn number(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Netdev => 5,
            Self::Bridge => 7,
        }
    }
}

/// What a rule does with a packet that it fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on.
    Accept,
    /// It is gone.
    Drop,
    /// This chain says what becomes of it.
    Jump(&'static str),
}

/// What a rule looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Match {
    /// The destination is an address of this host.
    ToThisHost,
    /// The destination of an IPv4 packet.
    To(Ipv4Addr),
    /// It came in by this interface.
    From(String),
    /// Its frame was not to one MAC alone.
    ToMany,
    /// What the frame holds, by its ethertype.
    Holds(u16),
    /// The destination of an IPv6 packet is an address of the link (`fe80::/10`), which nobody routes.
    ToTheLink,
    /// The protocol above IP.
    Protocol(u8),
    /// The destination port of TCP or UDP.
    Port(u16),
    /// The type of ICMP.
    Kind(u8),
    /// TCP's ACK is set: it opens no connection.
    Acknowledges,
}

/// One transaction being written.
#[derive(Debug)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
    asked: u32,
}

impl Batch {
    /// An empty one.
    pub(super) fn new() -> Self {
        let mut batch = Self {
            bytes: Vec::new(),
            sequence: 0,
            asked: 0,
        };
        batch.bound(BATCH_BEGIN);
        batch
    }

    /// Removes a table with all in it, whether it is there or not.
    pub(super) fn no_table(&mut self, family: Family, name: &str) {
        self.table(family, name);
        self.message(DELETE_TABLE, 0, family, &text(1, name));
    }

    /// Makes a table, unless there is one.
    pub(super) fn table(&mut self, family: Family, name: &str) {
        self.message(NEW_TABLE, NLM_F_CREATE, family, &text(1, name));
    }

    /// Makes a chain.
    pub(super) fn chain(&mut self, family: Family, table: &str, name: &str) {
        let body = [text(1, table), text(3, name)].concat();
        self.message(NEW_CHAIN, NLM_F_CREATE, family, &body);
    }

    /// Makes a chain that packets come through where the family receives them; of a netdev table
    /// those of this interface.
    pub(super) fn base(&mut self, family: Family, table: &str, name: &str, device: &str) {
        // NF_NETDEV_INGRESS; NF_INET_LOCAL_IN and NF_BR_LOCAL_IN.
        let (hook, device) = match family {
            Family::Netdev => (0_u32, text(3, device)),
            Family::Inet | Family::Bridge => (1, Vec::new()),
        };
        let hook = [number(1, hook), number(2, 0), device].concat();
        let body = [
            text(1, table),
            text(3, name),
            nest(4, &hook),
            text(7, "filter"),
        ]
        .concat();
        self.message(NEW_CHAIN, NLM_F_CREATE, family, &body);
    }

    /// Appends a rule to a chain: what fits all of `matches` has that verdict.
    pub(super) fn rule(
        &mut self,
        family: Family,
        table: &str,
        chain: &str,
        matches: &[Match],
        verdict: Verdict,
    ) {
        let mut expressions: Vec<u8> = matches.iter().flat_map(looks).collect();
        expressions.extend(ends(verdict));
        let body = [text(1, table), text(2, chain), nest(4, &expressions)].concat();
        self.message(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, family, &body);
    }

    /// Sends it, and waits until the kernel took all of it or refused.
    pub(super) fn send(mut self) -> io::Result<()> {
        self.bound(BATCH_END);
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            flags,
            Some(NETFILTER),
        )?;
        // The kernel answers while it takes the message; it is never waited for in earnest.
        let patience = Some(std::time::Duration::from_secs(10));
        set_socket_timeout(&socket, Timeout::Recv, patience)?;
        sendto(
            &socket,
            &self.bytes,
            SendFlags::empty(),
            &SocketAddrNetlink::new(0, 0),
        )?;
        let mut reply = [0; 16 << 10];
        let mut left = self.asked;
        while left > 0 {
            let (length, _) = recv(&socket, &mut reply, RecvFlags::empty())?;
            left = left.saturating_sub(acknowledged(&reply[..length])?);
        }
        Ok(())
    }

    /// `struct nlmsghdr` and `struct nfgenmsg` around a body.
    fn message(&mut self, kind: u16, flags: u16, family: Family, body: &[u8]) {
        self.asked += 1;
        let head = [family.number(), 0, 0, 0];
        let flags = flags | NLM_F_REQUEST | NLM_F_ACK;
        self.append(SUBSYSTEM << 8 | kind, flags, head, body);
    }

    fn bound(&mut self, kind: u16) {
        let [high, low] = SUBSYSTEM.to_be_bytes();
        self.append(kind, NLM_F_REQUEST, [0, 0, high, low], &[]);
    }

    fn append(&mut self, kind: u16, flags: u16, head: [u8; 4], body: &[u8]) {
        self.sequence += 1;
        let length = u32::try_from(20 + body.len()).unwrap_or(u32::MAX);
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(self.sequence.to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend(head);
        self.bytes.extend(body);
    }
}

/// How many messages are acknowledged in this reply; an error of one is the error of all.
fn acknowledged(mut reply: &[u8]) -> io::Result<u32> {
    let mut count = 0;
    while let Some(head) = reply.get(..20) {
        let length = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]);
        let kind = u16::from_ne_bytes([head[4], head[5]]);
        let error = i32::from_ne_bytes([head[16], head[17], head[18], head[19]]);
        if kind == NLMSG_ERROR && error != 0 {
            return Err(Errno::from_raw_os_error(error.saturating_neg()).into());
        }
        count += u32::from(kind == NLMSG_ERROR);
        let length = usize::try_from(length).unwrap_or(usize::MAX).max(20);
        reply = reply.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(count)
}

/// The expressions that break a rule off where a packet doesn't fit. All work in register 1.
fn looks(at: &Match) -> Vec<u8> {
    const EQUAL: u32 = 0;
    const OTHER: u32 = 1;
    // NFT_META_*
    let meta = |key: u32| expression("meta", &[number(1, 1), number(2, key)].concat());
    // Of the network header (1) or the transport header (2).
    let payload = |base: u32, offset: u32, length: u32| {
        let parts = [
            number(1, 1),
            number(2, base),
            number(3, offset),
            number(4, length),
        ];
        expression("payload", &parts.concat())
    };
    let masked = |mask: &[u8]| {
        let length = u32::try_from(mask.len()).unwrap_or_default();
        let parts = [
            number(1, 1),
            number(2, 1),
            number(3, length),
            nest(4, &attribute(1, mask)),
            nest(5, &attribute(1, &vec![0; mask.len()])),
        ];
        expression("bitwise", &parts.concat())
    };
    let compare = |how: u32, value: &[u8]| {
        let value = nest(3, &attribute(1, value));
        expression("cmp", &[number(1, 1), number(2, how), value].concat())
    };
    match at {
        // NFT_FIB_RESULT_ADDRTYPE of NFTA_FIB_F_DADDR; RTN_LOCAL.
        Match::ToThisHost => {
            let fib = expression("fib", &[number(1, 1), number(2, 3), number(3, 2)].concat());
            [fib, compare(EQUAL, &2_u32.to_ne_bytes())].concat()
        }
        Match::To(address) => {
            let address = compare(EQUAL, &address.octets());
            [looks(&Match::Holds(IP)), payload(1, 16, 4), address].concat()
        }
        Match::From(name) => {
            let mut padded = name.as_bytes().to_vec();
            padded.resize(16, 0);
            [meta(6), compare(EQUAL, &padded)].concat()
        }
        // PACKET_HOST
        Match::ToMany => [meta(19), compare(OTHER, &[0])].concat(),
        Match::Protocol(protocol) => [meta(16), compare(EQUAL, &[*protocol])].concat(),
        Match::Port(port) => [payload(2, 2, 2), compare(EQUAL, &port.to_be_bytes())].concat(),
        Match::Kind(kind) => [payload(2, 0, 1), compare(EQUAL, &[*kind])].concat(),
        Match::Acknowledges => [payload(2, 13, 1), masked(&[0x10]), compare(OTHER, &[0])].concat(),
        Match::Holds(kind) => [meta(1), compare(EQUAL, &kind.to_be_bytes())].concat(),
        Match::ToTheLink => [
            payload(1, 24, 2),
            masked(&[0xff, 0xc0]),
            compare(EQUAL, &[0xfe, 0x80]),
        ]
        .concat(),
    }
}

fn ends(verdict: Verdict) -> Vec<u8> {
    let (code, chain) = match verdict {
        Verdict::Drop => (0_i32, Vec::new()),
        Verdict::Accept => (1, Vec::new()),
        Verdict::Jump(chain) => (-3, text(2, chain)),
    };
    let code = attribute(1, &code.to_be_bytes());
    let verdict = nest(2, &[code, chain].concat());
    expression("immediate", &[number(1, 0), nest(2, &verdict)].concat())
}

fn expression(name: &str, attributes: &[u8]) -> Vec<u8> {
    nest(1, &[text(1, name), nest(2, attributes)].concat())
}

/// `struct nlattr` and its value, padded to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::from(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

fn nest(kind: u16, attributes: &[u8]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, attributes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_say_their_own_length() {
        assert_eq!(attribute(1, &[7]), [5, 0, 1, 0, 7, 0, 0, 0]);
        assert_eq!(text(1, "abc"), [8, 0, 1, 0, b'a', b'b', b'c', 0]);
        assert_eq!(
            nest(2, &number(1, 3)),
            [12, 0, 2, 0x80, 8, 0, 1, 0, 0, 0, 0, 3]
        );
    }

    #[test]
    fn one_error_is_the_error_of_all() {
        let reply = |error: i32| {
            let mut bytes = Vec::from(36_u32.to_ne_bytes());
            bytes.extend(NLMSG_ERROR.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(error.to_ne_bytes());
            bytes.resize(36, 0);
            bytes
        };
        let good = [reply(0), reply(0)].concat();
        assert_eq!(acknowledged(&good).expect("two"), 2);
        let bad = [reply(0), reply(-2)].concat();
        let error = acknowledged(&bad).expect_err("one is refused");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}

//! What keeps a guest from its host: all that it sends to an address of the host, IPv4 or IPv6, is
//! dropped at its tap, but for what its owner opened. What the host forwards, to other guests or
//! the world, by routes or by a bridge, is not "to the host" and goes on as before.
//!
//! ```text
//!  tap ─ tc: 169.254.169.254 to its wire ─ netdev: to an address of the host? ─┬─ bridge ─▶ others
//!                                           │      │ fenced                    │   └ to the bridge itself,
//!               that address still? dropped ┘      ▼                           │     to many, or of the link? fenced
//!                                       answers, neighbours, openings?         └─ routed ─▶ others
//!                                          yes: goes on   no: dropped               └ to the host: fenced
//! ```
//!
//! A guest that asks for its metadata while its wire is not up (it runs a moment before it; after a swap of the host's kernel it
//! runs on so) must not have the answer of somebody else: of whatever is the host's own service of that
//! address, with the host's own secrets. It asks again, as TCP does.
//!
//! Whose an address is the kernel decides for each packet (`fib`), so addresses that come and go need
//! nothing of us. Frames to many (broadcast, multicast) are flooded by a bridge to its other ports; only the
//! host's own copy is fenced, where the bridge itself receives. What doesn't begin anything is let
//! through, or the host could not reach its guests: TCP with ACK, answers and errors of ICMP. So is
//! neighbour discovery, as ARP is.
//!
//! Must never: touch a table of anybody else's. Ours are called after the tap, one in each family,
//! and are exchanged in one transaction: there is no moment without them.

use super::nft::{Batch, Family, IP, Match, Verdict};
use super::tap::ADDRESS;
use crate::model::Reach;

const CHAIN: &str = "fenced";
const FAMILIES: [Family; 3] = [Family::Netdev, Family::Inet, Family::Bridge];
const IP6: u16 = 0x86dd;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP6: u8 = 58;
/// Echo reply, unreachable, time exceeded, parameter problem (RFC 792).
const ANSWERS: [u8; 4] = [0, 3, 11, 12];
/// The same and "too big" (RFC 4443); router solicitation, neighbour solicitation and
/// advertisement (RFC 4861).
const ANSWERS_6: [u8; 8] = [1, 2, 3, 4, 129, 133, 135, 136];

fn table(tap: &str) -> String {
    format!("stillpoint-{tap}")
}

/// Fences this tap, with these openings. What fenced it before is exchanged for it.
pub(super) fn put_up(tap: &str, openings: &[Reach]) -> std::io::Result<()> {
    if openings.contains(&Reach::All) {
        return take_down(tap);
    }
    let (mut batch, table) = (Batch::new(), table(tap));
    let mut fenced: Vec<Vec<Match>> = vec![vec![Match::Protocol(TCP), Match::Acknowledges]];
    fenced.extend(ANSWERS.map(|kind| vec![Match::Protocol(ICMP), Match::Kind(kind)]));
    fenced.extend(ANSWERS_6.map(|kind| vec![Match::Protocol(ICMP6), Match::Kind(kind)]));
    fenced.extend(openings.iter().flat_map(opened));
    for family in FAMILIES {
        batch.no_table(family, &table);
        batch.table(family, &table);
        batch.chain(family, &table, CHAIN);
        for matches in &fenced {
            batch.rule(family, &table, CHAIN, matches, Verdict::Accept);
        }
        batch.rule(family, &table, CHAIN, &[], Verdict::Drop);
        batch.base(family, &table, "in", tap);
        if family == Family::Netdev {
            batch.rule(family, &table, "in", &[Match::To(ADDRESS)], Verdict::Drop);
        }
        let from = || Match::From(tap.to_owned());
        let whom = match family {
            Family::Netdev => vec![vec![Match::ToThisHost]],
            Family::Inet => vec![vec![from()]],
            // To the bridge's own MAC is what is to be routed too. An address of the link is a
            // bridge's where the kernel is asked for one of the tap's. ARP is none of these.
            Family::Bridge => vec![
                vec![from(), Match::Holds(IP), Match::ToMany],
                vec![from(), Match::Holds(IP6), Match::ToMany],
                vec![from(), Match::Holds(IP6), Match::ToTheLink],
            ],
        };
        for matches in &whom {
            batch.rule(family, &table, "in", matches, Verdict::Jump(CHAIN));
        }
    }
    batch.send()
}

/// Takes it down; there may be none.
pub(super) fn take_down(tap: &str) -> std::io::Result<()> {
    let mut batch = Batch::new();
    for family in FAMILIES {
        batch.no_table(family, &table(tap));
    }
    batch.send()
}

fn opened(opening: &Reach) -> Vec<Vec<Match>> {
    let port = |protocol, port| vec![Match::Protocol(protocol), Match::Port(port)];
    match *opening {
        Reach::All => Vec::new(),
        Reach::Dhcp => vec![port(UDP, 67), port(UDP, 547)],
        Reach::Dns => vec![port(UDP, 53), port(TCP, 53)],
        Reach::Ping => vec![
            vec![Match::Protocol(ICMP), Match::Kind(8)],
            vec![Match::Protocol(ICMP6), Match::Kind(128)],
        ],
        Reach::Tcp(number) => vec![port(TCP, number)],
        Reach::Udp(number) => vec![port(UDP, number)],
    }
}

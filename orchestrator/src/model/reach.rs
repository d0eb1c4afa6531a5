//! What of its host a guest can reach by its network, beside the metadata service.

use serde::{Deserialize, Serialize};

/// The most of them for a VM.
pub const MAX_REACH: usize = 32;

/// One thing of the host that a guest can reach: `dhcp`, `dns`, `ping`, `tcp/PORT`, `udp/PORT`, or
/// `all`, which is everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Reach {
    /// Everything.
    All,
    /// A server of addresses, for IPv4 and IPv6.
    Dhcp,
    /// A server of names, by UDP and TCP.
    Dns,
    /// That the host answers `ping`.
    Ping,
    /// This port.
    Tcp(u16),
    /// This port.
    Udp(u16),
}

/// What is none of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of dhcp, dns, ping, tcp/PORT, udp/PORT, all, and none")]
pub struct NoReach(String);

impl Reach {
    /// Reads a list as it is typed, such as `dhcp,dns,tcp/8080`; `none` is the empty one.
    ///
    /// # Errors
    /// Names what is none of them.
    pub fn list(text: &str) -> Result<Vec<Self>, NoReach> {
        match text {
            "none" => Ok(Vec::new()),
            text => text.split(',').map(str::parse).collect(),
        }
    }
}

impl std::str::FromStr for Reach {
    type Err = NoReach;

    fn from_str(text: &str) -> Result<Self, NoReach> {
        let none = || NoReach(text.to_owned());
        let port = |number: &str| {
            let number = number.parse::<u16>().ok();
            number.filter(|number| *number > 0).ok_or_else(none)
        };
        match (text, text.split_once('/')) {
            ("all", _) => Ok(Self::All),
            ("dhcp", _) => Ok(Self::Dhcp),
            ("dns", _) => Ok(Self::Dns),
            ("ping", _) => Ok(Self::Ping),
            (_, Some(("tcp", number))) => port(number).map(Self::Tcp),
            (_, Some(("udp", number))) => port(number).map(Self::Udp),
            _ => Err(none()),
        }
    }
}

impl TryFrom<String> for Reach {
    type Error = NoReach;

    fn try_from(text: String) -> Result<Self, NoReach> {
        text.parse()
    }
}

impl From<Reach> for String {
    fn from(reach: Reach) -> Self {
        reach.to_string()
    }
}

impl std::fmt::Display for Reach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.pad("all"),
            Self::Dhcp => f.pad("dhcp"),
            Self::Dns => f.pad("dns"),
            Self::Ping => f.pad("ping"),
            Self::Tcp(port) => write!(f, "tcp/{port}"),
            Self::Udp(port) => write!(f, "udp/{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let text = "all,dhcp,dns,ping,tcp/8080,udp/53";
        let list = Reach::list(text).expect("all of them");
        let written: Vec<_> = list.iter().map(Reach::to_string).collect();
        assert_eq!(written.join(","), text);
        assert_eq!(Reach::list("none"), Ok(Vec::new()));
        for bad in ["", "tcp", "tcp/0", "tcp/65536", "icmp", "dhcp,", "none,dns"] {
            Reach::list(bad).expect_err(bad);
        }
    }
}

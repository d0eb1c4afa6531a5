//! Where a member of etcd is: `etcd://HOST:PORT`, or `etcds://` for one with TLS.

use std::str::FromStr;

/// A member of etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Name or address; an IPv6 address without its brackets.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Whether it speaks TLS.
    pub tls: bool,
}

/// Text that names no member.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no store; write etcd://HOST:PORT, or etcds://HOST:PORT for TLS, further members after \
     commas: etcds://a:2379,b:2379,c:2379"
)]
pub struct NoEndpoint(String);

impl Endpoint {
    /// Reads `etcd://a:2379,b:2379`.
    ///
    /// # Errors
    /// It names no member, or one that can't be.
    pub fn list(text: &str) -> Result<Vec<Self>, NoEndpoint> {
        let wrong = || NoEndpoint(text.to_owned());
        let (scheme, members) = text.split_once("://").ok_or_else(wrong)?;
        let tls = match scheme {
            "etcd" => false,
            "etcds" => true,
            _ => return Err(wrong()),
        };
        let read = |member: &str| {
            let (host, port) = match member.strip_prefix('[') {
                Some(rest) => rest.split_once("]:")?,
                None => member.rsplit_once(':')?,
            };
            let plain = |c: char| c.is_ascii_alphanumeric() || ".-_:".contains(c);
            let good = !host.is_empty() && host.chars().all(plain);
            good.then_some(Self {
                host: host.to_owned(),
                port: port.parse().ok().filter(|&port| port > 0)?,
                tls,
            })
        };
        let members = members.trim_end_matches('/').split(',');
        members
            .map(|member| read(member).ok_or_else(wrong))
            .collect()
    }
}

impl FromStr for Endpoint {
    type Err = NoEndpoint;
    fn from_str(text: &str) -> Result<Self, NoEndpoint> {
        let mut members = Self::list(text)?;
        match (members.pop(), members.is_empty()) {
            (Some(only), true) => Ok(only),
            _ => Err(NoEndpoint(text.to_owned())),
        }
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.tls { "etcds" } else { "etcd" };
        match self.host.contains(':') {
            true => write!(f, "{scheme}://[{}]:{}", self.host, self.port),
            false => write!(f, "{scheme}://{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_read_as_they_are_shown() {
        let three = Endpoint::list("etcds://a:1,10.0.0.2:2379,[::1]:3").expect("three");
        let shown: Vec<String> = three.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            ["etcds://a:1", "etcds://10.0.0.2:2379", "etcds://[::1]:3"]
        );
        for (text, endpoint) in shown.iter().zip(&three) {
            assert_eq!(text.parse().as_ref(), Ok(endpoint));
        }
        for bad in [
            "",
            "etcd://",
            "a:1",
            "http://a:1",
            "etcd://a",
            "etcd://a:0",
            "etcd://a:1,",
            "etcd://a b:1",
        ] {
            let error = Endpoint::list(bad).expect_err(bad).to_string();
            assert!(error.contains("etcd://HOST:PORT"), "{error}");
        }
    }
}

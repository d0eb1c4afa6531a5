//! Addresses of other people's servers: `http://HOST[:PORT][/PATH]`, or `https://` for TLS.

use std::str::FromStr;

/// Where a server is, and below which path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpUrl {
    /// Whether it is spoken to by TLS.
    pub tls: bool,
    /// Name or address; an IPv6 address without its brackets.
    pub host: String,
    /// Port.
    pub port: u16,
    /// The path, without a slash at its end; empty for none.
    pub path: String,
}

/// Text that is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no address of a server; write http://HOST:PORT, or https://HOST:PORT")]
pub struct NoHttpUrl(String);

impl FromStr for HttpUrl {
    type Err = NoHttpUrl;

    fn from_str(text: &str) -> Result<Self, NoHttpUrl> {
        read(text).ok_or_else(|| NoHttpUrl(text.to_owned()))
    }
}

fn read(text: &str) -> Option<HttpUrl> {
    let (scheme, rest) = text.split_once("://")?;
    let (tls, usual) = match scheme {
        "http" => (false, 80),
        "https" => (true, 443),
        _ => return None,
    };
    let (place, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            (
                host,
                port.strip_prefix(':').or(port.is_empty().then_some("")),
            )
        }
        None => match place.split_once(':') {
            Some((host, port)) => (host, Some(port).filter(|port| !port.is_empty())),
            None => (place, Some("")),
        },
    };
    let port = match port? {
        "" => usual,
        port => port.parse().ok().filter(|&port| port > 0)?,
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-_:".contains(c);
    let fits = !host.is_empty()
        && host.chars().all(plain)
        && path.bytes().all(|b| b.is_ascii_graphic())
        && !path.contains(['?', '#']);
    let path = match path.trim_end_matches('/') {
        "" => String::new(),
        path => format!("/{path}"),
    };
    fits.then(|| HttpUrl {
        tls,
        host: host.to_owned(),
        port,
        path,
    })
}

impl HttpUrl {
    /// The place alone, as a header names it.
    pub fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }
}

impl std::fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_servers_are_told_from_others() {
        for (text, said) in [
            ("http://p:9090", "http://p:9090"),
            ("http://p", "http://p:80"),
            ("https://p.example/x/", "https://p.example:443/x"),
            ("https://[::1]:4318", "https://[::1]:4318"),
            ("http://[::1]/a/b", "http://[::1]:80/a/b"),
        ] {
            let url: HttpUrl = text.parse().expect(text);
            assert_eq!(url.to_string(), said);
        }
        for text in [
            "p:9090",
            "ftp://p:9090",
            "http://",
            "http://p:x",
            "http://p:",
            "http://p:0",
            "http://p:70000",
            "http://p/a?b",
            "http://p/a b",
            "http://[::1",
            "http://::1:80",
            "http://[::1]x",
        ] {
            let refused = text.parse::<HttpUrl>().expect_err(text).to_string();
            assert!(refused.contains("http://HOST:PORT"), "{refused}");
        }
    }
}

//! A daemon of another machine: TLS with certificates on both sides, and what to do when it fails.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::auth::ca::config_dir;
use crate::auth::certificate::{certificates, private_key};
use crate::auth::whole;
use crate::model::{Code, Problem};

/// How long the machine has to take a connection, and for the handshake.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(super) struct RemoteArgs {
    /// The daemon of another machine: https://NAME:PORT, by the name in its certificate.
    #[arg(long, global = true, value_name = "URL", env = "STILLPOINT_REMOTE")]
    remote: Option<String>,
    /// This user's certificate for it, as PEM [client.pem in /etc/stillpoint or ~/.config/stillpoint].
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "STILLPOINT_REMOTE_CERT"
    )]
    remote_cert: Option<PathBuf>,
    /// The key of that certificate [client-key.pem there].
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "STILLPOINT_REMOTE_KEY"
    )]
    remote_key: Option<PathBuf>,
    /// The CA that the daemon's certificate must be of [ca.pem there].
    #[arg(long, global = true, value_name = "FILE", env = "STILLPOINT_REMOTE_CA")]
    remote_ca: Option<PathBuf>,
}

/// How to come by another machine's daemon.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    host: String,
    port: u16,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
    certificate: PathBuf,
    ca: PathBuf,
    url: String,
}

fn bad(message: impl Into<String>) -> Problem {
    Problem::new(Code::BadRequest, message)
}

impl RemoteArgs {
    /// The other machine, if one was asked for.
    pub(super) fn remote(&self) -> Result<Option<Remote>, Problem> {
        let Some(url) = &self.remote else {
            return Ok(None);
        };
        let (host, port) = place(url)?;
        let name = ServerName::try_from(host.clone()).map_err(|_| {
            bad(format!(
                "--remote {url}: `{host}` is no name that a certificate can have"
            ))
        })?;
        let dir = config_dir();
        let or =
            |given: &Option<PathBuf>, name: &str| given.clone().unwrap_or_else(|| dir.join(name));
        let certificate = or(&self.remote_cert, "client.pem");
        let key = or(&self.remote_key, "client-key.pem");
        let ca = or(&self.remote_ca, "ca.pem");
        let config = config(&certificate, &key, &ca)?;
        Ok(Some(Remote {
            host,
            port,
            name,
            config: Arc::new(config),
            certificate,
            ca,
            url: url.clone(),
        }))
    }
}

/// `https://NAME:PORT`, or with an address: `https://[::1]:7443`.
fn place(url: &str) -> Result<(String, u16), Problem> {
    let wrong = || {
        bad(format!(
            "--remote {url} is no address of a daemon; write https://NAME:PORT"
        ))
    };
    let rest = url.strip_prefix("https://").ok_or_else(wrong)?;
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
    let port = port.parse().map_err(|_| wrong())?;
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let host = bare.unwrap_or(host);
    match host.is_empty() || host.contains('/') || (bare.is_none() && host.contains(':')) {
        true => Err(wrong()),
        false => Ok((host.to_owned(), port)),
    }
}

fn config(certificate: &Path, key: &Path, ca: &Path) -> Result<ClientConfig, Problem> {
    let missing = |error: &dyn std::fmt::Display, option: &str| {
        bad(format!(
            "{error}. --remote needs a certificate, its key and the daemon's CA; say where they are ({option}), or have \
             them issued: `stillpoint auth client`"
        ))
    };
    let mut roots = RootCertStore::empty();
    for one in certificates(ca).map_err(|e| missing(&e, "--remote-ca"))? {
        let added = roots.add(one);
        added.map_err(|e| bad(format!("the CA {} can't be used: {e}", ca.display())))?;
    }
    let chain = certificates(certificate).map_err(|e| missing(&e, "--remote-cert"))?;
    let secret = private_key(key).map_err(|e| missing(&e, "--remote-key"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let identity = |e: rustls::Error| {
        let (certificate, key) = (certificate.display(), key.display());
        bad(format!(
            "certificate {certificate} and key {key} can't be used together: {e}"
        ))
    };
    ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(identity)?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, secret)
        .map_err(identity)
}

impl Remote {
    /// The machine's name.
    pub(super) fn name(&self) -> &str {
        &self.host
    }

    /// Where it is.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// A connection, after the machine's certificate was found good.
    pub(super) async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, Problem> {
        match tokio::time::timeout(PATIENCE, self.open()).await {
            Ok(opened) => opened,
            Err(_) => Err(self.away(&format!("no connection in {PATIENCE:?}"))),
        }
    }

    async fn open(&self) -> Result<SendRequest<Full<Bytes>>, Problem> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await;
        let stream = stream.map_err(|e| self.away(&e.to_string()))?;
        // Requests are small, and each is waited for; what can't be set costs time only.
        let _ = stream.set_nodelay(true);
        let connector = TlsConnector::from(self.config.clone());
        let stream = connector.connect(self.name.clone(), stream).await;
        let stream = stream.map_err(|e| self.explain(&e))?;
        let made = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = made.map_err(|e| self.explain(&e))?;
        tokio::spawn(connection);
        Ok(sender)
    }

    fn away(&self, why: &str) -> Problem {
        let message = format!(
            "no daemon answers at {} ({why}); is it started with --listen, and does a firewall let this through?",
            self.url
        );
        Problem::new(Code::NoDaemon, message)
    }

    /// What went wrong, from all that an error came of.
    pub(super) fn explain(&self, error: &(dyn std::error::Error + 'static)) -> Problem {
        match tls_error(error) {
            Some(error) => self.explain_tls(error),
            None => self.away(&whole(error)),
        }
    }

    fn explain_tls(&self, error: &rustls::Error) -> Problem {
        let (url, ca, own) = (&self.url, self.ca.display(), self.certificate.display());
        let message = match error {
            rustls::Error::InvalidCertificate(problem) => match problem {
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => format!(
                    "the certificate of the daemon at {url} has expired; renew it there (`stillpoint auth renew`)"
                ),
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    format!(
                        "the certificate of the daemon at {url} is not valid yet: is the clock of one of the two machines wrong?"
                    )
                }
                CertificateError::UnknownIssuer | CertificateError::BadSignature => format!(
                    "the certificate of the daemon at {url} is not of the CA in {ca}: it is another daemon, or --remote-ca \
                     names another CA"
                ),
                CertificateError::NotValidForName
                | CertificateError::NotValidForNameContext { .. } => format!(
                    "the daemon at {url} has a certificate for other names than `{}` ({problem}): call it by one of those, \
                     or have one issued with this name (`stillpoint auth daemon --dns`)",
                    self.host
                ),
                other => format!("the certificate of the daemon at {url} is refused: {other}"),
            },
            rustls::Error::AlertReceived(alert) => match alert {
                AlertDescription::CertificateExpired => format!(
                    "the daemon at {url} refuses the certificate {own}: it has expired; get a new one (`stillpoint auth renew`)"
                ),
                AlertDescription::CertificateRevoked => {
                    format!("the daemon at {url} refuses the certificate {own}: it was revoked")
                }
                AlertDescription::UnknownCA | AlertDescription::DecryptError => format!(
                    "the daemon at {url} refuses the certificate {own}: it is not of the CA that the daemon trusts (--tls-ca)"
                ),
                other => format!("the daemon at {url} refuses the certificate {own}: {other:?}"),
            },
            other => format!("no TLS with {url}: {other}"),
        };
        Problem::new(Code::Forbidden, message)
    }
}

/// The TLS error that an error came of. Errors of I/O hold theirs inside.
fn tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        let inside = error.downcast_ref::<std::io::Error>();
        let inside = inside.and_then(std::io::Error::get_ref);
        if let Some(found) = inside.and_then(|inside| inside.downcast_ref()) {
            return Some(found);
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_daemons_are_told_from_others() {
        let good = |url: &str| place(url).expect(url);
        assert_eq!(good("https://h1.example:7443"), ("h1.example".into(), 7443));
        assert_eq!(good("https://10.0.0.1:7443/"), ("10.0.0.1".into(), 7443));
        assert_eq!(good("https://[::1]:7443"), ("::1".into(), 7443));
        for bad in [
            "http://h1:7443",
            "h1:7443",
            "https://h1",
            "https://:7443",
            "https://::1:7443",
            "https://h1:7443/v1",
            "https://h1:70000",
        ] {
            let problem = place(bad).expect_err(bad);
            assert!(problem.message.contains("https://NAME:PORT"), "{problem}");
        }
    }
}

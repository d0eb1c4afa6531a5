//! Requests to other people's servers, such as a Prometheus, or a collector of traces.
//!
//! HTTP/1.1, and by TLS where the address says `https`. The certificate then has to be of a CA that the machine
//! trusts, and for the name that was called: no other CA is asked for, and none is trusted beside those.

use std::sync::Arc;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper::header::HOST;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::auth::whole;
use crate::model::HttpUrl;

type Sender = SendRequest<Full<Bytes>>;

/// What is asked of a server.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// How.
    pub(crate) method: Method,
    /// What for, below the address's own path.
    pub(crate) path: String,
    /// Of what type the body is, where there is one.
    pub(crate) kind: Option<&'static str>,
    /// The body.
    pub(crate) body: Bytes,
}

/// Asks, by a connection of its own. An answer of more than `largest` bytes is an error, and so is one that breaks off.
pub(crate) async fn ask(
    url: &HttpUrl,
    asked: Asked,
    largest: usize,
) -> Result<(StatusCode, Bytes), String> {
    let mut sender = connect(url).await?;
    let mut request = Request::builder()
        .method(asked.method)
        .uri(format!("{}{}", url.path, asked.path))
        .header(HOST, url.authority());
    if let Some(kind) = asked.kind {
        request = request.header(hyper::header::CONTENT_TYPE, kind);
    }
    let request = request.body(Full::new(asked.body));
    let request = request.map_err(|e| e.to_string())?;
    let response = sender.send_request(request).await.map_err(|e| whole(&e))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), largest).collect().await;
    Ok((status, body.map_err(|e| whole(&*e))?.to_bytes()))
}

async fn connect(url: &HttpUrl) -> Result<Sender, String> {
    let stream = TcpStream::connect((url.host.as_str(), url.port)).await;
    let stream = stream.map_err(|e| e.to_string())?;
    if !url.tls {
        return handshake(stream).await;
    }
    // Read anew: a CA that was added meanwhile counts.
    let config = tokio::task::spawn_blocking(trusting_the_machines_cas).await;
    let config = config.map_err(|e| e.to_string())??;
    let name = ServerName::try_from(url.host.clone());
    let name = name.map_err(|_| format!("no certificate can be for the name `{}`", url.host))?;
    let stream = TlsConnector::from(config).connect(name, stream).await;
    handshake(stream.map_err(|e| format!("no TLS: {e}"))?).await
}

/// TLS that trusts whom the machine trusts: what `SSL_CERT_FILE` or `SSL_CERT_DIR` name, or the distribution's own.
fn trusting_the_machines_cas() -> Result<Arc<ClientConfig>, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // A store of a hundred CAs may hold one that is none; the others count.
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let why = found.errors.first().map(|error| format!(" ({error})"));
        let why = why.unwrap_or_default();
        return Err(format!(
            "this machine trusts no CA{why}; install ca-certificates, or name a file in SSL_CERT_FILE"
        ));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// A connection over this stream; it is served until its sender is dropped.
pub(crate) async fn handshake<S>(stream: S) -> Result<Sender, String>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let made = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (sender, connection) = made.map_err(|e| whole(&e))?;
    tokio::spawn(connection);
    Ok(sender)
}

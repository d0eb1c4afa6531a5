//! Certificates from `stillpoint auth`, daemons that have them, and connections by TLS as a program makes them.
#![allow(dead_code)] // Each test file uses its own part.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use orchestrator::auth::certificate::{Certificate, certificates, private_key};
use serde_json::Value;

use crate::daemon::{Daemon, Said, until};

/// A CA of the command's making.
pub(crate) struct Papers {
    dir: tempfile::TempDir,
}

pub(crate) fn said(output: Output) -> Said {
    let read = |bytes: &[u8]| serde_json::from_slice(bytes).unwrap_or(Value::Null);
    Said {
        ok: output.status.success(),
        out: read(&output.stdout),
        error: read(&output.stderr),
    }
}

impl Papers {
    /// A new CA.
    pub(crate) fn new() -> Self {
        let papers = Self {
            dir: tempfile::tempdir().expect("dir"),
        };
        papers.auth(&["init"]).good();
        papers
    }

    /// A file of it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("ca").join(name)
    }

    /// `stillpoint auth ARGS`.
    pub(crate) fn auth(&self, args: &[&str]) -> Said {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillpoint"));
        command
            .args(["--json", "auth", "--dir"])
            .arg(self.dir.path().join("ca"));
        said(command.args(args).output().expect("stillpoint"))
    }

    /// Issues a client's certificate.
    pub(crate) fn client(&self, name: &str, role: &str) {
        self.auth(&["client", name, "--role", role]).good();
    }

    /// Issues a daemon's certificate for loopback, and starts the daemon with it; where it is.
    pub(crate) fn open_door(&self, daemon: &mut Daemon, name: &str) -> String {
        let names = [
            "daemon",
            name,
            "--address",
            "127.0.0.1",
            "--dns",
            "localhost",
        ];
        self.auth(&names).good();
        self.open_door_with(daemon, name)
    }

    /// Starts a daemon with a certificate that was issued.
    pub(crate) fn open_door_with(&self, daemon: &mut Daemon, name: &str) -> String {
        let file = |name: &str| self.file(name).display().to_string();
        let (cert, key) = (
            file(&format!("issued/{name}.pem")),
            file(&format!("issued/{name}-key.pem")),
        );
        let (ca, revoked) = (file("ca.pem"), file("revoked.pem"));
        daemon.more(&[
            "--listen",
            "127.0.0.1:0",
            "--tls-cert",
            &cert,
            "--tls-key",
            &key,
            "--tls-ca",
            &ca,
            "--tls-revoked",
            &revoked,
        ]);
        daemon.spawn();
        let mut at = String::new();
        until("it serves other machines", || {
            let log = daemon.log();
            let line = log
                .lines()
                .rev()
                .find(|line| line.contains("serves other machines"));
            let found = line.and_then(|line| line.split("at=").nth(1));
            at = found
                .unwrap_or_default()
                .split_whitespace()
                .next()
                .unwrap_or_default()
                .to_owned();
            !at.is_empty()
        });
        format!("https://{at}")
    }

    /// `stillpoint --json --remote URL`, with the certificate of somebody.
    pub(crate) fn stillpoint(&self, url: &str, who: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillpoint"));
        command
            .arg("--json")
            .env("STILLPOINT_REMOTE", url)
            .env(
                "STILLPOINT_REMOTE_CERT",
                self.file(&format!("issued/{who}.pem")),
            )
            .env(
                "STILLPOINT_REMOTE_KEY",
                self.file(&format!("issued/{who}-key.pem")),
            )
            .env("STILLPOINT_REMOTE_CA", self.file("ca.pem"))
            .stdin(Stdio::null());
        command
    }

    /// Runs such a command.
    pub(crate) fn ask(&self, command: &Command, args: &[&str]) -> Said {
        let mut again = Command::new(command.get_program());
        again
            .args(command.get_args())
            .args(args)
            .stdin(Stdio::null());
        for (name, value) in command.get_envs() {
            again.env(name, value.unwrap_or_default());
        }
        said(again.output().expect("stillpoint"))
    }

    /// A connection that stays open.
    pub(crate) fn connect(&self, url: &str, who: &str) -> Line {
        let mut roots = rustls::RootCertStore::empty();
        for one in certificates(&self.file("ca.pem")).expect("a CA") {
            roots.add(one).expect("a root");
        }
        let chain = certificates(&self.file(&format!("issued/{who}.pem"))).expect("a certificate");
        let key = private_key(&self.file(&format!("issued/{who}-key.pem"))).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .expect("an identity");
        let at = url.strip_prefix("https://").expect("https").to_owned();
        let name = at.split(':').next().expect("a name").to_owned();
        let name = rustls::pki_types::ServerName::try_from(name).expect("a name");
        let client = rustls::ClientConnection::new(Arc::new(config), name).expect("TLS");
        let stream = TcpStream::connect(&at).expect("connect");
        Line {
            stream: rustls::StreamOwned::new(client, stream),
            at,
        }
    }
}

/// A connection that stays open.
pub(crate) struct Line {
    stream: rustls::StreamOwned<rustls::ClientConnection, TcpStream>,
    at: String,
}

impl Line {
    /// What is answered to GET.
    pub(crate) fn get(&mut self, path: &str) -> String {
        self.ask(&format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.at))
    }

    /// What is answered to a form.
    pub(crate) fn post(&mut self, path: &str, body: &str, more: &str) -> String {
        let kind = "application/x-www-form-urlencoded";
        self.ask(&format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{more}\r\n{body}",
            self.at,
            body.len()
        ))
    }

    fn ask(&mut self, request: &str) -> String {
        self.stream.write_all(request.as_bytes()).expect("ask");
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let len = self.stream.read(&mut buffer).expect("an answer");
            answer.extend_from_slice(&buffer[..len]);
            let text = String::from_utf8_lossy(&answer);
            let Some((head, body)) = text.split_once("\r\n\r\n") else {
                continue;
            };
            let length = head.to_lowercase();
            let length = length.split("content-length: ").nth(1);
            let length: usize = length
                .and_then(|l| l.lines().next()?.parse().ok())
                .unwrap_or(0);
            if body.len() >= length {
                return text.into_owned();
            }
        }
    }

    /// The serial number of the certificate that the daemon shows.
    pub(crate) fn serial(&mut self) -> String {
        self.get("/v1/whoami");
        let shown = self.stream.conn.peer_certificates().expect("certificates");
        Certificate::of_der(&shown[0])
            .expect("a certificate")
            .serial
    }
}

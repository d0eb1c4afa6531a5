//! The shared store in etcd, by its JSON gateway over HTTP.
//!
//! The gateway is part of every etcd server, and takes the same requests as its gRPC port. So this needs no
//! compiler of protocols, and a daemon is built the same whether it will use etcd or not (RFD 0037).
//!
//! A request that may have been carried out is not sent a second time: whoever asked looks again. What only
//! reads, and what never reached a server, is tried at the next endpoint.

mod connect;
mod endpoint;
mod tls;
mod watch;
mod wire;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use self::connect::Connections;
use self::wire::{Answered, number};
use super::{Become, Change, Committed, Entry, Expect, Guard, Keep, Lease, Snapshot};

pub use endpoint::{Endpoint, NoEndpoint};
pub use tls::TlsError;

/// All our keys begin so, unless another prefix is given.
pub const PREFIX: &str = "/stillpoint/v1/";

/// How to come by an etcd.
#[derive(Clone, Debug)]
pub struct EtcdConfig {
    /// Its members.
    pub endpoints: Vec<Endpoint>,
    /// What our keys begin with; ends in a slash.
    pub prefix: String,
    /// Whose certificates its members must have, as PEM. Needed for `https`.
    pub ca: Option<PathBuf>,
    /// Our own certificate and key, as PEM, where the members ask for one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// A user of etcd's, and the file that holds the password.
    pub user: Option<(String, PathBuf)>,
}

/// Why etcd could not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// Nobody answered.
    #[error(
        "no etcd member answers ({0}); guests run on and no rollout moves until one does. Look at the \
         members and the network between them and this host"
    )]
    Away(String),
    /// A request was sent, and whether it was carried out nobody said.
    #[error("etcd at {endpoint} broke off in the middle of a request: {problem}")]
    BrokeOff {
        /// Who.
        endpoint: String,
        /// How.
        problem: String,
    },
    /// etcd refused.
    #[error("etcd refused: {0}")]
    Refused(String),
    /// An answer that is none of etcd's.
    #[error(
        "the answer of {endpoint} can't be read: {problem}; is it an etcd with its JSON gateway?"
    )]
    Unreadable {
        /// Who.
        endpoint: String,
        /// Why not.
        problem: String,
    },
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The password.
    #[error("cannot read the password of etcd's user from {path}: {source}")]
    Password {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// The store.
#[derive(Clone, Debug)]
pub struct Etcd {
    connections: Arc<Connections>,
    revision: tokio::sync::watch::Sender<u64>,
}

impl Etcd {
    /// Reads certificates and password. Members are asked when there is something to ask: a daemon
    /// starts without them.
    pub fn open(config: EtcdConfig) -> Result<Self, EtcdError> {
        let connections = Arc::new(Connections::new(config)?);
        let revision = tokio::sync::watch::Sender::new(0);
        watch::start(Arc::downgrade(&connections), revision.clone());
        Ok(Self {
            connections,
            revision,
        })
    }

    fn key(&self, key: &str) -> String {
        BASE64.encode(format!("{}{key}", self.connections.prefix()))
    }

    pub(super) async fn list(&self, prefix: &str) -> Result<Snapshot, EtcdError> {
        let whole = format!("{}{prefix}", self.connections.prefix());
        let request = json!({
            "key": BASE64.encode(&whole),
            "range_end": BASE64.encode(wire::after(whole.as_bytes())),
        });
        let answer = self.connections.read("/v3/kv/range", &request).await?;
        let header = &answer.body["header"];
        let kvs = answer.body["kvs"].as_array().map_or(&[][..], Vec::as_slice);
        let entries = kvs.iter().map(|kv| self.entry(kv));
        Ok(Snapshot {
            entries: entries
                .collect::<Option<_>>()
                .ok_or_else(|| answer.unreadable("a record without key or version"))?,
            revision: number(header, "revision").unwrap_or(0),
            origin: format!("etcd/{}", number(header, "cluster_id").unwrap_or(0)),
        })
    }

    fn entry(&self, kv: &Value) -> Option<Entry> {
        let bytes = |field: &str| BASE64.decode(kv[field].as_str().unwrap_or_default()).ok();
        let key = String::from_utf8(bytes("key")?).ok()?;
        Some(Entry {
            key: key.strip_prefix(self.connections.prefix())?.to_owned(),
            value: bytes("value")?,
            version: number(kv, "mod_revision")?,
            created: number(kv, "create_revision")?,
        })
    }

    pub(super) async fn commit(
        &self,
        changes: &[Change],
        guard: Option<&Guard>,
    ) -> Result<Committed, EtcdError> {
        let mut compare: Vec<Value> = Vec::new();
        if let Some(guard) = guard {
            compare.push(self.was_made_at(&guard.key, guard.created));
        }
        for change in changes {
            match change.expect {
                Expect::Anything => {}
                Expect::Absent => compare.push(self.was_made_at(&change.key, 0)),
                Expect::Version(version) => compare.push(json!({
                    "target": "MOD", "result": "EQUAL",
                    "key": self.key(&change.key), "mod_revision": version.to_string(),
                })),
            }
        }
        let success: Vec<Value> = changes.iter().map(|change| self.act(change)).collect();
        let request = json!({ "compare": compare, "success": success });
        let answer = match self.connections.write("/v3/kv/txn", &request).await {
            Err(EtcdError::Refused(why)) if why.contains("lease not found") => {
                return Ok(Committed::Refused);
            }
            answer => answer?,
        };
        if answer.body["succeeded"] != Value::Bool(true) {
            return Ok(Committed::Refused);
        }
        let revision = number(&answer.body["header"], "revision");
        let revision = revision.ok_or_else(|| answer.unreadable("no revision"))?;
        Ok(Committed::Done(revision))
    }

    fn was_made_at(&self, key: &str, revision: u64) -> Value {
        json!({
            "target": "CREATE", "result": "EQUAL",
            "key": self.key(key), "create_revision": revision.to_string(),
        })
    }

    fn act(&self, change: &Change) -> Value {
        let key = self.key(&change.key);
        match &change.to {
            Become::Gone => json!({ "requestDeleteRange": { "key": key } }),
            Become::Value(value, keep) => {
                let lease = match keep {
                    Keep::With(Lease(id)) => *id,
                    Keep::Always | Keep::Retold => 0,
                };
                let (value, lease) = (BASE64.encode(value), lease.to_string());
                json!({ "requestPut": { "key": key, "value": value, "lease": lease } })
            }
        }
    }

    pub(super) async fn lease(&self, lasts: Duration) -> Result<Lease, EtcdError> {
        // Whole seconds, and up: one that is shorter than asked for would end too early.
        let seconds = lasts.as_secs() + u64::from(lasts.subsec_nanos() > 0);
        let request = json!({ "TTL": seconds.max(1).to_string() });
        let answer = self.connections.write("/v3/lease/grant", &request).await?;
        let id = number::<i64>(&answer.body, "ID");
        id.map(Lease)
            .ok_or_else(|| answer.unreadable("a lease without an id"))
    }

    pub(super) async fn keep(&self, lease: Lease) -> Result<bool, EtcdError> {
        let request = json!({ "ID": lease.0.to_string() });
        // Kept twice is kept once, so it may be tried anywhere.
        let answer = self
            .connections
            .read("/v3/lease/keepalive", &request)
            .await?;
        Ok(number::<u64>(&answer.body["result"], "TTL").is_some_and(|left| left > 0))
    }

    pub(super) async fn revoke(&self, lease: Lease) -> Result<(), EtcdError> {
        let request = json!({ "ID": lease.0.to_string() });
        match self.connections.write("/v3/lease/revoke", &request).await {
            // It has ended by itself.
            Err(EtcdError::Refused(why)) if why.contains("lease not found") => Ok(()),
            answer => answer.map(|_: Answered| ()),
        }
    }

    pub(super) fn changes(&self) -> tokio::sync::watch::Receiver<u64> {
        self.revision.subscribe()
    }

    pub(super) fn said(&self) -> String {
        format!("etcd at {}", self.connections.said())
    }
}

//! Hears that something changed. What changed is looked at by whoever hears it.

use std::sync::Weak;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use http_body_util::BodyExt;
use serde_json::json;
use tokio::sync::watch::Sender;

use super::connect::Connections;
use super::{EtcdError, wire};

/// Between two tries to hear anything.
const AGAIN: Duration = Duration::from_millis(500);
/// A stream that says nothing for so long may have been cut without a word, and is opened anew.
const SILENCE: Duration = Duration::from_secs(30);

/// Listens until nobody has the store any more.
pub(super) fn start(connections: Weak<Connections>, revision: Sender<u64>) {
    tokio::spawn(async move {
        while listen(&connections, &revision).await {
            // Whatever happened meanwhile was not heard.
            revision.send_modify(|count| *count += 1);
            tokio::time::sleep(AGAIN).await;
        }
    });
}

/// One stream, to its end; whether another is wanted.
async fn listen(connections: &Weak<Connections>, revision: &Sender<u64>) -> bool {
    let Some(strong) = connections.upgrade() else {
        return false;
    };
    let prefix = strong.prefix().as_bytes();
    let request = json!({ "create_request": {
        "key": BASE64.encode(prefix),
        "range_end": BASE64.encode(wire::after(prefix)),
    }});
    let opened = strong.stream("/v3/watch", &request).await;
    drop(strong);
    let mut body = match opened {
        Ok(body) => body,
        Err(EtcdError::Away(why)) => {
            tracing::debug!("nothing is heard of etcd: {why}");
            return true;
        }
        Err(error) => {
            tracing::warn!("nothing is heard of etcd: {error}");
            return true;
        }
    };
    loop {
        if connections.strong_count() == 0 {
            return false;
        }
        match tokio::time::timeout(SILENCE, body.frame()).await {
            Ok(Some(Ok(_))) => revision.send_modify(|count| *count += 1),
            Ok(Some(Err(_)) | None) | Err(_) => return true,
        }
    }
}

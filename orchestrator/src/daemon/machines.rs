//! The daemon's door for other machines: API and pages, by TLS with certificates on both sides.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, bail};
use tokio::net::TcpListener;

use crate::api::{self, Desk};
use crate::auth::ca::day;
use crate::auth::certificate::Certificate;
use crate::auth::files::{Papers, TlsFiles, is_open_to_others};
use crate::auth::tls::Door;
use crate::execute::unix_ns;
use crate::web::{self, door::Key};

/// A certificate that ends so soon is warned of.
const SOON_S: u64 = 14 * 86_400;

/// Binds it. What can't be used is said before anything else is done.
pub(super) async fn open(at: SocketAddr, files: TlsFiles) -> anyhow::Result<Door> {
    if is_open_to_others(&files.key) {
        let key = files.key.display();
        bail!("others can read the key {key} or change it; close it to them: `chmod 0600 {key}`");
    }
    let own = Certificate::of_file(&files.certificate).context("this daemon's certificate")?;
    let papers = Papers::open(files).context("--listen")?;
    let now = unix_ns() / 1_000_000_000;
    let until = day(own.until_unix_s);
    // Guests come first: a daemon without a good certificate still has its host to look after.
    if now > own.until_unix_s {
        tracing::error!(
            until,
            "this daemon's certificate has expired: no other machine will talk to it; renew it"
        );
    } else if now + SOON_S > own.until_unix_s {
        tracing::warn!(until, "this daemon's certificate expires soon; renew it");
    }
    let listener = TcpListener::bind(at).await;
    let listener = listener
        .with_context(|| format!("cannot listen at {at} for --listen; give another address"))?;
    Ok(Door::open(listener, Arc::new(papers))?)
}

/// Serves, as long as the daemon is there.
pub(super) fn serve(door: Door, desk: Desk) -> anyhow::Result<()> {
    // Of its own: who has a certificate must not learn the key of those who have none.
    let key = Key::new().context("make the key of the pages' forms")?;
    let at = door.at();
    let pages = web::pages(desk.clone(), key);
    let router = api::router_and(desk, pages);
    tracing::info!(%at, "serves other machines, API and pages, by certificate");
    tokio::spawn(async move {
        if let Err(error) = api::serve_machines(door, router).await {
            tracing::warn!("other machines are served no more: {error}");
        }
    });
    Ok(())
}

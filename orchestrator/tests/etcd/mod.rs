//! A real etcd, with nothing of it left behind.
#![allow(dead_code)] // Each test file uses its own part.

#[path = "../skipped/mod.rs"]
mod skipped;

use std::path::{Path, PathBuf};

use stillpoint_images::cache::Cache;
use stillpoint_images::etcd;
use stillpoint_images::packages::Set;

pub(crate) use skipped::skip;

/// The server: what `STILLPOINT_ETCD` names, or the one that `make images` fetched.
pub(crate) fn server() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("STILLPOINT_ETCD") {
        return Some(named.into());
    }
    let cache = Cache::of_this_user().ok()?;
    Some(Set::Etcd.cached(&cache)?.etcd()).filter(|server| server.exists())
}

/// Skips the test, by name, where there is no etcd.
macro_rules! needs_etcd {
    () => {
        match crate::etcd::server() {
            Some(server) => server,
            None => {
                return crate::etcd::skip(
                    "no etcd; `make images` fetches it, or STILLPOINT_ETCD names one",
                );
            }
        }
    };
}
pub(crate) use needs_etcd;

/// Its members, and their data.
pub(crate) struct Cluster {
    inner: etcd::Cluster,
    _dir: tempfile::TempDir,
}

impl Cluster {
    pub(crate) fn start(server: &Path, members: usize) -> Self {
        Self::start_with(server, members, false, &[])
    }

    pub(crate) fn start_with(server: &Path, members: usize, tls: bool, more: &[String]) -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        let inner = etcd::Cluster::start_with(server, dir.path(), members, tls, more);
        Self {
            inner: inner.expect("etcd"),
            _dir: dir,
        }
    }

    pub(crate) fn url(&self) -> String {
        self.inner.url()
    }

    pub(crate) fn kill(&mut self, number: usize) {
        self.inner.kill(number).expect("kill");
    }

    pub(crate) fn restart(&mut self, number: usize) {
        self.inner.spawn(number).expect("spawn");
        self.inner.wait_up(number).expect("it takes connections");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.inner.log();
            let last: Vec<&str> = log.lines().rev().take(20).collect();
            eprintln!("etcd's last lines, latest first:\n{}", last.join("\n"));
        }
    }
}

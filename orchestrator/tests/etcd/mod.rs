//! A real etcd of one member or three, on this machine, with nothing of it left behind.
#![allow(dead_code)] // Each test file uses its own part.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use stillpoint_images::cache::Cache;
use stillpoint_images::packages::Set;

use crate::daemon::until;

/// The server: what `STILLPOINT_ETCD` names, or the one that `make images` fetched.
pub(crate) fn server() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("STILLPOINT_ETCD") {
        return Some(named.into());
    }
    let cache = Cache::of_this_user().ok()?;
    Some(Set::Etcd.cached(&cache)?.etcd()).filter(|server| server.exists())
}

/// Ends the test, by name, where there is no etcd.
macro_rules! needs_etcd {
    () => {
        match crate::etcd::server() {
            Some(server) => server,
            None => {
                eprintln!("SKIPPED: no etcd; `make images` fetches it, or STILLPOINT_ETCD names one");
                return;
            }
        }
    };
}
pub(crate) use needs_etcd;

struct Member {
    name: String,
    client: u16,
    peer: u16,
    child: Option<Child>,
}

/// Its members; ended when it is dropped.
pub(crate) struct Cluster {
    server: PathBuf,
    dir: tempfile::TempDir,
    members: Vec<Member>,
    more: Vec<String>,
    scheme: &'static str,
}

/// A port that was free a moment ago.
fn port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("its address").port()
}

impl Cluster {
    /// Starts one.
    pub(crate) fn start(server: &Path, members: usize) -> Self {
        Self::start_with(server, members, "etcd", &[])
    }

    /// Starts one with further arguments; `etcds` for one whose clients speak TLS.
    pub(crate) fn start_with(
        server: &Path,
        members: usize,
        scheme: &'static str,
        more: &[String],
    ) -> Self {
        let members = (0..members).map(|number| Member {
            name: format!("m{number}"),
            client: port(),
            peer: port(),
            child: None,
        });
        let mut cluster = Self {
            server: server.to_owned(),
            dir: tempfile::tempdir().expect("temp dir"),
            members: members.collect(),
            more: more.to_vec(),
            scheme,
        };
        for number in 0..cluster.members.len() {
            cluster.spawn(number);
        }
        for number in 0..cluster.members.len() {
            cluster.until_up(number);
        }
        cluster
    }

    /// Where daemons find it.
    pub(crate) fn url(&self) -> String {
        let members = self.members.iter();
        let members: Vec<String> = members
            .map(|member| format!("127.0.0.1:{}", member.client))
            .collect();
        format!("{}://{}", self.scheme, members.join(","))
    }

    /// Starts a member, again if it was killed.
    pub(crate) fn spawn(&mut self, number: usize) {
        let peers: Vec<String> = self
            .members
            .iter()
            .map(|member| format!("{}=http://127.0.0.1:{}", member.name, member.peer))
            .collect();
        let log = std::fs::File::options();
        let log = log
            .clone()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .expect("log");
        let protocol = if self.scheme == "etcds" { "https" } else { "http" };
        let member = &mut self.members[number];
        let client = format!("{protocol}://127.0.0.1:{}", member.client);
        let peer = format!("http://127.0.0.1:{}", member.peer);
        let child = Command::new(&self.server)
            .args(["--name", &member.name, "--data-dir"])
            .arg(self.dir.path().join(&member.name))
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &peers.join(",")])
            .args(&self.more)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("etcd");
        member.child = Some(child);
    }

    /// Kills a member, as `kill -9` does.
    pub(crate) fn kill(&mut self, number: usize) {
        let mut child = self.members[number].child.take().expect("it runs");
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    /// Waits until a member takes connections.
    pub(crate) fn until_up(&self, number: usize) {
        let at = ("127.0.0.1", self.members[number].client);
        until("etcd takes connections", || TcpStream::connect(at).is_ok());
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.path().join("log"));
            let log = log.unwrap_or_default();
            let last: Vec<&str> = log.lines().rev().take(20).collect();
            eprintln!("etcd's last lines, latest first:\n{}", last.join("\n"));
        }
        for member in &mut self.members {
            if let Some(mut child) = member.child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

//! An etcd of three members, each in a network namespace of its own, that can be cut off from each other, and whose
//! disks can be slow.

mod disk;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::daemon::until;
pub(crate) use disk::SlowDisk;

const MEMBERS: usize = 3;
/// Their namespaces are named after this process: one at a time.
static ONE: Mutex<()> = Mutex::new(());

struct Member {
    space: String,
    child: Option<Child>,
}

/// Its members, on a bridge of their own.
pub(crate) struct Storm {
    server: PathBuf,
    dir: tempfile::TempDir,
    bridge: String,
    net: String,
    members: Vec<Member>,
    _one: MutexGuard<'static, ()>,
}

fn ip(args: &str) -> bool {
    let done = Command::new("ip")
        .args(args.split(' '))
        .stderr(Stdio::null())
        .status();
    done.is_ok_and(|status| status.success())
}

fn must(args: &str) {
    assert!(ip(args), "ip {args}");
}

impl Storm {
    /// Starts it; `None` where namespaces can't be made.
    pub(crate) fn start(server: &Path) -> Option<Self> {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let id = std::process::id();
        let bridge = format!("sp{id}b");
        if !ip(&format!("link add {bridge} type bridge")) {
            return None;
        }
        let mut storm = Self {
            server: server.to_owned(),
            dir: tempfile::tempdir().expect("dir"),
            bridge: bridge.clone(),
            net: format!("10.213.{}", id % 250 + 1),
            members: Vec::new(),
            _one: one,
        };
        must(&format!("addr add {}.254/24 dev {bridge}", storm.net));
        must(&format!("link set {bridge} up"));
        for number in 0..MEMBERS {
            let space = format!("sp{id}m{number}");
            must(&format!("netns add {space}"));
            storm.members.push(Member {
                space: space.clone(),
                child: None,
            });
            let (outer, inner) = (storm.outer(number), format!("sp{id}i{number}"));
            must(&format!("link add {outer} type veth peer name {inner}"));
            must(&format!("link set {outer} master {bridge} up"));
            must(&format!("link set {inner} netns {space}"));
            must(&format!(
                "-n {space} addr add {}/24 dev {inner}",
                storm.address(number)
            ));
            must(&format!("-n {space} link set {inner} up"));
            must(&format!("-n {space} link set lo up"));
        }
        for number in 0..MEMBERS {
            storm.spawn(number);
        }
        for number in 0..MEMBERS {
            storm.wait_up(number);
        }
        Some(storm)
    }

    fn address(&self, number: usize) -> String {
        format!("{}.{}", self.net, number + 1)
    }

    fn outer(&self, number: usize) -> String {
        format!("sp{}o{number}", std::process::id())
    }

    /// Where daemons find it.
    pub(crate) fn url(&self) -> String {
        let all = (0..MEMBERS).map(|number| format!("{}:2379", self.address(number)));
        format!("etcd://{}", all.collect::<Vec<_>>().join(","))
    }

    pub(crate) fn spawn(&mut self, number: usize) {
        let peers = (0..MEMBERS).map(|peer| format!("m{peer}=http://{}:2380", self.address(peer)));
        let peers: Vec<String> = peers.collect();
        let (client, peer) = (
            format!("http://{}:2379", self.address(number)),
            format!("http://{}:2380", self.address(number)),
        );
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"));
        let log = log.expect("log");
        // `ip netns exec` becomes what it runs.
        let child = Command::new("ip")
            .args(["netns", "exec", &self.members[number].space])
            .arg(&self.server)
            .args(["--name", &format!("m{number}"), "--data-dir"])
            .arg(self.dir.path().join(format!("m{number}")))
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ])
            .args(["--initial-cluster", &peers.join(",")])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn();
        self.members[number].child = Some(child.expect("etcd"));
    }

    pub(crate) fn wait_up(&self, number: usize) {
        let at = format!("{}:2379", self.address(number));
        until("a member takes connections", || {
            TcpStream::connect(&at).is_ok()
        });
    }

    /// As `kill -9` does.
    pub(crate) fn kill(&mut self, number: usize) {
        let mut child = self.members[number]
            .child
            .take()
            .expect("a member that runs");
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    /// Stops a member where it is, or lets it go on: as a disk that hangs does to who waits for it.
    pub(crate) fn stand_still(&self, number: usize, still: bool) {
        use rustix::process::{Pid, Signal, kill_process};
        let child = self.members[number]
            .child
            .as_ref()
            .expect("a member that runs");
        let pid = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .expect("a pid");
        let signal = if still { Signal::STOP } else { Signal::CONT };
        kill_process(pid, signal).expect("a signal");
    }

    /// From now on a member waits so long for its disk whenever it needs it to have written, until what is given back is
    /// dropped; `None` where that can't be done.
    pub(crate) fn slow_disk(&self, number: usize, by: Duration) -> Option<SlowDisk> {
        let child = self.members[number].child.as_ref();
        SlowDisk::of(child.expect("a member that runs").id(), by)
    }

    /// Cuts a member off from its peers, and not from daemons, or joins it again.
    pub(crate) fn part_from_peers(&self, number: usize, parted: bool) {
        let verb = if parted { "add" } else { "del" };
        let space = &self.members[number].space;
        for peer in (0..MEMBERS).filter(|peer| *peer != number) {
            must(&format!(
                "-n {space} route {verb} blackhole {}/32",
                self.address(peer)
            ));
        }
    }

    /// Cuts a member off from everybody, or joins it again.
    pub(crate) fn part_from_all(&self, number: usize, parted: bool) {
        let to = if parted { "down" } else { "up" };
        must(&format!("link set {} {to}", self.outer(number)));
    }

    fn ask(&self, number: usize, path: &str, body: &str) -> Option<serde_json::Value> {
        let at = format!("{}:2379", self.address(number));
        let mut stream = TcpStream::connect(&at).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(3))).ok()?;
        let length = body.len();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.starts_with("HTTP/1.1 200")
            .then(|| serde_json::from_str(body).ok())?
    }

    /// Has all that was before now forgotten; whether that went well.
    pub(crate) fn compact(&self) -> bool {
        let now = self.ask(0, "/v3/kv/range", "{\"key\":\"YQ==\"}");
        let revision =
            now.and_then(|answer| Some(answer["header"]["revision"].as_str()?.to_owned()));
        let Some(revision) = revision else {
            return false;
        };
        let body = format!("{{\"revision\":\"{revision}\",\"physical\":true}}");
        self.ask(0, "/v3/kv/compaction", &body).is_some()
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        for number in 0..self.members.len() {
            if let Some(mut child) = self.members[number].child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
            ip(&format!("link del {}", self.outer(number)));
            ip(&format!("netns del {}", self.members[number].space));
        }
        ip(&format!("link del {}", self.bridge));
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            let last: Vec<&str> = log.lines().rev().take(20).collect();
            eprintln!("etcd's last lines, latest first:\n{}", last.join("\n"));
        }
    }
}

//! An etcd of one member or more on this machine, for tests and demos: loopback ports that were free a
//! moment ago, data below a directory of the caller's.
//!
//! After it is dropped none of its processes is left. It is for trying things out: members speak with each
//! other in the clear, and trust whoever reaches them.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a member has to take connections.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Member {
    name: String,
    client: u16,
    peer: u16,
    child: Option<Child>,
}

/// Its members.
#[derive(Debug)]
pub struct Cluster {
    server: PathBuf,
    dir: PathBuf,
    tls: bool,
    more: Vec<String>,
    members: Vec<Member>,
}

fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

impl Cluster {
    /// Starts one of so many members, and waits until they take connections.
    ///
    /// # Errors
    /// A member does not start.
    pub fn start(server: &Path, dir: &Path, members: usize) -> io::Result<Self> {
        Self::start_with(server, dir, members, false, &[])
    }

    /// The same, with further arguments for each member; with TLS for clients if these set it up.
    ///
    /// # Errors
    /// A member does not start.
    pub fn start_with(
        server: &Path,
        dir: &Path,
        members: usize,
        tls: bool,
        more: &[String],
    ) -> io::Result<Self> {
        let member = |number| {
            Ok(Member {
                name: format!("m{number}"),
                client: free_port()?,
                peer: free_port()?,
                child: None,
            })
        };
        let mut cluster = Self {
            server: server.to_owned(),
            dir: dir.to_owned(),
            tls,
            more: more.to_vec(),
            members: (0..members).map(member).collect::<io::Result<_>>()?,
        };
        for number in 0..members {
            cluster.spawn(number)?;
        }
        for number in 0..members {
            cluster.wait_up(number)?;
        }
        Ok(cluster)
    }

    /// Where daemons find it.
    pub fn url(&self) -> String {
        let members = self.members.iter();
        let members: Vec<String> = members
            .map(|member| format!("127.0.0.1:{}", member.client))
            .collect();
        let scheme = if self.tls { "etcds" } else { "etcd" };
        format!("{scheme}://{}", members.join(","))
    }

    /// What its members logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Starts a member, again if it was killed.
    ///
    /// # Errors
    /// It can't be started.
    pub fn spawn(&mut self, number: usize) -> io::Result<()> {
        let of = |member: &Member| format!("{}=http://127.0.0.1:{}", member.name, member.peer);
        let peers: Vec<String> = self.members.iter().map(of).collect();
        let log = self.dir.join("log");
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(log)?;
        let protocol = if self.tls { "https" } else { "http" };
        let member = &mut self.members[number];
        let client = format!("{protocol}://127.0.0.1:{}", member.client);
        let peer = format!("http://127.0.0.1:{}", member.peer);
        let child = Command::new(&self.server)
            .args(["--name", &member.name, "--data-dir"])
            .arg(self.dir.join(&member.name))
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &peers.join(",")])
            .args(&self.more)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        member.child = Some(child);
        Ok(())
    }

    /// Kills a member, as `kill -9` does.
    ///
    /// # Errors
    /// It can't be killed.
    pub fn kill(&mut self, number: usize) -> io::Result<()> {
        if let Some(mut child) = self.members[number].child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Waits until a member takes connections.
    ///
    /// # Errors
    /// It does not, or has ended.
    pub fn wait_up(&mut self, number: usize) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let member = &mut self.members[number];
        while TcpStream::connect(("127.0.0.1", member.client)).is_err() {
            let ended = member.child.as_mut().map(Child::try_wait).transpose()?;
            if Instant::now() >= deadline || ended.flatten().is_some() {
                let log = self.dir.join("log");
                let message = format!("etcd takes no connections; see {}", log.display());
                return Err(io::Error::other(message));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for number in 0..self.members.len() {
            // One that has ended by itself can't be killed.
            let _ = self.kill(number);
        }
    }
}

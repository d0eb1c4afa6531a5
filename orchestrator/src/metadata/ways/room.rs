//! A network namespace of the daemon's own, and the thread that lives in it. In it are the guests'
//! wires, the address 169.254.169.254 on each, and nothing of the host: a guest that looks around
//! there finds one port.
//!
//! The namespace has no name, so it ends with the daemon and leaves nothing behind.

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::mpsc;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// What is on in the namespace, and what is off: it routes nothing, and answers nothing but ARP and
/// TCP.
const SETTINGS: [(&str, &str); 6] = [
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/all/forwarding", "0"),
    ("ipv4/icmp_echo_ignore_all", "1"),
    ("ipv6/conf/all/disable_ipv6", "1"),
    ("ipv6/conf/default/disable_ipv6", "1"),
];

/// Why something of the host's network could not be set up.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    /// A program did not do as it was told.
    #[error("`{command}` failed: {said}")]
    Command {
        /// What was run.
        command: String,
        /// What it said.
        said: String,
    },
    /// Something of the system failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

impl WireError {
    pub(super) fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// The namespace's thread.
#[derive(Clone, Debug)]
pub(super) struct Room(mpsc::Sender<Job>);

impl Room {
    /// Makes the namespace and starts the thread.
    pub(super) fn open() -> Result<Self, WireError> {
        let name = format!("stillpoint-{}", std::process::id());
        run("ip", &["netns", "add", &name])?;
        let entered = Self::enter(&name);
        // The thread keeps it alive; without a name nobody else finds it.
        run("ip", &["netns", "delete", &name])?;
        entered
    }

    fn enter(name: &str) -> Result<Self, WireError> {
        let file = File::open(format!("/run/netns/{name}"));
        let file = file.map_err(WireError::io("open a network namespace"))?;
        let (jobs, queue) = mpsc::channel::<Job>();
        let (entered, answer) = mpsc::channel();
        let body = move || {
            use std::os::fd::AsFd;
            let network = Some(LinkNameSpaceType::Network);
            let moved = move_into_link_name_space(file.as_fd(), network);
            let failed = moved.is_err();
            // The other side waits for it.
            let _ = entered.send(moved);
            if failed {
                return;
            }
            for (setting, value) in SETTINGS {
                // One that the kernel lacks needs no setting.
                let _ = std::fs::write(format!("/proc/sys/net/{setting}"), value);
            }
            while let Ok(job) = queue.recv() {
                job();
            }
        };
        std::thread::Builder::new()
            .name("metadata".into())
            .spawn(body)
            .map_err(WireError::io("start a thread"))?;
        match answer.recv() {
            Ok(Ok(())) => Ok(Self(jobs)),
            Ok(Err(errno)) => Err(WireError::io("enter a network namespace")(errno.into())),
            Err(_) => Err(WireError::io("enter a network namespace")(
                std::io::ErrorKind::Other.into(),
            )),
        }
    }

    /// Does `job` in the namespace, after all jobs before it.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        // The thread ends only with the daemon.
        let _ = self.0.send(Box::new(job));
    }
}

/// Runs a program where the calling thread is; what it printed.
pub(super) fn run(program: &str, args: &[&str]) -> Result<String, WireError> {
    feed(program, args, "")
}

/// As [`run`], with lines for its standard input.
pub(super) fn feed(program: &str, args: &[&str], input: &str) -> Result<String, WireError> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(WireError::io("start `ip` or `tc` (iproute2)"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // What it does not read it will complain of itself.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output();
    let output = output.map_err(WireError::io("wait for `ip` or `tc`"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(WireError::Command {
        command: format!("{program} {}", args.join(" ")),
        said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

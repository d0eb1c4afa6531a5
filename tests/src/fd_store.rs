//! What systemd does for the daemon's descriptors, where there is no systemd: it takes what it is given
//! (sd_pid_notify_with_fds(3), `FDSTORE=1`), and gives all of it to the next daemon (sd_listen_fds(3)).

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context;
use command_fds::{CommandFdExt, FdMapping};
use stillpoint_control::frame;

/// The first descriptor that a service is given.
const FIRST: i32 = 3;
/// The longest word of a service.
const LONGEST: usize = 4096;

type Held = Arc<Mutex<Vec<(String, OwnedFd)>>>;

/// Holds what daemons gave away.
#[derive(Debug)]
pub struct FdStore {
    path: PathBuf,
    socket: UnixDatagram,
    held: Held,
    listener: Option<JoinHandle<()>>,
}

fn locked(held: &Held) -> MutexGuard<'_, Vec<(String, OwnedFd)>> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FdStore {
    /// Begins with nothing; its socket lies in `dir`.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("notify.sock");
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context(path.display().to_string());
            }
            _ => {}
        }
        let socket = UnixDatagram::bind(&path).with_context(|| path.display().to_string())?;
        let (listens, held) = (socket.try_clone()?, Held::default());
        let to = held.clone();
        let listener = std::thread::spawn(move || {
            let mut buffer = [0; LONGEST];
            while let Ok((len, fds)) = frame::receive(&listens, &mut buffer) {
                heard(&to, &String::from_utf8_lossy(&buffer[..len]), fds);
            }
        });
        Ok(Self {
            path,
            socket,
            held,
            listener: Some(listener),
        })
    }

    /// The names of what it holds.
    pub fn names(&self) -> Vec<String> {
        let held = locked(&self.held);
        held.iter().map(|(name, _)| name.clone()).collect()
    }

    /// What becomes a service that has all of it: its program and arguments are to be added.
    pub fn command(&self) -> anyhow::Result<Command> {
        let held = locked(&self.held);
        let mut command = Command::new("sh");
        // The service has the shell's process id.
        command.args(["-c", "LISTEN_PID=$$ exec \"$@\"", "sh"]);
        let names: Vec<_> = held.iter().map(|(name, _)| name.as_str()).collect();
        command
            .env("NOTIFY_SOCKET", &self.path)
            .env("LISTEN_FDS", held.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"));
        let mappings = held.iter().zip(FIRST..).map(|((_, fd), child_fd)| {
            let parent_fd = fd.try_clone()?;
            Ok(FdMapping {
                parent_fd,
                child_fd,
            })
        });
        command.fd_mappings(mappings.collect::<std::io::Result<_>>()?)?;
        Ok(command)
    }
}

/// One word of a service; what it is not about is none of ours.
fn heard(held: &Held, text: &str, fds: Vec<OwnedFd>) {
    let says = |line: &str| text.lines().any(|said| said == line);
    let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
    let Some(name) = name else {
        return;
    };
    let mut held = locked(held);
    if says("FDSTOREREMOVE=1") {
        held.retain(|(kept, _)| kept != name);
    } else if says("FDSTORE=1") {
        held.extend(fds.into_iter().map(|fd| (name.to_owned(), fd)));
    }
}

impl Drop for FdStore {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_it_was_given_the_next_service_has() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let store = FdStore::open(dir.path())?;
        let (mut read, write) = std::io::pipe()?;
        let null = OwnedFd::from(std::fs::File::open("/dev/null")?);
        heard(&store.held, "FDSTORE=1\nFDNAME=gone", vec![null]);
        heard(&store.held, "FDSTORE=1\nFDNAME=pipe", vec![write.into()]);
        heard(&store.held, "FDSTOREREMOVE=1\nFDNAME=gone", Vec::new());
        heard(&store.held, "READY=1", Vec::new());
        assert_eq!(store.names(), ["pipe"]);
        let script =
            "test $LISTEN_PID = $$ && test $LISTEN_FDS = 1 && printf %s $LISTEN_FDNAMES >&3";
        let status = store.command()?.args(["sh", "-c", script]).status()?;
        assert!(status.success());
        drop(store);
        let mut text = String::new();
        read.read_to_string(&mut text)?;
        assert_eq!(text, "pipe");
        Ok(())
    }
}

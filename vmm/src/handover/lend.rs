//! Files of devices on their way to a successor: named, in packets of at most
//! [`MAX_FDS`](stillpoint_control::frame::MAX_FDS).
//!
//! Most go while the guest runs; what a device opened later follows when it stands still, before
//! its state is sealed. A file lent is a duplicate of one description: file offsets, locks and
//! socket queues are shared, nothing is opened or locked anew.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};

/// What is lent, on the predecessor's side.
#[derive(Debug, Default)]
pub struct Lending {
    lent: BTreeSet<String>,
    waiting: Vec<(String, OwnedFd)>,
}

impl Lending {
    /// Lends a duplicate of `fd` under a name that stands for it for ever; once.
    pub fn offer(&mut self, name: String, fd: impl AsFd) -> std::io::Result<()> {
        if !self.lent.contains(&name) {
            let fd = fd.as_fd().try_clone_to_owned()?;
            self.lent.insert(name.clone());
            self.waiting.push((name, fd));
        }
        Ok(())
    }

    /// How many wait to be sent.
    pub fn count(&self) -> usize {
        self.waiting.len()
    }

    /// What has not been sent yet.
    pub fn take_waiting(&mut self) -> Vec<(String, OwnedFd)> {
        std::mem::take(&mut self.waiting)
    }

    /// As what the other side will have.
    pub fn arrive(self) -> Borrowed {
        Borrowed(self.waiting.into_iter().collect())
    }
}

/// A file that should have come and has not.
#[derive(Debug, thiserror::Error)]
#[error("the file `{0}` did not come with the guest")]
pub struct Missing(pub String);

/// What was lent, on the successor's side. What nobody takes is closed in the end: a connection
/// that the predecessor closed between two packets.
#[derive(Debug, Default)]
pub struct Borrowed(BTreeMap<String, OwnedFd>);

impl Borrowed {
    /// A duplicate of each: the same descriptions.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        let pair = |(name, fd): (&String, &OwnedFd)| Ok((name.clone(), fd.try_clone()?));
        self.0.iter().map(pair).collect::<Result<_, _>>().map(Self)
    }

    /// How many have come and are not taken.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// A packet came.
    pub fn add(&mut self, names: Vec<String>, fds: Vec<OwnedFd>) {
        self.0.extend(names.into_iter().zip(fds));
    }

    /// Takes a file that must be there.
    pub fn take(&mut self, name: &str) -> Result<OwnedFd, Missing> {
        self.0.remove(name).ok_or_else(|| Missing(name.to_owned()))
    }

    /// Takes every file whose name begins with `prefix`; gives what follows it, and the file.
    pub fn take_all(&mut self, prefix: &str) -> Vec<(String, OwnedFd)> {
        let names = self.0.keys().filter(|name| name.starts_with(prefix));
        let names: Vec<String> = names.cloned().collect();
        let taken = names.into_iter().map(|name| {
            let rest = name[prefix.len()..].to_owned();
            self.0.remove(&name).map(|fd| (rest, fd))
        });
        taken.flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> OwnedFd {
        tempfile::tempfile().expect("file").into()
    }

    #[test]
    fn a_name_is_lent_once_and_found_by_prefix() {
        let mut lending = Lending::default();
        lending.offer("vsock/conn1".into(), file()).expect("dup");
        assert_eq!(lending.take_waiting().len(), 1);
        lending.offer("vsock/conn1".into(), file()).expect("dup");
        lending.offer("vsock/conn2".into(), file()).expect("dup");
        lending.offer("disk0/image".into(), file()).expect("dup");
        let mut borrowed = lending.arrive();
        borrowed.take("disk0/image").expect("there");
        borrowed.take("disk0/image").expect_err("taken");
        let rest = borrowed.take_all("vsock/conn");
        assert_eq!(
            rest.len(),
            1,
            "what went with an earlier packet is not here"
        );
        assert_eq!(rest[0].0, "2");
    }
}

//! Who is at the other end of the Unix socket: the kernel says, and takes it from nobody else.
//!
//! root and the daemon's own user are admins. Members of the groups that the daemon was told of operate, or read; a process's
//! groups are those that it has, by the kernel, not those that some list gives its user.
#![allow(unsafe_code)] // Nothing safe asks a socket for the groups of its peer.

use std::os::fd::{AsFd, AsRawFd};

use super::{Caller, Role};

/// The process at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its user.
    pub uid: u32,
    /// Its process.
    pub pid: Option<i32>,
    /// All groups that it is in.
    pub groups: Vec<u32>,
}

/// More groups than any process has (NGROUPS_MAX).
const MOST_GROUPS: usize = 65_536;

/// Asks the kernel.
pub fn of(stream: &tokio::net::UnixStream) -> std::io::Result<Peer> {
    let peer = stream.peer_cred()?;
    let mut groups = supplementary(stream)?;
    groups.push(peer.gid());
    Ok(Peer {
        uid: peer.uid(),
        pid: peer.pid(),
        groups,
    })
}

fn supplementary(stream: &tokio::net::UnixStream) -> std::io::Result<Vec<u32>> {
    let mut groups: Vec<u32> = vec![0; 64];
    loop {
        let mut bytes = libc::socklen_t::try_from(size_of_val(groups.as_slice()))
            .map_err(|_| std::io::ErrorKind::InvalidInput)?;
        // SAFETY: the fd is open for the call, and the kernel writes at most `bytes` bytes of whole group ids into the
        // buffer, which has as many; any bytes are valid `u32`s.
        let result = unsafe {
            libc::getsockopt(
                stream.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let wanted = usize::try_from(bytes).unwrap_or(0) / size_of::<u32>();
        if result == 0 {
            groups.truncate(wanted);
            return Ok(groups);
        }
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE)
            || wanted > MOST_GROUPS
            || wanted <= groups.len()
        {
            return Err(error);
        }
        // It said how many there are.
        groups.resize(wanted, 0);
    }
}

/// Which local users may do what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The group whose members operate.
    pub operate: Option<u32>,
    /// The group whose members read.
    pub read: Option<u32>,
}

impl Rules {
    /// Whether anybody but the daemon's user and root may do anything.
    pub fn lets_others_in(&self) -> bool {
        self.operate.is_some() || self.read.is_some()
    }

    /// Who that is.
    pub fn caller(&self, peer: &Peer, own_uid: u32) -> Caller {
        let is_in = |group: Option<u32>| group.is_some_and(|group| peer.groups.contains(&group));
        let role = match peer.uid {
            0 => Some(Role::Admin),
            uid if uid == own_uid => Some(Role::Admin),
            _ if is_in(self.operate) => Some(Role::Operate),
            _ if is_in(self.read) => Some(Role::Read),
            _ => None,
        };
        let pid = peer
            .pid
            .map_or(String::new(), |pid| format!(", process {pid}"));
        Caller {
            who: format!("uid {}", peer.uid),
            from: format!("this host{pid}"),
            role,
            remedy: format!(
                "uid {own_uid} and root may do all; others may what the groups of `stillpointd --operate-group` and \
                 `--read-group` may, if they are in one"
            ),
            shown: None,
        }
    }
}

/// The group of that name or number. Names are looked up in `/etc/group`, numbers are taken as they are.
pub fn group(text: &str) -> Result<u32, String> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let known = std::fs::read_to_string("/etc/group")
        .map_err(|e| format!("cannot look up the group `{text}` in /etc/group: {e}"))?;
    let number = known.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(text)).then(|| fields.nth(1)?.parse().ok())?
    });
    number.ok_or_else(|| {
        format!(
            "/etc/group has no group `{text}`; make one (`groupadd {text}`), or give its number"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(uid: u32, groups: &[u32]) -> Peer {
        Peer {
            uid,
            pid: Some(1),
            groups: groups.to_vec(),
        }
    }

    #[test]
    fn root_and_the_daemons_user_are_admins_and_groups_give_what_they_give() {
        let rules = Rules {
            operate: Some(50),
            read: Some(60),
        };
        let role = |uid, groups: &[u32]| rules.caller(&peer(uid, groups), 7).role;
        assert_eq!(role(0, &[]), Some(Role::Admin));
        assert_eq!(role(7, &[]), Some(Role::Admin));
        assert_eq!(role(8, &[8, 60, 50]), Some(Role::Operate));
        assert_eq!(role(8, &[8, 60]), Some(Role::Read));
        assert_eq!(role(8, &[8]), None);
        let nobody = Rules::default();
        assert_eq!(nobody.caller(&peer(8, &[0, 50]), 7).role, None);
        assert!(!nobody.lets_others_in());
    }

    #[test]
    fn groups_have_names_and_numbers() {
        assert_eq!(group("root"), Ok(0));
        assert_eq!(group("4711"), Ok(4711));
        let problem = group("no-such-group").expect_err("there is none");
        assert!(problem.contains("groupadd no-such-group"), "{problem}");
    }

    #[tokio::test]
    async fn the_kernel_says_who_we_are() {
        let (ours, _theirs) = tokio::net::UnixStream::pair().expect("a pair");
        let peer = of(&ours).expect("the kernel knows");
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        let own: Vec<u32> = rustix::process::getgroups()
            .expect("groups")
            .iter()
            .map(|group| group.as_raw())
            .collect();
        assert!(
            own.iter().all(|group| peer.groups.contains(group)),
            "{own:?} {peer:?}"
        );
        assert!(peer.groups.contains(&rustix::process::getegid().as_raw()));
    }
}

//! systemd scopes: a guest must outlive the daemon's service, so its processes are moved out of
//! the service's cgroup before they run anything.
//!
//! `stillpoint-vm-NAME.scope` in `stillpoint.slice`, made with `StartTransientUnit`; a successor
//! joins its predecessor's with `AttachProcessesToUnit`. Where systemd doesn't run, or refuses,
//! the process stays where it is: the service's `KillMode=process` keeps it alive there too, and
//! the log says so.

use std::path::Path;
use std::time::Duration;

use zbus::Variant;

use crate::model::VmName;

const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const SERVICE: &str = "org.freedesktop.systemd1";
const OBJECT: &str = "/org/freedesktop/systemd1";
/// The slice of all guests.
const SLICE: &str = "stillpoint.slice";
/// How long systemd may take to move a process.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a process could not be put into its scope.
#[derive(Debug, thiserror::Error)]
pub enum ScopeError {
    /// D-Bus failed, or systemd refused.
    #[error("systemd would not move it: {0}")]
    Bus(#[from] zbus::Error),
    /// It was not done in time.
    #[error("systemd did not move it within {PATIENCE:?}")]
    TooSlow,
}

/// The systemd that can make scopes, if there is one.
#[derive(Clone, Debug)]
pub struct Scopes(Option<zbus::Connection>);

impl Scopes {
    /// None: processes stay where they are.
    pub fn none() -> Self {
        Self(None)
    }

    /// The system's manager for root, the user's own for others, none where there is none.
    pub async fn connect() -> Self {
        let root = rustix::process::geteuid().is_root();
        let here = if root {
            Path::new("/run/systemd/system").is_dir()
        } else {
            std::env::var_os("XDG_RUNTIME_DIR")
                .is_some_and(|dir| Path::new(&dir).join("systemd/private").exists())
        };
        if !here {
            tracing::info!("no systemd here: guests stay in the daemon's cgroup");
            return Self::none();
        }
        let connection = if root {
            zbus::Connection::system().await
        } else {
            zbus::Connection::session().await
        };
        match connection {
            Ok(connection) => Self(Some(connection)),
            Err(error) => {
                tracing::warn!("no D-Bus, guests stay in the daemon's cgroup: {error}");
                Self::none()
            }
        }
    }

    /// Over a connection that is there.
    pub fn over(connection: zbus::Connection) -> Self {
        Self(Some(connection))
    }

    /// Moves `pid` into the scope of `vm`; `successor`: one that is there already. A failure is
    /// logged, and no reason not to run the guest.
    pub async fn enclose(&self, vm: &VmName, pid: u32, successor: bool) {
        let Some(connection) = &self.0 else { return };
        let unit = unit_name(vm);
        if let Err(error) = enclose(connection, &unit, vm, pid, successor).await {
            tracing::warn!(%vm, pid, unit, "stays in the daemon's cgroup: {error}");
        }
    }
}

/// The name of a VM's scope.
pub fn unit_name(vm: &VmName) -> String {
    format!("stillpoint-vm-{vm}.scope")
}

async fn enclose(
    connection: &zbus::Connection,
    unit: &str,
    vm: &VmName,
    pid: u32,
    successor: bool,
) -> Result<(), ScopeError> {
    if successor {
        attach(connection, unit, pid).await?;
    } else if let Err(error) = start(connection, unit, vm, pid).await {
        // A scope of that name may be left of a VM that has just ended.
        attach(connection, unit, pid).await.map_err(|_| error)?;
    }
    // The method returns when the job is queued; the move is over when /proc says so.
    let moved = async {
        while !is_in(unit, pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, moved)
        .await
        .map_err(|_| ScopeError::TooSlow)
}

async fn start(
    connection: &zbus::Connection,
    unit: &str,
    vm: &VmName,
    pid: u32,
) -> Result<(), zbus::Error> {
    let properties = vec![
        (
            "Description",
            Variant::from(format!("Stillpoint guest {vm}")),
        ),
        ("Slice", Variant::from(SLICE)),
        ("PIDs", Variant::from(vec![pid])),
        // Only units with delegation let processes be attached later.
        ("Delegate", Variant::from(true)),
        ("CollectMode", Variant::from("inactive-or-failed")),
    ];
    let auxiliary: Vec<(&str, Vec<(&str, Variant<'_>)>)> = Vec::new();
    let body = (unit, "fail", properties, auxiliary);
    let method = "StartTransientUnit";
    let call = connection.call_method(Some(SERVICE), OBJECT, Some(MANAGER), method, &body);
    call.await.map(drop)
}

async fn attach(connection: &zbus::Connection, unit: &str, pid: u32) -> Result<(), zbus::Error> {
    let body = (unit, "", vec![pid]);
    let method = "AttachProcessesToUnit";
    let call = connection.call_method(Some(SERVICE), OBJECT, Some(MANAGER), method, &body);
    call.await.map(drop)
}

fn is_in(unit: &str, pid: u32) -> bool {
    // A process that is gone is nowhere, and waiting for it is over.
    std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
        .map_or(true, |text| text.lines().any(|line| line.contains(unit)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_stream::StreamExt;

    /// What systemd would be asked.
    struct Asked {
        method: String,
        signature: String,
        body: zbus::Message,
    }

    /// A systemd that notes what it is asked, and agrees.
    async fn systemd(connection: zbus::Connection, count: usize) -> Vec<Asked> {
        let mut stream = zbus::MessageStream::from(&connection);
        let mut asked = Vec::new();
        while asked.len() < count {
            let Some(Ok(message)) = stream.next().await else {
                break;
            };
            let header = message.header();
            connection.reply(&header, &()).await.expect("reply");
            asked.push(Asked {
                method: header.member().map(ToString::to_string).unwrap_or_default(),
                signature: message.body().signature().to_string(),
                body: message.clone(),
            });
        }
        asked
    }

    #[tokio::test]
    async fn a_guest_gets_a_scope_and_its_successor_joins_it() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("pair");
        let guid = zbus::Guid::from_static_str("0123456789abcdef0123456789abcdef");
        let server = zbus::connection::Builder::unix_stream(theirs)
            .server(guid.expect("guid"))
            .p2p()
            .build();
        let client = zbus::connection::Builder::unix_stream(ours).p2p().build();
        let (server, client) = tokio::join!(server, client);
        let systemd = tokio::spawn(systemd(server.expect("server"), 2));
        let vm = VmName::try_from("web-1".to_owned()).expect("name");
        let scopes = Scopes::over(client.expect("client"));
        // A pid that no process has: nothing is waited for once systemd has agreed.
        scopes.enclose(&vm, u32::MAX, false).await;
        scopes.enclose(&vm, u32::MAX, true).await;
        let asked = systemd.await.expect("systemd");
        assert_eq!(asked[0].method, "StartTransientUnit");
        // As org.freedesktop.systemd1(5) has it.
        assert_eq!(asked[0].signature, "(ssa(sv)a(sa(sv)))");
        assert_eq!(asked[1].method, "AttachProcessesToUnit");
        assert_eq!(asked[1].signature, "(ssau)");
        let body = asked[1].body.body();
        let (unit, _, pids): (String, String, Vec<u32>) = body.deserialize().expect("body");
        assert_eq!(
            (unit.as_str(), pids),
            ("stillpoint-vm-web-1.scope", vec![u32::MAX])
        );
    }
}

//! Puts the parts together: directories, lock, store, VMs, API; and ends without any guest
//! noticing.

mod machines;

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, Mode};
use sd_notify::NotifyState;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::broadcast;

use crate::agent::binaries::Binaries;
use crate::agent::carve_out::CarveOut;
use crate::agent::custody::{self, Keeping};
use crate::agent::places::{private_dir, run_dir};
use crate::agent::scope::Scopes;
use crate::agent::trust::Trust;
use crate::agent::{kexec, reaper};
use crate::api::{self, Desk, NewRelease};
use crate::auth::Role;
use crate::auth::files::TlsFiles;
use crate::auth::peer::Rules;
use crate::execute::{self, Host};
use crate::fleet::publish::Publisher;
use crate::fleet::record::Claim;
use crate::fleet::{self, Fleet, Stands, driver};
use crate::metadata::notices::Notices;
use crate::metadata::ways::Ways;
use crate::model::{Event, HostName, Moment, nonce_of};
use crate::orders;
use crate::reconcile;
use crate::store::Store;
use crate::store::shared::etcd::{Etcd, EtcdConfig};
use crate::store::shared::{Shared, Sqlite};
use crate::traces::{self, Collector, Traces};
use crate::web::{self, door};

/// Events kept for a listener that is slow.
const EVENTS: usize = 1024;
/// How long open requests may go on after the daemon was told to end.
const LAST_REQUESTS: Duration = Duration::from_secs(1);
/// How long its fleet has to take note of that.
const LEAVE: Duration = Duration::from_secs(3);

/// Where the daemon keeps things.
#[derive(Clone, Debug)]
pub struct Config {
    /// Sockets and logs.
    pub run_dir: PathBuf,
    /// Store and releases.
    pub state_dir: PathBuf,
    /// The API's socket.
    pub socket: PathBuf,
    /// This host's name in its fleet; what the kernel calls it when absent.
    pub host_name: Option<String>,
    /// Where it stands.
    pub stands: Stands,
    /// The etcd that its fleet shares; this host's own store when absent.
    pub etcd: Option<EtcdConfig>,
    /// Where pages and figures are served by TCP; nowhere when absent.
    pub web: Option<SocketAddr>,
    /// What whoever has the pages' key may do.
    pub web_role: Role,
    /// Where other machines are served, and by which certificates; nowhere when absent.
    pub listen: Option<(SocketAddr, TlsFiles)>,
    /// Which local users may do what.
    pub rules: Rules,
    /// Where commands lie that rollouts may ask as gates.
    pub gate_dir: PathBuf,
    /// Where releases of KVM lie that rollouts may bring.
    pub kvm_dir: PathBuf,
    /// Where kernels lie that rollouts may bring.
    pub boot_dir: PathBuf,
    /// The collector of spans; none when absent.
    pub collector: Option<Collector>,
    /// The host's carve-out, if it has one; without one live update is used, where the kernel has it.
    pub carve_out: Option<PathBuf>,
    /// Keys whose signatures of releases count, as `FILE` or `FILE,until=DATE`.
    pub trust: Vec<String>,
}

/// The run directory when none is given.
pub fn default_run_dir() -> PathBuf {
    let uid = rustix::process::geteuid();
    if uid.is_root() {
        return "/run/stillpoint".into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !dir.is_empty() => Path::new(&dir).join("stillpoint"),
        _ => format!("/tmp/stillpoint-{}", uid.as_raw()).into(),
    }
}

/// The state directory when none is given.
pub fn default_state_dir() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return "/var/lib/stillpoint".into();
    }
    let home = std::env::home_dir().unwrap_or_else(|| "/".into());
    home.join(".local/state/stillpoint")
}

/// The API's socket in a run directory.
pub fn socket_in(run_dir: &Path) -> PathBuf {
    run_dir.join("api.sock")
}

/// Runs until it is told to end. Guests go on.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let began = std::time::Instant::now();
    rustix::process::umask(Mode::from_raw_mode(0o077));
    run_dir(&config.run_dir, config.rules.lets_others_in())?;
    private_dir(&config.state_dir)?;
    private_dir(&config.run_dir.join("vms"))?;
    let _lock = lock(&config.run_dir)?;
    let trust = Trust::load(&config.trust)?;
    let mut received = custody::received();
    let carve_out = open_carve_out(config.carve_out.as_deref(), custody::came(&mut received))?;
    let store = Store::open(&config.state_dir.join("store.sqlite"))?;
    let binaries = Binaries::new(&config.state_dir, trust);
    let verified = execute::Verified::ahead(&binaries, &store);
    let fleet = fleet(&config, &store).await?;
    let known: Vec<_> = store.vms().await?.into_iter().map(|vm| vm.name).collect();
    custody::settle(received, &known);
    for line in store.begin_journal(env!("CARGO_PKG_VERSION")).await? {
        match line.vm {
            Some(vm) => tracing::warn!(%vm, "{}", line.text),
            None => tracing::info!("{}", line.text),
        }
    }
    match store.cut_off_audit().await? {
        0 => {}
        many => tracing::warn!(
            "{many} requests had no answer when the daemon before this one ended; `stillpoint audit ls` names them"
        ),
    }
    let (events, _) = broadcast::channel(EVENTS);
    let traces = tell_spans(&config, &fleet, &store, events.subscribe());
    let notices = Notices::open(&store, events.clone()).await?;
    let host = Host {
        store: store.clone(),
        events,
        ways: Ways::new(notices.clone()),
        notices,
        binaries,
        run_dir: config.run_dir.clone(),
        scopes: Scopes::connect().await,
        holds: execute::Holds::default(),
        lanes: execute::Lanes::of_host(),
        carve_out,
        kvm_dir: config.kvm_dir.clone(),
        boot_dir: config.boot_dir.clone(),
    };
    host.binaries.clear_away();
    add_first_release(&host).await?;
    // Before the next: the pause of guests that are adopted is over then, and their event stays for who has not seen it.
    execute::settle_pauses(&host).await?;
    // Guests first, that stand still since another kernel ran them.
    execute::adopt_all(&host, verified, began.elapsed()).await?;
    // Before anybody can reach us: who is told to end must end in order, and close its store.
    let told_to_end = told_to_end()?;
    let listener = listen(&config.socket, &config.rules)?;
    let door = match &config.listen {
        Some((at, files)) => Some(machines::open(*at, files.clone()).await?),
        None => None,
    };
    let waker = reconcile::start(host.clone()).await?;
    for swap in host.store.host_swaps().await? {
        if !swap.state.is_over() {
            tokio::spawn(execute::host_swap(host.clone(), swap));
        }
    }
    let (publisher, publishing) = Publisher::start(fleet.clone(), host.clone());
    let desk = Desk {
        host,
        waker,
        fleet,
        publisher,
        traces: traces.clone(),
    };
    // An earlier daemon's key lets nobody in.
    let _ = std::fs::remove_file(door::path(&config.run_dir));
    if let Some(at) = config.web {
        serve_web(at, &config, desk.clone()).await?;
    }
    if let Some(door) = door {
        machines::serve(door, desk.clone())?;
    }
    let mut belonging = vec![tokio::spawn(driver::drive(
        desk.fleet.clone(),
        config.gate_dir.clone(),
        traces.clone(),
    ))];
    belonging.extend([publishing, tokio::spawn(orders::obey(desk.clone()))]);
    tokio::spawn(reaper::reap());
    let fleet = desk.fleet.clone();
    let router = api::router(desk);
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let serving = api::serve(listener, router, config.rules.clone(), async move {
        let _ = ended.await;
    });
    let mut serving = tokio::spawn(serving);
    notify(&[NotifyState::Ready]);
    tracing::info!(socket = %config.socket.display(), "ready");
    tokio::select! {
        () = told_to_end => {}
        served = &mut serving => served.context("serve the API")?.context("serve the API")?,
    }
    notify(&[NotifyState::Stopping]);
    tracing::info!("ending; guests go on");
    let _ = end.send(());
    // Listeners of events never hang up by themselves.
    let _ = tokio::time::timeout(LAST_REQUESTS, serving).await;
    let _ = std::fs::remove_file(&config.socket);
    leave(&fleet, &belonging).await;
    traces.flush(LAST_REQUESTS).await;
    // One that can't be written makes the next daemon say that this one was cut off: no harm.
    let _ = store.end_journal().await;
    store.close().await;
    Ok(())
}

/// Spans of swaps go to the collector from now on, if there is one.
fn tell_spans(
    config: &Config,
    fleet: &Fleet,
    store: &Store,
    events: broadcast::Receiver<Event>,
) -> Traces {
    let Some(collector) = config.collector.clone() else {
        return Traces::default();
    };
    tracing::info!(%collector, "tells spans of swaps and rollouts");
    let traces = Traces::to(collector, fleet.me.as_str());
    tokio::spawn(traces::hear(store.clone(), events, traces.clone()));
    traces
}

/// Leaves the fleet in order. Where that can't be, leases end by themselves.
async fn leave(fleet: &Fleet, belonging: &[tokio::task::JoinHandle<()>]) {
    for task in belonging {
        task.abort();
    }
    let _ = tokio::time::timeout(LEAVE, fleet.leave()).await;
}

/// Pages, to those who know the key, and figures.
async fn serve_web(at: SocketAddr, config: &Config, desk: Desk) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(at).await;
    let listener = listener
        .with_context(|| format!("cannot listen at {at} for --web; give another address"))?;
    let at = listener.local_addr()?;
    let key = door::Key::new().context("make the key of the pages")?;
    key.write(&config.run_dir, at)
        .context("write the address of the pages")?;
    tracing::info!(%at, "serves pages, to who has the address that `stillpoint page` prints, and figures at /metrics");
    let role = config.web_role;
    tokio::spawn(async move {
        if let Err(error) = web::serve(listener, desk, key, role, std::future::pending()).await {
            tracing::warn!("pages are served no more: {error}");
        }
    });
    Ok(())
}

/// This host's place in its fleet. A fleet that is away keeps no host from starting.
async fn fleet(config: &Config, store: &Store) -> anyhow::Result<Fleet> {
    let name = match &config.host_name {
        Some(name) => name.clone(),
        None => own_name(),
    };
    let me = HostName::try_from(name)
        .context("this host's name can't be one in a fleet; give another with --host-name")?;
    let shared = match &config.etcd {
        Some(etcd) => Shared::Etcd(Etcd::open(etcd.clone()).context("the shared store")?),
        None => Shared::Sqlite(Sqlite::open(store).await?),
    };
    tracing::info!(host = %me, shared = shared.said(), "belongs to a fleet");
    Ok(Fleet {
        shared,
        me,
        stands: config.stands.clone(),
        claim: claim(config, store).await?,
        named: fleet::name::Named::default(),
        clocks: fleet::clocks::Clocks::default(),
    })
}

/// Which daemon this is. Copies of a disk have one store's identity; no two machines have one boot's.
async fn claim(config: &Config, store: &Store) -> anyhow::Result<Claim> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let boot = boot.context("read which start of the kernel this is")?;
    let state_dir = config.state_dir.display().to_string();
    Ok(Claim {
        daemon: format!("{} {} {state_dir}", store.identity().await?, boot.trim()),
        machine: rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
        state_dir,
        since: Moment(0),
    })
}

/// What the kernel calls this host, made to fit: up to its first dot, and no longer than names are.
fn own_name() -> String {
    let uname = rustix::system::uname();
    let name = uname.nodename().to_string_lossy();
    let first = name.split('.').next().unwrap_or_default();
    let plain = |c: &char| c.is_ascii_alphanumeric() || "_-".contains(*c);
    let name: String = first.chars().filter(plain).take(48).collect();
    let name = name.trim_start_matches(['-', '_']);
    match name {
        "" => "host".into(),
        name => name.into(),
    }
}

/// What outlives the kernel here: the carve-out that the daemon was told of, or else what live update keeps, where the
/// kernel has that. A kernel without either keeps no guest from starting.
fn open_carve_out(path: Option<&Path>, came: Vec<(Keeping, OwnedFd)>) -> anyhow::Result<CarveOut> {
    if let Some(path) = path {
        let came_by_jump = nonce_of(&kexec::command_line()).is_some();
        return Ok(CarveOut::open(path, came_by_jump)?);
    }
    Ok(CarveOut::by_live_update(came).unwrap_or_else(|why| {
        let why = why.to_string();
        tracing::info!("no guest of this host can outlive its kernel: {why}");
        CarveOut::none(&why)
    }))
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("systemd could not be told: {error}");
    }
}

/// Listens for the signals that end the daemon, from now on; the future ends with the first.
fn told_to_end() -> anyhow::Result<impl Future<Output = ()>> {
    let mut term = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}

/// One daemon per run directory. The lock ends with the process, however it ends.
fn lock(run_dir: &Path) -> anyhow::Result<File> {
    let path = run_dir.join("lock");
    let file = File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => bail!(
            "another stillpointd serves {}; stop it, or give this one its own --run-dir and \
             --state-dir",
            run_dir.display()
        ),
        Err(errno) => Err(errno).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// Binds the API's socket. A file that is there is of a daemon that is gone: we hold the lock.
fn listen(path: &Path, rules: &Rules) -> anyhow::Result<UnixListener> {
    use std::os::unix::fs::FileTypeExt;
    if let Ok(found) = std::fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            bail!(
                "{} is there and is not a socket; move it away",
                path.display()
            );
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            bail!(
                "another process answers at {}; give another --socket",
                path.display()
            );
        }
        std::fs::remove_file(path)
            .with_context(|| format!("cannot remove the stale socket {}", path.display()))?;
        tracing::info!(path = %path.display(), "removed a stale socket");
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
    // Where others may have a role each caller is asked for theirs, and told what is missing.
    let mode = if rules.lets_others_in() { 0o666 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot set who may use {}", path.display()))?;
    Ok(listener)
}

/// A daemon without any release adds the VMM that was installed beside it. One that trusts keys adds
/// it by its papers only; to one that trusts none, it is as good as the daemon's own binary.
async fn add_first_release(host: &Host) -> anyhow::Result<()> {
    if !host.store.releases().await?.is_empty() {
        return Ok(());
    }
    let own = std::env::current_exe().context("find the daemon's own executable")?;
    let path = own.with_file_name("stillpoint-vmm");
    if !path.exists() {
        tracing::warn!(
            "no release in the store and no stillpoint-vmm beside the daemon; add one with \
             `stillpoint release add PATH`"
        );
        return Ok(());
    }
    let new = NewRelease {
        path: path.clone(),
        unsigned: !host.binaries.trusts_somebody(),
        ..NewRelease::default()
    };
    match api::add_release(host, new).await {
        Ok(release) => {
            let version = release.manifest.version;
            let signed_by = release
                .signed_by
                .map_or("nobody".into(), |signer| signer.key_id);
            tracing::info!(version, signed_by, path = %path.display(), "no release was in the store: added the one beside the daemon");
        }
        Err(problem) => tracing::warn!("the VMM beside the daemon was not added: {problem}"),
    }
    Ok(())
}

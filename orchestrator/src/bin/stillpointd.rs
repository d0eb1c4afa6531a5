//! The daemon, one per host.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use orchestrator::agent::launch::launch;
use orchestrator::auth::Role;
use orchestrator::auth::ca::config_dir;
use orchestrator::auth::files::TlsFiles;
use orchestrator::auth::peer;
use orchestrator::daemon::{self, Config};
use orchestrator::fleet::Stands;
use orchestrator::logs;
use orchestrator::model::{Label, labels};
use orchestrator::store::shared::etcd::{Endpoint, EtcdConfig, PREFIX};
use orchestrator::traces::Collector;

/// Starts guests on this host, watches them, and swaps what runs them. Ending it harms no guest.
#[derive(Debug, Parser)]
#[command(name = "stillpointd", version, args_conflicts_with_subcommands = true)]
struct Args {
    /// Sockets and logs [root: /run/stillpoint; others: $XDG_RUNTIME_DIR/stillpoint].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Store and releases [root: /var/lib/stillpoint; others: ~/.local/state/stillpoint].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// The API's socket [api.sock in the run directory].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The host's carve-out, memory that outlives its kernel, such as /dev/dax0.0. Without one guests that are to
    /// outlive it have memfds that live update keeps, on a kernel that has /dev/liveupdate.
    #[arg(long, value_name = "PATH", env = "STILLPOINT_CARVE_OUT")]
    carve_out: Option<PathBuf>,
    /// A public key of minisign's whose signatures of releases count, to a date if there is one; may
    /// be given again.
    #[arg(long, value_name = "FILE[,until=DATE]")]
    trust: Vec<String>,
    /// This host's name in its fleet [what the kernel calls it].
    #[arg(long, value_name = "NAME")]
    host_name: Option<String>,
    /// The zone it stands in.
    #[arg(long, value_name = "NAME", default_value = "zone-0")]
    zone: String,
    /// The fault domain it stands in: a rack, or whatever fails together.
    #[arg(long, value_name = "NAME", default_value = "rack-0")]
    fault_domain: String,
    /// What else the host is called by, for rollouts over some hosts (`rollout start --label`); may be given again.
    #[arg(long = "label", value_name = "NAME=VALUE")]
    labels: Vec<Label>,
    #[command(flatten)]
    shared: SharedArgs,
    /// Where pages are served, such as 127.0.0.1:8080, and figures for Prometheus beside them (/metrics).
    /// `stillpoint page` prints the address that lets in; figures are told to whoever can connect [served nowhere].
    #[arg(long, value_name = "ADDRESS:PORT")]
    web: Option<std::net::SocketAddr>,
    /// Commands that rollouts may ask as gates [/etc/stillpoint/gates; others: ~/.config/stillpoint/gates].
    #[arg(long, value_name = "DIR")]
    gate_dir: Option<PathBuf>,
    /// Releases of KVM that rollouts may bring, each in a folder called by its version: its modules, kvm.ko and the
    /// vendor's, with a file `parameters` if some are to be other than they are; or programs `exchange` and `undo`
    /// [/etc/stillpoint/kvm; others: ~/.config/stillpoint/kvm].
    #[arg(long, value_name = "DIR")]
    kvm_dir: Option<PathBuf>,
    /// Kernels that rollouts may bring, as packages lay them out: vmlinuz-VERSION, with initrd.img-VERSION or
    /// initramfs-VERSION.img beside it.
    #[arg(long, value_name = "DIR", default_value = "/boot")]
    boot_dir: PathBuf,
    /// What whoever has the address of the pages may do: read, or operate, which is to approve and cancel
    /// pauses, and to pause and resume rollouts.
    #[arg(long, value_name = "ROLE", value_parser = web_role, default_value = "operate", requires = "web")]
    web_role: Role,
    /// The group whose members may operate by the API's socket, by name or number. Without either group only the
    /// daemon's own user and root may use it.
    #[arg(long, value_name = "GROUP", value_parser = peer::group)]
    operate_group: Option<u32>,
    /// The group whose members may look by it.
    #[arg(long, value_name = "GROUP", value_parser = peer::group)]
    read_group: Option<u32>,
    #[command(flatten)]
    listen: ListenArgs,
    /// The collector of OpenTelemetry that is told spans of swaps and rollouts, by HTTP, such as http://127.0.0.1:4318;
    /// /v1/traces comes after it [told nowhere].
    #[arg(long, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otlp_endpoint: Option<String>,
    /// Logs to standard error as JSON, one object a line, also where systemd connects that to journald.
    #[arg(long)]
    json_logs: bool,
    /// Prints the API's OpenAPI document and exits.
    #[arg(long)]
    print_openapi: bool,
    /// Puts the store on a disk that forgets what was not synced, and cuts its power: sync=N, torn=N,
    /// synced=N, or never.
    #[cfg(feature = "fault-injection")]
    #[arg(long, value_name = "CUT", value_parser = orchestrator::store::disk::arm)]
    disk: Option<()>,
    /// Print the OpenAPI document of what guests find, and end.
    #[arg(long)]
    print_guest_openapi: bool,
    #[command(subcommand)]
    command: Option<Internal>,
}

/// The store that a fleet shares.
#[derive(Debug, clap::Args)]
struct SharedArgs {
    /// The etcd that the fleet shares: etcd://HOST:PORT,..., or etcds:// for TLS [this host's own store: a
    /// fleet of one].
    #[arg(long, value_name = "URL", env = "STILLPOINT_STORE")]
    store: Option<String>,
    /// Whose certificates etcd's members must have, as PEM.
    #[arg(long, value_name = "FILE", requires = "store")]
    store_ca: Option<PathBuf>,
    /// This daemon's certificate for etcd, as PEM.
    #[arg(long, value_name = "FILE", requires_all = ["store", "store_key"])]
    store_cert: Option<PathBuf>,
    /// The key of that certificate, as PEM.
    #[arg(long, value_name = "FILE", requires = "store_cert")]
    store_key: Option<PathBuf>,
    /// A user of etcd's.
    #[arg(long, value_name = "NAME", requires_all = ["store", "store_password_file"])]
    store_user: Option<String>,
    /// The file that holds that user's password.
    #[arg(long, value_name = "FILE", requires = "store_user")]
    store_password_file: Option<PathBuf>,
    /// What the fleet's keys in etcd begin with: fleets that share an etcd have one each.
    #[arg(long, value_name = "PREFIX", default_value = PREFIX)]
    store_prefix: String,
}

/// The door for other machines.
#[derive(Debug, clap::Args)]
struct ListenArgs {
    /// Where other machines are served, API and pages, by TLS with certificates on both sides, such as 10.0.0.1:7443
    /// [served nowhere].
    #[arg(long, value_name = "ADDRESS:PORT", requires_all = ["tls_cert", "tls_key", "tls_ca"])]
    listen: Option<std::net::SocketAddr>,
    /// This daemon's certificate for that, as PEM.
    #[arg(long, value_name = "FILE", requires = "listen")]
    tls_cert: Option<PathBuf>,
    /// Its key, as PEM.
    #[arg(long, value_name = "FILE", requires = "listen")]
    tls_key: Option<PathBuf>,
    /// The CA whose clients are let in, each with the role that its certificate says, as PEM.
    #[arg(long, value_name = "FILE", requires = "listen")]
    tls_ca: Option<PathBuf>,
    /// Certificates of that CA that were revoked, as PEM. All four files are read anew when they change.
    #[arg(long, value_name = "FILE", requires = "listen")]
    tls_revoked: Option<PathBuf>,
}

impl ListenArgs {
    fn files(self) -> Option<(std::net::SocketAddr, TlsFiles)> {
        let files = TlsFiles {
            certificate: self.tls_cert?,
            key: self.tls_key?,
            ca: self.tls_ca?,
            revoked: self.tls_revoked,
        };
        Some((self.listen?, files))
    }
}

/// Pages have nothing for admins to do.
fn web_role(text: &str) -> Result<Role, String> {
    match Role::of_word(text) {
        Some(role @ (Role::Read | Role::Operate)) => Ok(role),
        _ => Err("write read or operate".into()),
    }
}

impl SharedArgs {
    fn etcd(self) -> anyhow::Result<Option<EtcdConfig>> {
        let Some(store) = self.store else {
            return Ok(None);
        };
        let prefix = self.store_prefix;
        if !prefix.ends_with('/') {
            anyhow::bail!("--store-prefix {prefix:?} does not end in a slash: {prefix}/ is meant?");
        }
        Ok(Some(EtcdConfig {
            endpoints: Endpoint::list(&store)?,
            prefix,
            ca: self.store_ca,
            identity: self.store_cert.zip(self.store_key),
            user: self.store_user.zip(self.store_password_file),
        }))
    }
}

#[derive(Debug, Subcommand)]
enum Internal {
    /// What runs between fork and the VMM; the daemon's own use only.
    #[command(hide = true)]
    Launch {
        /// Arguments of the VMM.
        #[arg(last = true)]
        args: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stillpointd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    if let Some(Internal::Launch { args }) = args.command {
        return launch(&args);
    }
    if args.print_guest_openapi {
        print!("{}", orchestrator::metadata::described::openapi_json()?);
        return Ok(());
    }
    if args.print_openapi {
        print!("{}", orchestrator::api::openapi_json()?);
        return Ok(());
    }
    logs::begin(args.json_logs);
    let run_dir = args.run_dir.unwrap_or_else(daemon::default_run_dir);
    let config = Config {
        socket: args.socket.unwrap_or_else(|| daemon::socket_in(&run_dir)),
        run_dir: std::path::absolute(run_dir)?,
        // A variable that is empty is as one that isn't there, as OpenTelemetry has it.
        collector: args
            .otlp_endpoint
            .filter(|url| !url.is_empty())
            .map(|url| url.parse::<Collector>().context("--otlp-endpoint"))
            .transpose()?,
        carve_out: args.carve_out,
        trust: args.trust,
        host_name: args.host_name,
        stands: Stands {
            zone: args.zone,
            fault_domain: args.fault_domain,
            labels: labels(args.labels).context("--label")?,
        },
        etcd: args.shared.etcd()?,
        gate_dir: args.gate_dir.unwrap_or_else(|| config_dir().join("gates")),
        kvm_dir: args.kvm_dir.unwrap_or_else(|| config_dir().join("kvm")),
        boot_dir: args.boot_dir,
        web: args.web,
        web_role: args.web_role,
        listen: args.listen.files(),
        rules: peer::Rules {
            operate: args.operate_group,
            read: args.read_group,
        },
        state_dir: std::path::absolute(args.state_dir.unwrap_or_else(daemon::default_state_dir))?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(daemon::run(config));
    // A blocking exchange with a VMM may still wait for its answer; the guest needs neither.
    runtime.shutdown_background();
    result
}

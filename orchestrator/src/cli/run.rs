//! `stillpoint run`

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use hyper::Method;
use stillpoint_control::clock::{ClockSpec, Correction, Policy};
use stillpoint_control::spec::{
    DEFAULT_BUDGET, DiskSpec, KernelSpec, MachineSpec, MemorySpec, NetSpec, Pages, Survive,
    VsockSpec, parse_size,
};

use super::{Desk, format, io_problem, progress, safeguards, say, say_json};
use crate::api::{NewVm, VmView};
use crate::model::{Code, Problem, Profile, Reach};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the guest.
    #[arg(required_unless_present = "spec", conflicts_with = "spec")]
    name: Option<String>,
    /// A machine spec as JSON; `-` for stdin. Fields: name, cpus, memory.{size,pages,survive,lock,nodes},
    /// kernel.{path,initrd,cmdline}, disks[].{path,read_only}, nets[].{tap,mac,queue_pairs},
    /// vsock.cid, rng, clock.{policy,correction,steal,vmclock}, blackout_budget_ns.
    #[arg(long, value_name = "FILE")]
    spec: Option<PathBuf>,
    /// An ELF (PVH note, or 64-bit entry) or a bzImage.
    #[arg(long, required_unless_present = "spec", conflicts_with = "spec")]
    kernel: Option<PathBuf>,
    /// An initial RAM disk.
    #[arg(long, conflicts_with = "spec")]
    initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, conflicts_with = "spec")]
    cmdline: Option<String>,
    /// A disk: a raw image or a block device, with `,ro` if the guest can't write to it. May be
    /// given several times; the guest finds them in this order.
    #[arg(long = "disk", value_name = "PATH[,ro]", conflicts_with = "spec", value_parser = parse_disk)]
    disks: Vec<DiskSpec>,
    /// vCPUs [1].
    #[arg(long, value_name = "N", conflicts_with = "spec")]
    cpus: Option<u8>,
    /// RAM, such as 256M or 8G [256M].
    #[arg(long, value_name = "SIZE", conflicts_with = "spec", value_parser = parse_size)]
    memory: Option<u64>,
    /// Pages behind RAM [base].
    #[arg(long, conflicts_with = "spec", value_enum)]
    pages: Option<PagesArg>,
    /// What guest RAM outlives, and so what can be swapped under the guest: vmm (its process), or kernel
    /// (the host's too: RAM in the carve-out that the daemon was told of, or else a memfd that live update
    /// keeps, where the kernel has that) [vmm].
    #[arg(long, conflicts_with = "spec", value_enum)]
    survive: Option<SurviveArg>,
    /// Never let the host swap the guest's RAM out.
    #[arg(long, conflicts_with = "spec")]
    lock_memory: bool,
    /// The host's memory nodes (NUMA) that RAM comes from, and from no others, such as 0 or 0,1.
    #[arg(
        long,
        value_name = "NODE",
        conflicts_with = "spec",
        value_delimiter = ','
    )]
    memory_nodes: Vec<u16>,
    /// A network interface over a tap that exists on this host, such as tap=tap0 or
    /// tap=tap0,mac=52:54:00:12:34:56,queues=4; several are allowed.
    #[arg(long = "net", value_name = "tap=NAME[,mac=MAC][,queues=N]", conflicts_with = "spec", value_parser = parse_net)]
    nets: Vec<NetSpec>,
    /// Sockets between guest and host: host programs connect to `vsock.sock` in the guest's
    /// directory. CID is the guest's context id [made of its name].
    #[arg(long, value_name = "CID", conflicts_with = "spec", num_args = 0..=1, require_equals = true)]
    vsock: Option<Option<u32>>,
    /// A source of entropy.
    #[arg(long, conflicts_with = "spec")]
    rng: bool,
    /// The longest blackout a swap may take, such as 500ms [1s].
    #[arg(long, value_name = "TIME", conflicts_with = "spec", value_parser = format::parse_time)]
    budget: Option<Duration>,
    /// What the guest's clocks make of a pause: advance (they include it) or hold (they leave it
    /// out, and its wall clock is corrected afterwards) [advance].
    #[arg(long, value_name = "POLICY", conflicts_with = "spec")]
    clock: Option<Policy>,
    /// Who corrects the wall clock after hold: step or slew (the guest's agent, by vsock), or ptp
    /// (the guest itself) [step, where there is a vsock].
    #[arg(long, value_name = "HOW", conflicts_with = "spec", value_enum)]
    correction: Option<CorrectionArg>,
    /// Count a pause as time stolen from the guest's vCPUs.
    #[arg(long, conflicts_with = "spec")]
    steal: bool,
    /// Give the guest a vmclock device, which tells it of every swap.
    #[arg(long, conflicts_with = "spec")]
    vmclock: bool,
    /// The availability set it belongs to: its members see and approve each other's events.
    #[arg(long = "set", value_name = "NAME")]
    availability_set: Option<String>,
    /// Its update domain in the set, 0 to 19 [the one whose turn it is].
    #[arg(long, value_name = "N", requires = "availability_set")]
    update_domain: Option<u16>,
    /// How many update domains the set has, 1 to 20, where this is its first guest [5].
    #[arg(long, value_name = "N", requires = "availability_set")]
    update_domains: Option<u8>,
    /// Its fault domain in the set [0].
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    fault_domain: u16,
    /// A tag that the guest reads of itself; several are allowed.
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = parse_tag)]
    tags: Vec<(String, String)>,
    /// How long before a pause the guest hears of it, such as 5min [15min].
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    notice: Option<Duration>,
    /// For how long it is watched after a swap, and put back if it isn't well; 0s for not at all [10s].
    #[arg(long, value_name = "TIME", value_parser = format::parse_time)]
    watch: Option<Duration>,
    /// What of this host the guest can reach by its network, beside the metadata service: any of
    /// dhcp, dns, ping, tcp/PORT and udp/PORT, with commas between; or none, or all [none]. What the
    /// host forwards, to other guests or the world, is not its own and goes on.
    #[arg(long, value_name = "WHAT", value_parser = parse_reach)]
    reach: Option<Listed>,
    /// Version of the release to start it with [the one added last].
    #[arg(long, value_name = "VERSION")]
    release: Option<String>,
    /// Start it with a release below the pinned minimum (`stillpoint release pin`).
    #[arg(long)]
    allow_downgrade: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
#[value(rename_all = "lower")]
enum PagesArg {
    /// 4 KiB.
    Base,
    /// 4 KiB, huge where the host allows it.
    Thp,
    /// 2 MiB, reserved on the host.
    Hugetlb2m,
    /// 1 GiB, reserved on the host.
    Hugetlb1g,
}

impl From<PagesArg> for Pages {
    fn from(pages: PagesArg) -> Self {
        match pages {
            PagesArg::Base => Self::Base,
            PagesArg::Thp => Self::Thp,
            PagesArg::Hugetlb2m => Self::Hugetlb2m,
            PagesArg::Hugetlb1g => Self::Hugetlb1g,
        }
    }
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum SurviveArg {
    /// Its VMM.
    Vmm,
    /// The host's kernel too.
    Kernel,
}

impl From<SurviveArg> for Survive {
    fn from(survive: SurviveArg) -> Self {
        match survive {
            SurviveArg::Vmm => Self::Vmm,
            SurviveArg::Kernel => Self::Kernel,
        }
    }
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum CorrectionArg {
    /// The agent sets it, at once.
    Step,
    /// The agent has it run faster until it is right.
    Slew,
    /// The guest sees to it, by ptp_kvm.
    Ptp,
}

impl From<CorrectionArg> for Correction {
    fn from(correction: CorrectionArg) -> Self {
        match correction {
            CorrectionArg::Step => Self::Step,
            CorrectionArg::Slew => Self::Slew,
            CorrectionArg::Ptp => Self::Ptp,
        }
    }
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    let (release, allow_downgrade) = (args.release.clone(), args.allow_downgrade);
    let in_turn = args.availability_set.is_some() && args.update_domain.is_none();
    let update_domains = args.update_domains;
    let profile = Profile {
        availability_set: args.availability_set.clone(),
        update_domain: args.update_domain.unwrap_or(0),
        fault_domain: args.fault_domain,
        tags: args.tags.iter().cloned().collect(),
        notice_ns: args.notice.map(format::whole_ns),
        watch_ns: args.watch.map(format::whole_ns),
        reach: args.reach.clone().map(|Listed(reach)| reach),
    };
    let spec = match &args.spec {
        Some(file) => read_spec(file)?,
        None => spec_of_flags(args)?,
    };
    let spec = with_absolute_paths(spec)?;
    let name = spec.name.clone();
    let waiting = progress::waiting(desk.json, &format!("starting {name}"));
    let new = NewVm {
        allow_downgrade,
        spec,
        release,
        profile,
        in_turn,
        update_domains,
    };
    let path = format!("/v1/vms/{name}");
    let started: Result<VmView, Problem> = desk.api.send(Method::PUT, &path, &new).await;
    waiting.finish_and_clear();
    let vm = started?;
    if desk.json {
        say_json(&vm)?;
    } else {
        let pid = vm.process.as_ref().map_or(0, |process| process.pid);
        let mut text = format!(
            "{name} is {}: {} vCPUs, {}, release {}, pid {pid}\nits console: stillpoint console {name}",
            vm.state,
            vm.spec.cpus,
            format::size(vm.spec.memory.size),
            vm.release
        );
        if let Some(set) = &vm.profile.availability_set {
            let domain = vm.profile.update_domain;
            text.push_str(&format!(
                "\nits availability set: {set}, update domain {domain}"
            ));
        }
        if let Some(socket) = &vm.vsock_socket {
            text.push_str(&format!("\nits vsock: {socket}"));
        }
        for line in safeguards::of_updatable(&vm.updatable) {
            text.push_str(&format!("\nnote: {line}"));
        }
        say(&text)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads `tap=NAME[,mac=MAC][,queues=N]`. Values are judged by the spec's validation.
fn parse_net(text: &str) -> Result<NetSpec, String> {
    let (mut tap, mut mac, mut queue_pairs) = (None, None, 1);
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("tap", name)) => tap = Some(name.to_owned()),
            Some(("mac", address)) => mac = Some(address.to_owned()),
            Some(("queues", number)) => {
                let parsed = number.parse();
                queue_pairs = parsed.map_err(|_| format!("`{number}` is no number of queues"))?;
            }
            _ => return Err(format!("`{part}` is none of tap=, mac=, queues=")),
        }
    }
    let tap = tap.ok_or("tap=NAME is missing")?;
    Ok(NetSpec {
        tap,
        mac,
        queue_pairs,
    })
}

/// One argument that is a list.
#[derive(Clone, Debug)]
struct Listed(Vec<Reach>);

fn parse_reach(text: &str) -> Result<Listed, String> {
    let list = Reach::list(text).map_err(|error| error.to_string())?;
    Ok(Listed(list))
}

fn parse_tag(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn bad(error: impl std::fmt::Display) -> Problem {
    Problem::new(Code::BadRequest, error.to_string())
}

fn read_spec(file: &Path) -> Result<MachineSpec, Problem> {
    let mut text = String::new();
    let read = if file == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).map(drop)
    } else {
        std::fs::read_to_string(file).map(|read| text = read)
    };
    read.map_err(|e| io_problem(format_args!("read the spec {}", file.display()), &e))?;
    MachineSpec::from_json(&text).map_err(bad)
}

fn spec_of_flags(args: Args) -> Result<MachineSpec, Problem> {
    let name = args.name.unwrap_or_default();
    let spec = MachineSpec {
        vsock: args.vsock.map(|cid| match cid {
            Some(cid) => VsockSpec { cid },
            None => VsockSpec::for_name(&name),
        }),
        rng: args.rng,
        name,
        cpus: args.cpus.unwrap_or(1),
        memory: MemorySpec {
            size: args.memory.unwrap_or(MemorySpec::default().size),
            pages: args.pages.map_or(Pages::Base, Pages::from),
            survive: args.survive.map_or(Survive::Vmm, Survive::from),
            lock: args.lock_memory,
            nodes: args.memory_nodes,
            carve_out: None,
        },
        kernel: KernelSpec {
            path: args.kernel.unwrap_or_default(),
            initrd: args.initrd,
            cmdline: args.cmdline.unwrap_or_default(),
        },
        disks: args.disks,
        nets: args.nets,
        clock: ClockSpec {
            policy: args.clock.unwrap_or_default(),
            correction: args.correction.map(Correction::from),
            steal: args.steal,
            vmclock: args.vmclock,
        },
        blackout_budget: args.budget.unwrap_or(DEFAULT_BUDGET),
    };
    spec.validate().map_err(bad)?;
    Ok(spec)
}

/// Reads `PATH` or `PATH,ro`. A path that ends in `,ro` itself needs a spec.
fn parse_disk(text: &str) -> Result<DiskSpec, String> {
    let (path, read_only) = match text.strip_suffix(",ro") {
        Some(path) => (path, true),
        None => (text, false),
    };
    match path {
        "" => Err("no path is given; write PATH or PATH,ro".into()),
        path => Ok(DiskSpec {
            path: path.into(),
            read_only,
        }),
    }
}

/// The daemon has another working directory.
fn with_absolute_paths(mut spec: MachineSpec) -> Result<MachineSpec, Problem> {
    let absolute = |path: &Path| {
        std::path::absolute(path)
            .map_err(|e| io_problem(format_args!("make {} absolute", path.display()), &e))
    };
    spec.kernel.path = absolute(&spec.kernel.path)?;
    if let Some(initrd) = &spec.kernel.initrd {
        spec.kernel.initrd = Some(absolute(initrd)?);
    }
    for disk in &mut spec.disks {
        disk.path = absolute(&disk.path)?;
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn disks_are_read_as_they_are_typed() {
        let disk = |path: &str, read_only| {
            let path = path.into();
            Ok(DiskSpec { path, read_only })
        };
        assert_eq!(parse_disk("a.img"), disk("a.img", false));
        assert_eq!(parse_disk("/dev/vg/a,b,ro"), disk("/dev/vg/a,b", true));
        assert!(parse_disk(",ro").is_err() && parse_disk("").is_err());
    }

    #[derive(Parser)]
    struct Typed {
        #[command(flatten)]
        args: Args,
    }

    fn spec(words: &[&str]) -> MachineSpec {
        let line = ["run", "web-1", "--kernel", "k"].iter().chain(words);
        let typed = Typed::try_parse_from(line).expect("parse");
        spec_of_flags(typed.args).expect("spec")
    }

    #[test]
    fn sockets_and_entropy_as_they_are_typed() {
        let plain = spec(&[]);
        assert_eq!((plain.vsock, plain.rng), (None, false));
        let both = spec(&["--vsock", "--rng"]);
        assert_eq!(both.vsock, Some(VsockSpec::for_name("web-1")));
        assert!(both.rng);
        assert_eq!(spec(&["--vsock=7"]).vsock, Some(VsockSpec { cid: 7 }));
        let typed = Typed::try_parse_from(["run", "a", "--kernel", "k", "--vsock=2"]);
        let error = spec_of_flags(typed.expect("parse").args).expect_err("the host's");
        assert!(error.to_string().contains("vsock.cid"), "{error}");
    }

    #[test]
    fn network_interfaces_as_they_are_typed() {
        let net = parse_net("tap=t0,queues=4,mac=52:54:00:12:34:56").expect("all of it");
        assert_eq!((net.tap.as_str(), net.queue_pairs), ("t0", 4));
        assert_eq!(net.mac.as_deref(), Some("52:54:00:12:34:56"));
        assert_eq!(parse_net("tap=t0").expect("the least").queue_pairs, 1);
        for bad in [
            "",
            "t0",
            "mac=52:54:00:12:34:56",
            "tap=t0,queues=x",
            "tap=t0,vlan=3",
        ] {
            parse_net(bad).expect_err(bad);
        }
    }
}

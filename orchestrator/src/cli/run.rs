//! `stillpoint run`

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use hyper::Method;
use stillpoint_control::spec::{
    DEFAULT_BUDGET, DiskSpec, KernelSpec, MachineSpec, MemorySpec, Pages, parse_size,
};

use super::{Desk, format, io_problem, progress, say, say_json};
use crate::api::{NewVm, VmView};
use crate::model::{Code, Problem};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the guest.
    #[arg(required_unless_present = "spec", conflicts_with = "spec")]
    name: Option<String>,
    /// A machine spec as JSON; `-` for stdin. Fields: name, cpus, memory.{size,pages},
    /// kernel.{path,initrd,cmdline}, disks[].{path,read_only}, blackout_budget_ns.
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
    /// The longest blackout a swap may take, such as 500ms [1s].
    #[arg(long, value_name = "TIME", conflicts_with = "spec", value_parser = format::parse_time)]
    budget: Option<Duration>,
    /// Version of the release to start it with [the one added last].
    #[arg(long, value_name = "VERSION")]
    release: Option<String>,
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

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    let release = args.release.clone();
    let spec = match &args.spec {
        Some(file) => read_spec(file)?,
        None => spec_of_flags(args)?,
    };
    let spec = with_absolute_paths(spec)?;
    let name = spec.name.clone();
    let waiting = progress::waiting(desk.json, &format!("starting {name}"));
    let new = NewVm { spec, release };
    let path = format!("/v1/vms/{name}");
    let started: Result<VmView, Problem> = desk.api.send(Method::PUT, &path, &new).await;
    waiting.finish_and_clear();
    let vm = started?;
    if desk.json {
        say_json(&vm)?;
    } else {
        let pid = vm.process.as_ref().map_or(0, |process| process.pid);
        say(&format!(
            "{name} is {}: {} vCPUs, {}, release {}, pid {pid}\nits console: stillpoint console {name}",
            vm.state,
            vm.spec.cpus,
            format::size(vm.spec.memory.size),
            vm.release
        ))?;
    }
    Ok(ExitCode::SUCCESS)
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
    let spec = MachineSpec {
        name: args.name.unwrap_or_default(),
        cpus: args.cpus.unwrap_or(1),
        memory: MemorySpec {
            size: args.memory.unwrap_or(MemorySpec::default().size),
            pages: args.pages.map_or(Pages::Base, Pages::from),
        },
        kernel: KernelSpec {
            path: args.kernel.unwrap_or_default(),
            initrd: args.initrd,
            cmdline: args.cmdline.unwrap_or_default(),
        },
        disks: args.disks,
        nets: Vec::new(),
        vsock: None,
        rng: false,
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
}

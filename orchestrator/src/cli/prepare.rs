//! `stillpoint host prepare`: what this host lacks for its kernel to be swapped under its guests, and, only
//! when asked to, the boot configuration for it. Needs no daemon, and changes nothing by itself.

mod memory;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;
use stillpoint_control::spec::parse_size;

use super::{Desk, format, io_problem, say, say_json};
use crate::agent::kexec;
use crate::doctor::{Check, Status};
use crate::model::{Code, Problem};

/// What makes a device-dax of memory that the kernel left alone.
const MODULES: [&str; 4] = ["nd_e820", "nd_pmem", "dax_pmem", "device_dax"];
/// The device of the first, and as a rule the only, carve-out.
const DEVICE: &str = "/dev/dax0.0";
/// The word that has a kernel leave out its ciphers' self-tests.
const NO_SELF_TESTS: &str = "cryptomgr.notests";
const DEVICE_OF_LIVE_UPDATE: &str = stillpoint_liveupdate::DEVICE;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Memory for guests that outlive the kernel, such as 64G; no kernel counts it as its own, so the host
    /// has it for nothing else.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    carve_out: Option<u64>,
    /// Write the files that are shown. They count from the next boot on.
    #[arg(long, requires = "carve_out")]
    write: bool,
    /// Look and write below this folder, as for an image of another host's disk.
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/",
        hide_default_value = true
    )]
    root: PathBuf,
}

/// A file as it is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Wanted {
    path: PathBuf,
    text: String,
    /// What is there now.
    now: Option<String>,
}

#[derive(Debug, Serialize)]
struct Told {
    checks: Vec<Check>,
    files: Vec<Wanted>,
    written: bool,
    next: Vec<String>,
}

/// `stillpoint host prepare`
pub(super) fn run(desk: &Desk, args: &Args) -> Result<ExitCode, Problem> {
    desk.must_be_local("preparing a host")?;
    let checks = checks(&args.root, args.carve_out.is_some());
    let files = match args.carve_out {
        Some(size) => files(&args.root, size)?,
        None => Vec::new(),
    };
    let changed: Vec<_> = files
        .iter()
        .filter(|file| file.now.as_ref() != Some(&file.text))
        .collect();
    if args.write {
        for file in &changed {
            write(file)?;
        }
    }
    let next = match args.write && !changed.is_empty() {
        true => vec![
            "update-grub".to_owned(),
            "reboot".to_owned(),
            "systemctl enable --now stillpoint-carve-out stillpointd".to_owned(),
        ],
        false => Vec::new(),
    };
    let ready = checks.iter().all(|check| check.status != Status::Fail);
    let told = Told {
        checks,
        written: args.write,
        next,
        files: files.clone(),
    };
    match desk.json {
        true => say_json(&told)?,
        false => say(&text(&told, args.carve_out.is_some()))?,
    }
    Ok(match ready || args.write {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Of a host with live update a carve-out is looked for only if one is asked for: it needs none.
fn checks(root: &Path, carve_out: bool) -> Vec<Check> {
    let mut checks = vec![
        match kexec::is_known() {
            Ok(()) => Check::ok("kexec", "this kernel can load another"),
            Err(why) => Check::new("kexec", Status::Fail, why, "boot a kernel that can"),
        },
        live_update(Path::new(DEVICE_OF_LIVE_UPDATE).exists(), &config(root)),
    ];
    if carve_out || checks.iter().any(|check| check.status != Status::Ok) {
        checks.extend([
            left_alone(&kexec::command_line()),
            modules(root),
            device(),
            service(root),
        ]);
    }
    checks.push(self_tests(&kexec::command_line(), &config(root)));
    checks
}

/// A word by which each boot is shorter, jumps among them. It is proposed and not written: what it leaves out may be
/// wanted. Of all that were tried it is the only one whose effect could be told (docs/kernel.md).
fn self_tests(command_line: &str, config: &str) -> Check {
    const NAME: &str = "boot parameters";
    let has = |word: &str| command_line.split_ascii_whitespace().any(|one| one == word);
    let built_without = |line: &str| line == "CONFIG_CRYPTO_MANAGER_DISABLE_TESTS=y";
    if has("fips=1") {
        return Check::ok(NAME, "the ciphers' self-tests stay, as `fips=1` wants them");
    }
    if has(NO_SELF_TESTS) || config.lines().any(built_without) {
        return Check::ok(NAME, "no time goes into self-tests of ciphers");
    }
    Check::new(
        NAME,
        Status::Warn,
        "each boot, and so each jump, tests the kernel's ciphers against known answers: seconds of it on an emulated \
         host (docs/kernel.md)",
        "`cryptomgr.notests` on the kernel's command line leaves that out; measure what it is worth on this host \
         (`stillpoint swap kernel --command-line`)",
    )
}

fn left_alone(command_line: &str) -> Check {
    const NAME: &str = "memory left alone";
    let words = command_line.split_ascii_whitespace();
    let carved: Vec<_> = words
        .filter(|word| word.starts_with("memmap=") && word.contains('!'))
        .collect();
    match carved.is_empty() {
        false => Check::ok(NAME, carved.join(" ")),
        true => Check::new(
            NAME,
            Status::Fail,
            "the kernel counts all memory as its own",
            "`stillpoint host prepare --carve-out SIZE` shows what to put on its command line; persistent \
             memory does as well",
        ),
    }
}

fn modules(root: &Path) -> Check {
    const NAME: &str = "modules";
    let release = kexec::running();
    let dir = root.join("lib/modules").join(&release);
    let lists = ["modules.dep", "modules.builtin"]
        .map(|name| std::fs::read_to_string(dir.join(name)).unwrap_or_default());
    let there = |module: &str| {
        let loaded = Path::new("/sys/module").join(module).is_dir();
        let file = |list: &String| {
            let list = list.replace('-', "_");
            list.contains(&format!("/{module}.ko"))
        };
        loaded || lists.iter().any(file)
    };
    let missing: Vec<_> = MODULES
        .into_iter()
        .filter(|module| !there(module))
        .collect();
    match missing.is_empty() {
        true => Check::ok(NAME, MODULES.join(", ")),
        false => Check::new(
            NAME,
            Status::Fail,
            format!("kernel {release} lacks {}", missing.join(", ")),
            "install the package with its modules, or boot a kernel with CONFIG_DEV_DAX and CONFIG_X86_PMEM_LEGACY",
        ),
    }
}

fn device() -> Check {
    const NAME: &str = "device";
    let found = std::fs::read_dir("/sys/bus/dax/devices")
        .into_iter()
        .flatten();
    let names: Vec<_> = found
        .flatten()
        .map(|entry| format!("/dev/{}", entry.file_name().to_string_lossy()))
        .filter(|path| Path::new(path).exists())
        .collect();
    match names.is_empty() {
        false => Check::ok(NAME, names.join(", ")),
        true => Check::new(
            NAME,
            Status::Fail,
            "there is no device-dax",
            "`ndctl create-namespace --mode devdax --align 2M --reconfig namespace0.0 --force` makes one, at \
             each boot but a jump (stillpoint-carve-out.service does)",
        ),
    }
}

fn service(root: &Path) -> Check {
    const NAME: &str = "service";
    let path = root.join("etc/systemd/system/stillpointd.service.d/carve-out.conf");
    match std::fs::read_to_string(&path) {
        Ok(text) if text.contains("STILLPOINT_CARVE_OUT=") => {
            Check::ok(NAME, "the daemon is told of the carve-out")
        }
        _ => Check::new(
            NAME,
            Status::Warn,
            "the daemon's service is not told of a carve-out",
            "`stillpoint host prepare --carve-out SIZE` shows the file; or `stillpointd --carve-out /dev/dax0.0`",
        ),
    }
}

/// The running kernel's configuration, where its package left it.
fn config(root: &Path) -> String {
    let path = root.join(format!("boot/config-{}", kexec::running()));
    std::fs::read_to_string(path).unwrap_or_default()
}

fn live_update(is_there: bool, config: &str) -> Check {
    const NAME: &str = "live update orchestrator";
    if is_there {
        return Check::ok(
            NAME,
            "this kernel has it: it keeps the memfds of guests that are to outlive it, and no carve-out is needed",
        );
    }
    let found = match config.lines().any(|line| line == "CONFIG_LIVEUPDATE=y") {
        true => "unavailable: this kernel has it, and was booted without `kho=on liveupdate=on`",
        false => "unavailable: this kernel is built without it (CONFIG_LIVEUPDATE)",
    };
    Check::new(
        NAME,
        Status::Warn,
        found,
        "none needed: a carve-out does without",
    )
}

/// The files that a host with a carve-out of this size has.
fn files(root: &Path, size: u64) -> Result<Vec<Wanted>, Problem> {
    let bad = |message: String| Problem::new(Code::BadRequest, message);
    let map = std::fs::read_to_string("/proc/iomem").unwrap_or_default();
    let at = memory::place(&memory::ranges(&map), size).map_err(bad)?;
    let word = format!("memmap={}M!{}M", size >> 20, at >> 20);
    let texts = [
        (
            "etc/default/grub.d/stillpoint.cfg",
            format!(
                "# Memory for guests that outlive the kernel (stillpoint host prepare).\n\
                 GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {word}\"\n"
            ),
        ),
        (
            "etc/modules-load.d/stillpoint.conf",
            format!("{}\n", MODULES.join("\n")),
        ),
        (
            "etc/systemd/system/stillpointd.service.d/carve-out.conf",
            format!("[Service]\nEnvironment=STILLPOINT_CARVE_OUT={DEVICE}\n"),
        ),
    ];
    let wanted = texts.map(|(path, text)| {
        let path = root.join(path);
        let now = std::fs::read_to_string(&path).ok();
        Wanted { path, text, now }
    });
    Ok(wanted.into())
}

fn write(file: &Wanted) -> Result<(), Problem> {
    let failed = |e: std::io::Error| io_problem(format_args!("write {}", file.path.display()), &e);
    if let Some(folder) = file.path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    std::fs::write(&file.path, &file.text).map_err(failed)
}

fn text(told: &Told, asked: bool) -> String {
    let row = |check: &Check| {
        let found = match check.remedy.as_str() {
            "" => check.found.clone(),
            remedy => format!("{}; {remedy}", check.found),
        };
        vec![check.check.clone(), check.status.to_string(), found]
    };
    let rows: Vec<_> = told.checks.iter().map(row).collect();
    let mut text = format::table(&["WHAT", "", "FOUND"], &[], &rows);
    for file in &told.files {
        text.push_str(&difference(file));
    }
    if asked && !told.written {
        text.push_str("\nnothing was written; `--write` does\n");
    }
    if !told.next.is_empty() {
        text.push_str(&format!(
            "\nwritten; what is left: {}\n",
            told.next.join("; ")
        ));
    }
    text
}

/// What would change, line by line: these files are a few lines long, and all ours.
fn difference(file: &Wanted) -> String {
    let path = file.path.display();
    let now = file.now.as_deref().unwrap_or_default();
    if file.now.as_ref() == Some(&file.text) {
        return format!("\n{path}: as it should be\n");
    }
    let mut text = format!("\n{path}:\n");
    for line in now
        .lines()
        .filter(|line| !file.text.lines().any(|new| new == *line))
    {
        text.push_str(&format!("  -{line}\n"));
    }
    for line in file.text.lines() {
        let mark = if now.lines().any(|old| old == line) {
            ' '
        } else {
            '+'
        };
        text.push_str(&format!("  {mark}{line}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_shows_what_goes_and_what_comes() {
        let file = Wanted {
            path: "/etc/x".into(),
            text: "a\nc\n".into(),
            now: Some("a\nb\n".into()),
        };
        assert_eq!(difference(&file), "\n/etc/x:\n  -b\n   a\n  +c\n");
        let same = Wanted {
            now: Some(file.text.clone()),
            ..file
        };
        assert!(difference(&same).contains("as it should be"));
    }

    #[test]
    fn live_update_is_told_apart_from_a_kernel_that_could_have_it() {
        let built = "CONFIG_LIVEUPDATE=y\n";
        assert_eq!(live_update(true, "").status, Status::Ok);
        let off = live_update(false, built);
        assert!(off.found.contains("kho=on liveupdate=on"), "{off:?}");
        let without = live_update(false, "# CONFIG_LIVEUPDATE is not set\n");
        assert!(without.found.contains("built without"), "{without:?}");
        assert!(
            [off, without]
                .iter()
                .all(|check| check.status == Status::Warn)
        );
    }

    #[test]
    fn what_makes_boots_shorter_is_proposed_where_it_is_neither_there_nor_unwanted() {
        let proposed = self_tests(
            "quiet",
            "# CONFIG_CRYPTO_MANAGER_DISABLE_TESTS is not set\n",
        );
        assert_eq!(proposed.status, Status::Warn);
        assert!(proposed.remedy.contains(NO_SELF_TESTS), "{proposed:?}");
        let there = format!("quiet {NO_SELF_TESTS}");
        assert_eq!(self_tests(&there, "").status, Status::Ok);
        let built = "CONFIG_CRYPTO_MANAGER_DISABLE_TESTS=y\n";
        assert_eq!(self_tests("quiet", built).status, Status::Ok);
        let wanted = self_tests("fips=1 quiet", "");
        assert!(
            wanted.status == Status::Ok && wanted.found.contains("stay"),
            "{wanted:?}"
        );
        // Words of which it is a part are others.
        assert_eq!(self_tests("cryptomgr.notests=0", "").status, Status::Warn);
    }

    #[test]
    fn memory_that_is_left_alone_is_found_on_the_command_line() {
        assert_eq!(left_alone("quiet memmap=1G!4G").status, Status::Ok);
        assert_eq!(
            left_alone("memmap=1G$4G").status,
            Status::Fail,
            "that makes no device"
        );
    }

    #[test]
    fn what_is_written_is_what_was_shown_and_again_is_nothing() {
        let root = tempfile::tempdir().expect("a folder");
        let path = root.path().join("etc/default/grub.d/x.cfg");
        let file = Wanted {
            path: path.clone(),
            text: "new\n".into(),
            now: None,
        };
        write(&file).expect("written");
        assert_eq!(std::fs::read_to_string(path).expect("there"), "new\n");
    }
}

//! A private apt: its own sources, lists and archives in one folder, so that packages of other
//! suites can be had without touching what the machine has installed or is set up for.
//!
//! The machine's own `apt.conf` is read too (a proxy may be what leads to the mirror), but its hooks
//! are cleared. apt verifies everything as always: `InRelease` by the keyring of Debian's archive,
//! packages by the hashes in the lists. Nothing here installs a package, and nothing needs root.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use crate::progress::Progress;

/// Where Debian's packages `debian-archive-keyring` and its successors put the keyring.
const KEYRINGS: &[&str] = &[
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];

/// Why apt did not give what was asked of it.
#[derive(Debug, thiserror::Error)]
pub enum AptError {
    /// No apt here.
    #[error(
        "starting {program}: {error}; Debian's packages are fetched by apt, which this machine must have"
    )]
    Absent {
        /// What was started.
        program: String,
        /// Why it did not start.
        error: std::io::Error,
    },
    /// It ran, and failed.
    #[error("{what} failed ({status}): {said}")]
    Failed {
        /// What it was to do.
        what: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The errors it gave.
        said: String,
    },
    /// No keyring to verify with.
    #[error("no keyring of Debian's archive at {}; install debian-archive-keyring", KEYRINGS[0])]
    NoKeyring,
    /// It succeeded, and what it was to bring isn't there.
    #[error("{what} ended well and gave no {missing}")]
    Nothing {
        /// What it was to do.
        what: String,
        /// What is missing.
        missing: String,
    },
    /// A file of this private apt.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
}

/// A package file as the lists name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deb {
    /// `name_version_architecture.deb`, as apt writes it (`:` as `%3a`).
    pub file: String,
    /// Its size.
    pub bytes: u64,
}

impl Deb {
    /// `name=version`, as apt-get takes it.
    fn exact(&self) -> Option<String> {
        let mut parts = self.file.split('_');
        let (name, version) = (parts.next()?, parts.next()?);
        Some(format!("{name}={}", version.replace("%3a", ":")))
    }
}

/// One private apt, over some suites.
#[derive(Debug)]
pub struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// One in `dir`, over these pairs of archive root and suite.
    pub fn new(dir: &Path, suites: &[(&str, &str)]) -> Result<Self, AptError> {
        let apt = Self {
            dir: dir.to_owned(),
        };
        let keyring = KEYRINGS.iter().find(|path| Path::new(path).is_file());
        let keyring = keyring.ok_or(AptError::NoKeyring)?;
        for folder in ["lists/partial", "archives/partial"] {
            apt.file(folder, |path| std::fs::create_dir_all(path))?;
        }
        let mut sources = String::new();
        for (archive, suite) in suites {
            let _ = writeln!(
                sources,
                "deb [arch=amd64 signed-by={keyring}] {archive} {suite} main"
            );
        }
        // The lists of another mirror are not this one's: they are fetched anew.
        if std::fs::read_to_string(dir.join("sources.list")).is_ok_and(|old| old != sources) {
            let _ = std::fs::remove_file(dir.join("updated"));
        }
        apt.file("sources.list", |path| std::fs::write(path, &sources))?;
        apt.file("status", |path| std::fs::write(path, ""))?;
        apt.file("apt.conf", |path| std::fs::write(path, configuration(dir)))?;
        Ok(apt)
    }

    /// Whether it has lists.
    pub fn is_updated(&self) -> bool {
        self.dir.join("updated").is_file()
    }

    /// Fetches the lists anew.
    pub fn update(&self) -> Result<(), AptError> {
        self.run("apt-get", &["update"], "fetching the package lists")?;
        self.file("updated", |path| std::fs::write(path, ""))
    }

    /// The names that the newest version of a package depends on.
    pub fn depends(&self, package: &str) -> Result<Vec<String>, AptError> {
        let what = format!("looking up the package {package}");
        let text = self.run("apt-cache", &["show", "--no-all-versions", package], &what)?;
        Ok(dependencies(&text))
    }

    /// These packages alone, newest versions.
    pub fn alone(&self, packages: &[String]) -> Result<Vec<Deb>, AptError> {
        let args = [["download", "--print-uris"].as_slice(), &refs(packages)].concat();
        self.uris(&args, packages)
    }

    /// These packages and all that they need to run, on a machine that had nothing.
    pub fn with_dependencies(&self, packages: &[String]) -> Result<Vec<Deb>, AptError> {
        let install = ["install", "--print-uris", "--no-install-recommends"];
        let args = [install.as_slice(), &refs(packages)].concat();
        self.uris(&args, packages)
    }

    fn uris(&self, args: &[&str], packages: &[String]) -> Result<Vec<Deb>, AptError> {
        let what = format!("choosing packages for {}", packages.join(" "));
        let debs = listed(&self.run("apt-get", args, &what)?);
        if debs.is_empty() {
            let missing = "package file".into();
            return Err(AptError::Nothing { what, missing });
        }
        Ok(debs)
    }

    /// Fetches them into a folder of their own (`into`, which must be empty).
    pub fn download(
        &self,
        debs: &[Deb],
        into: &Path,
        progress: Progress,
        name: &str,
    ) -> Result<(), AptError> {
        let exact: Vec<String> = debs.iter().filter_map(Deb::exact).collect();
        let total = debs.iter().map(|deb| deb.bytes).sum();
        let step = progress.step(name, Some(total));
        let mut command = self.command(
            "apt-get",
            &[["download"].as_slice(), &refs(&exact)].concat(),
        );
        command.current_dir(into);
        let watched = into.to_owned();
        let what = format!("downloading the packages {}", exact.join(" "));
        watch(command, &what, || step.at(size_of_files(&watched)))?;
        for deb in debs {
            if !into.join(&deb.file).is_file() {
                let missing = deb.file.clone();
                return Err(AptError::Nothing { what, missing });
            }
        }
        step.done(&format!(
            "{} packages, {} MB",
            debs.len(),
            total / 1_000_000
        ));
        Ok(())
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(["-qq", "-c"])
            .arg(self.dir.join("apt.conf"))
            .args(args);
        command
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    fn run(&self, program: &str, args: &[&str], what: &str) -> Result<String, AptError> {
        watch(self.command(program, args), what, || {})
    }

    fn file<T>(
        &self,
        name: &str,
        act: impl FnOnce(&Path) -> std::io::Result<T>,
    ) -> Result<T, AptError> {
        let path = self.dir.join(name);
        act(&path).map_err(|error| AptError::File { path, error })
    }
}

fn refs(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// What is set after all of the machine's own configuration, and so overrides it (apt.conf(5)).
fn configuration(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "#clear APT::Update::Pre-Invoke;\n\
         #clear APT::Update::Post-Invoke;\n\
         #clear APT::Update::Post-Invoke-Success;\n\
         #clear APT::Default-Release;\n\
         Dir::State \"{dir}\";\n\
         Dir::State::lists \"{dir}/lists\";\n\
         Dir::State::status \"{dir}/status\";\n\
         Dir::Cache \"{dir}\";\n\
         Dir::Cache::archives \"{dir}/archives\";\n\
         Dir::Etc::sourcelist \"{dir}/sources.list\";\n\
         Dir::Etc::sourceparts \"-\";\n\
         Dir::Etc::preferences \"-\";\n\
         Dir::Etc::preferencesparts \"-\";\n\
         APT::Architecture \"amd64\";\n\
         APT::Architectures {{ \"amd64\"; }};\n\
         APT::Update::Error-Mode \"any\";\n\
         APT::Sandbox::User \"root\";\n\
         Acquire::Languages \"none\";\n\
         Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
         Acquire::Retries \"2\";\n\
         Acquire::http::Timeout \"20\";\n\
         Acquire::https::Timeout \"20\";\n"
    )
}

/// Runs it to its end, looking in at `glance` meanwhile; what it printed.
fn watch(mut command: Command, what: &str, glance: impl Fn()) -> Result<String, AptError> {
    let program = command.get_program().to_string_lossy().into_owned();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command.spawn().map_err(|error| AptError::Absent {
        program: program.clone(),
        error,
    })?;
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || tell.send(child.wait_with_output()));
    let output = loop {
        match told.recv_timeout(Duration::from_millis(100)) {
            Ok(ended) => break ended,
            Err(RecvTimeoutError::Timeout) => glance(),
            Err(RecvTimeoutError::Disconnected) => break Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    };
    let output = output.map_err(|error| AptError::Absent { program, error })?;
    if !output.status.success() {
        return Err(AptError::Failed {
            what: what.to_owned(),
            status: output.status,
            said: complaints(&String::from_utf8_lossy(&output.stderr)),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// apt's errors in one line, without what only repeats.
fn complaints(stderr: &str) -> String {
    let mut said: Vec<&str> = stderr
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    said.dedup();
    let errors: Vec<&str> = said
        .iter()
        .copied()
        .filter(|line| line.starts_with("E:"))
        .collect();
    let wanted = if errors.is_empty() { said } else { errors };
    wanted.into_iter().take(4).collect::<Vec<_>>().join(" ")
}

fn size_of_files(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.metadata().ok())
        .filter(std::fs::Metadata::is_file)
        .map(|meta| meta.len())
        .sum()
}

/// The package names in the `Depends:` and `Pre-Depends:` of a control paragraph; of alternatives
/// the first.
fn dependencies(control: &str) -> Vec<String> {
    let value = |line: &str| {
        let rest = line
            .strip_prefix("Depends:")
            .or_else(|| line.strip_prefix("Pre-Depends:"))?;
        Some(rest.to_owned())
    };
    let fields = control
        .lines()
        .filter_map(value)
        .collect::<Vec<_>>()
        .join(",");
    let name = |one: &str| {
        let end = one.find([' ', '(', ':', '|']).unwrap_or(one.len());
        Some(one[..end].to_owned()).filter(|name| !name.is_empty())
    };
    fields
        .split(',')
        .filter_map(|one| name(one.trim()))
        .collect()
}

/// `'URI' FILE SIZE HASH`, one a line.
fn listed(text: &str) -> Vec<Deb> {
    let parse = |line: &str| {
        let mut words = line
            .strip_prefix('\'')?
            .split("' ")
            .nth(1)?
            .split_whitespace();
        let deb = Deb {
            file: words.next()?.to_owned(),
            bytes: words.next()?.parse().ok()?,
        };
        // A file name is used as a path below.
        (deb.file.ends_with(".deb") && !deb.file.contains('/')).then_some(deb)
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_of_a_paragraph() {
        let control = "Package: linux-image-x\nPre-Depends: a:any (>= 1)\n\
            Depends: dracut | initramfs-tools (>= 0.1), linux-base-x (= 7), kmod\nDescription: no, not this\n";
        assert_eq!(
            dependencies(control),
            ["a", "dracut", "linux-base-x", "kmod"]
        );
    }

    #[test]
    fn files_that_apt_lists() {
        let text = "Reading...\n'http://m.example/debian/pool/b_1%3a2_amd64.deb' b_1%3a2-3_amd64.deb 42 SHA256:00\n\
            'http://m.example/x' ../evil.deb 1 SHA256:00\n";
        let debs = listed(text);
        assert_eq!(debs.len(), 1);
        assert_eq!(
            (debs[0].file.as_str(), debs[0].bytes),
            ("b_1%3a2-3_amd64.deb", 42)
        );
        assert_eq!(debs[0].exact().as_deref(), Some("b=1:2-3"));
    }

    #[test]
    fn complaints_are_the_errors() {
        let text = "W: something\nE: Failed to fetch x\nE: Failed to fetch x\n";
        assert_eq!(complaints(text), "E: Failed to fetch x");
        assert_eq!(complaints("only this\n"), "only this");
    }
}

//! The test programs there are, as cargo listed them when it built them (`--message-format`).

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;

use crate::plan::Of;

/// A test program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Program {
    /// Folder of its package, below the root of the work tree.
    pub(crate) package: PathBuf,
    name: String,
    unit_tests: bool,
    optimised: bool,
    pub(crate) path: PathBuf,
}

/// A line of cargo's list: an artifact, or something else that has none of these fields.
#[derive(Deserialize)]
struct Message {
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
    name: String,
}

#[derive(Deserialize)]
struct Profile {
    opt_level: String,
    test: bool,
}

impl Program {
    /// All that the lists in a folder name.
    pub(crate) fn all(lists: &Path, root: &Path) -> anyhow::Result<Vec<Self>> {
        let mut programs = Vec::new();
        let said = || {
            format!(
                "{}: run `make test`, which builds all tests",
                lists.display()
            )
        };
        for entry in std::fs::read_dir(lists).with_context(said)? {
            let list = entry?.path();
            let text = std::fs::read_to_string(&list)?;
            programs.extend(Self::listed(&text, root).with_context(|| list.display().to_string())?);
        }
        ensure!(!programs.is_empty(), "no test program: {}", said());
        Ok(programs)
    }

    fn listed(text: &str, root: &Path) -> anyhow::Result<Vec<Self>> {
        let mut programs = Vec::new();
        for line in text.lines() {
            let message: Message = serde_json::from_str(line)?;
            let (Some(manifest), Some(target), Some(profile), Some(path)) = (
                message.manifest_path,
                message.target,
                message.profile,
                message.executable,
            ) else {
                continue;
            };
            if !profile.test {
                continue;
            }
            let package = manifest.parent().unwrap_or(&manifest);
            programs.push(Self {
                package: package.strip_prefix(root).unwrap_or(package).into(),
                name: target.name,
                unit_tests: target.kind.iter().all(|kind| kind != "test"),
                optimised: profile.opt_level != "0",
                path,
            });
        }
        Ok(programs)
    }

    fn is_of(&self, of: Of) -> bool {
        let named = |names: &[&str]| !self.unit_tests && names.contains(&self.name.as_str());
        match of {
            Of::UnitsBut(package) => {
                self.unit_tests && !self.optimised && self.package != Path::new(package)
            }
            Of::Package(package, but) => {
                self.package == Path::new(package) && !self.optimised && !named(but)
            }
            Of::Named(package, names) => {
                self.package == Path::new(package) && !self.optimised && named(names)
            }
            Of::Optimised(package, names) => {
                self.package == Path::new(package) && self.optimised && named(names)
            }
        }
    }
}

/// Those that a suite is of, in the order of their list; an error if one that it names is not there.
pub(crate) fn of_suite<'a>(of: &[Of], all: &'a [Program]) -> anyhow::Result<Vec<&'a Program>> {
    let mut chosen = Vec::new();
    for &of in of {
        let these: Vec<&Program> = all.iter().filter(|program| program.is_of(of)).collect();
        let wanted: &[&str] = match of {
            Of::UnitsBut(_) | Of::Package(..) => &[],
            Of::Named(_, names) | Of::Optimised(_, names) => names,
        };
        for name in wanted {
            if !these.iter().any(|program| program.name == *name) {
                bail!("{of:?}: {name} was not built; run `make test`, which builds all tests");
            }
        }
        ensure!(!these.is_empty(), "{of:?}: no such program was built");
        chosen.extend(these);
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = concat!(
        r#"{"reason":"compiler-artifact","manifest_path":"/w/tests/Cargo.toml","target":{"kind":["test"],"name":"swap"},"profile":{"opt_level":"0","test":true},"executable":"/t/swap"}"#,
        "\n",
        r#"{"reason":"compiler-artifact","manifest_path":"/w/tests/Cargo.toml","target":{"kind":["bin"],"name":"swap"},"profile":{"opt_level":"0","test":true},"executable":"/t/unit"}"#,
        "\n",
        r#"{"reason":"compiler-artifact","manifest_path":"/w/tests/Cargo.toml","target":{"kind":["bin"],"name":"swap"},"profile":{"opt_level":"0","test":false},"executable":"/t/bin"}"#,
        "\n",
        r#"{"reason":"compiler-artifact","manifest_path":"/w/vmm/fuzz/Cargo.toml","target":{"kind":["test"],"name":"bounded"},"profile":{"opt_level":"3","test":true},"executable":"/t/fuzz"}"#,
        "\n",
        r#"{"reason":"build-finished","success":true}"#,
        "\n",
    );

    fn paths(of: Of) -> anyhow::Result<Vec<String>> {
        let all = Program::listed(LIST, Path::new("/w"))?;
        let chosen = of_suite(&[of], &all)?;
        Ok(chosen
            .iter()
            .map(|p| p.path.display().to_string())
            .collect())
    }

    #[test]
    fn a_suite_is_of_what_it_names() -> anyhow::Result<()> {
        assert_eq!(paths(Of::Named("tests", &["swap"]))?, ["/t/swap"]);
        assert_eq!(paths(Of::UnitsBut("orchestrator"))?, ["/t/unit"]);
        assert_eq!(paths(Of::Package("tests", &[]))?, ["/t/swap", "/t/unit"]);
        assert_eq!(paths(Of::Package("tests", &["swap"]))?, ["/t/unit"]);
        let optimised = Of::Optimised("vmm/fuzz", &["bounded"]);
        assert_eq!(paths(optimised)?, ["/t/fuzz"]);
        Ok(())
    }

    #[test]
    fn what_was_not_built_is_an_error() {
        for of in [
            Of::UnitsBut("tests"),
            Of::Named("tests", &["swap", "hurry"]),
            Of::Named("vmm/fuzz", &["bounded"]),
            Of::Optimised("tests", &["swap"]),
        ] {
            assert!(paths(of).is_err(), "{of:?}");
        }
    }
}

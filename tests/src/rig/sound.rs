//! What makes QEMU's emulation of SVM sound: a plugin for its translator (`sound.c` says what is
//! mended, and why), built anew for each run.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

const SOURCE: &str = include_str!("sound.c");
/// Its name in the folder of a run.
pub(super) const PLUGIN: &str = "sound.so";

/// Builds it in `dir`, and says where it is.
pub(super) fn build(dir: &Path) -> anyhow::Result<PathBuf> {
    let source = dir.join("sound.c");
    std::fs::write(&source, SOURCE).with_context(|| format!("writing {}", source.display()))?;
    compile(&source, &dir.join(PLUGIN))
}

fn compile(source: &Path, built: &Path) -> anyhow::Result<PathBuf> {
    let output = Command::new("cc")
        .args(["-O2", "-Wall", "-Werror", "-shared", "-fPIC"])
        .args(["-fvisibility=hidden", "-o"])
        .args([built, source])
        .output()
        .context("starting cc, the C compiler, which the rig needs: install gcc")?;
    ensure!(
        output.status.success(),
        "compiling {}: {}",
        source.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(built.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_built_without_a_warning() {
        let dir = tempfile::tempdir().unwrap();
        assert!(build(dir.path()).unwrap().is_file());
        std::fs::write(dir.path().join("sound.c"), "int main(void) { return }").unwrap();
        let error = compile(&dir.path().join("sound.c"), &dir.path().join("other.so")).unwrap_err();
        assert!(error.to_string().contains("sound.c"), "{error}");
    }
}

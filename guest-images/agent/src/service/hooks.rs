//! Hooks: programs of the guest's owner that run before and after a pause.
//!
//! Every executable file of a directory, in the order of the names, one after the other, all
//! of them under one deadline. A hook that fails doesn't keep the others from running: what
//! comes of it is for whoever asked to judge. No directory is no hooks.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stillpoint_agent::protocol::{Code, Hook, Hooks, Output, Problem, Program};

use super::program::{self, Full};

/// The most hooks of a directory.
const MAX_HOOKS: usize = 16;
/// What is told of each output of a hook: all of them must fit into an answer.
const MAX_TOLD: usize = 4 << 10;

/// Runs the hooks of a directory.
pub(super) fn run(directory: &Path, deadline_ms: u64) -> Result<Hooks, Problem> {
    let paths = list(directory).map_err(|error| Problem {
        code: Code::Failed,
        text: format!("looking for hooks in {}: {error}", directory.display()),
    })?;
    if paths.len() > MAX_HOOKS {
        return Err(Problem {
            code: Code::TooMany,
            text: format!("{} has more than {MAX_HOOKS} hooks", directory.display()),
        });
    }
    let deadline = Instant::now().checked_add(Duration::from_millis(deadline_ms));
    let mut hooks = Hooks::default();
    for path in paths {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        match left {
            // A time limit is told in whole milliseconds.
            Some(left) if left < Duration::from_millis(1) => hooks.left_out += 1,
            left => hooks.ran.push(run_one(&path, left)),
        }
    }
    Ok(hooks)
}

fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let executable = std::fs::metadata(&path)
            .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
        if executable {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn run_one(path: &Path, left: Option<Duration>) -> Hook {
    let begun = Instant::now();
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let program = Program {
        program: path.to_string_lossy().into_owned(),
        time_limit_ms: left.map(millis),
        ..Program::default()
    };
    let (exit, output) = match program::start(&program, Full::Drop) {
        Ok(job) => {
            let ended = job.ended();
            (Some(ended.exit), shorten(ended.output))
        }
        Err(problem) => {
            let stderr = problem.text;
            let output = Output {
                stderr,
                ..Output::default()
            };
            (None, output)
        }
    };
    Hook {
        name,
        exit,
        took_ms: millis(begun.elapsed()),
        output,
    }
}

fn shorten(mut output: Output) -> Output {
    for text in [&mut output.stdout, &mut output.stderr] {
        let end = text.floor_char_boundary(MAX_TOLD);
        output.dropped += (text.len() - end) as u64;
        text.truncate(end);
    }
    output
}

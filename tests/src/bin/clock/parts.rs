//! Parts, taken one after the other, each written down when it is done.
//!
//! A part that can't be carried out is tried once more, then it is a broken row by its name, and the next
//! is taken. A run that was interrupted goes on with `--resume`: what is written down is not taken again,
//! if the programs are the same to the byte.

use std::hash::{DefaultHasher, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize};
use stillpoint_tests::clocks::figures::{Figure, or_broken};
use stillpoint_tests::releases::{self, Release};

use crate::table;

/// A part that was taken.
#[derive(Debug, Serialize, Deserialize)]
struct Part {
    name: String,
    /// The programs it was taken with.
    programs: u64,
    seconds: u64,
    figures: Vec<Figure>,
}

/// The parts of a run.
#[derive(Debug)]
pub(crate) struct Parts {
    dir: PathBuf,
    resume: bool,
    quick: bool,
    programs: u64,
    done: Vec<Part>,
}

impl Parts {
    /// Of a run that writes into `dir`.
    pub(crate) fn new(dir: &Path, resume: bool, quick: bool) -> anyhow::Result<Self> {
        let dir = dir.join("parts");
        if !resume {
            let _ = std::fs::remove_dir_all(&dir);
        }
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        Ok(Self {
            dir,
            resume,
            quick,
            programs: programs()?,
            done: Vec::new(),
        })
    }

    /// Takes one, or takes it over from the run before.
    pub(crate) fn take(&mut self, name: &str, part: impl Fn() -> anyhow::Result<Vec<Figure>>) {
        if let Some(before) = self.before(name) {
            eprintln!("{name}: taken over from the run before");
            self.done.push(before);
            return;
        }
        eprintln!("{name} ...");
        let began = Instant::now();
        let taken = guarded(&part).or_else(|error| {
            eprintln!("{name}: {error:#}; once more");
            guarded(&part)
        });
        let figures = or_broken(name, taken);
        let seconds = began.elapsed().as_secs();
        eprint!("{}", table::of(&figures));
        eprintln!("{name}: {seconds} s\n");
        let part = Part {
            name: name.to_owned(),
            programs: self.programs,
            seconds,
            figures,
        };
        // Without it the part is taken again, which is all there is to lose.
        let text = serde_json::to_vec_pretty(&part).unwrap_or_default();
        if let Err(error) = std::fs::write(self.file(name), text) {
            eprintln!("{name}: cannot write it down: {error}");
        }
        self.done.push(part);
    }

    /// A figure that takes no measuring.
    pub(crate) fn note(&mut self, figure: Figure) {
        self.done.push(Part {
            name: figure.name.clone(),
            programs: self.programs,
            seconds: 0,
            figures: vec![figure],
        });
    }

    /// All figures, in order.
    pub(crate) fn figures(&self) -> Vec<Figure> {
        let all = self.done.iter().flat_map(|part| &part.figures);
        all.cloned().collect()
    }

    /// What each part took, for people.
    pub(crate) fn times(&self) -> String {
        let time = |part: &Part| {
            let time = Duration::from_secs(part.seconds);
            format!("{time:>8?}  {}\n", part.name)
        };
        self.done.iter().map(time).collect()
    }

    fn before(&self, name: &str) -> Option<Part> {
        let text = std::fs::read(self.file(name))
            .ok()
            .filter(|_| self.resume)?;
        let part: Part = serde_json::from_slice(&text).ok()?;
        let is_whole = !part.figures.iter().any(Figure::is_missing);
        (part.programs == self.programs && part.name == name && is_whole).then_some(part)
    }

    fn file(&self, name: &str) -> PathBuf {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        let name: String = name.chars().map(plain).collect();
        let length = if self.quick { "quick" } else { "full" };
        self.dir.join(format!("{name}.{length}.json"))
    }
}

/// A part that panics takes no other with it.
fn guarded(part: impl Fn() -> anyhow::Result<Vec<Figure>>) -> anyhow::Result<Vec<Figure>> {
    catch_unwind(AssertUnwindSafe(part)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(anyhow!("a panic: {}", text.unwrap_or_default()))
    })
}

/// Tells one build of what is measured, and of what measures, from another.
fn programs() -> anyhow::Result<u64> {
    let mut all = vec![std::env::current_exe()?, releases::pulse()?];
    for release in [Release::Current, Release::Compat, Release::Faulty("")] {
        all.push(release.binary()?);
    }
    let mut hasher = DefaultHasher::new();
    for path in all {
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        hasher.write(&bytes);
    }
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use stillpoint_tests::clocks::figures::Verdict;

    fn parts(dir: &Path, resume: bool, programs: u64) -> Parts {
        Parts {
            dir: dir.to_owned(),
            resume,
            quick: false,
            programs,
            done: Vec::new(),
        }
    }

    #[test]
    fn what_was_taken_is_not_taken_again_by_the_same_programs() {
        let dir = tempfile::tempdir().expect("a folder");
        let taken = Cell::new(0);
        let part = || {
            taken.set(taken.get() + 1);
            Ok(vec![Figure::skipped("a", "b", "c")])
        };
        for (resume, programs, times) in [(false, 1, 1), (true, 1, 1), (true, 2, 2), (false, 2, 3)]
        {
            let mut parts = parts(dir.path(), resume, programs);
            parts.take("a part", part);
            assert_eq!(taken.get(), times, "{resume} {programs}");
            assert_eq!(parts.figures().len(), 1);
        }
    }

    #[test]
    fn one_that_fails_is_tried_again_and_named_and_never_taken_over() {
        let dir = tempfile::tempdir().expect("a folder");
        let tried = Cell::new(0);
        let part = || -> anyhow::Result<Vec<Figure>> {
            tried.set(tried.get() + 1);
            match tried.get() {
                1 => Err(anyhow!("no luck")),
                _ => panic!("no luck at all"),
            }
        };
        let mut first = parts(dir.path(), false, 1);
        first.take("a part", part);
        let figures = first.figures();
        assert_eq!((tried.get(), figures.len()), (2, 1));
        assert_eq!(figures[0].verdict, Verdict::Broken);
        assert!(figures[0].name == "a part" && figures[0].measured.contains("at all"));
        let mut second = parts(dir.path(), true, 1);
        second.take("a part", || Ok(vec![Figure::skipped("a", "b", "c")]));
        assert_eq!(second.figures()[0].verdict, Verdict::Skipped);
    }
}

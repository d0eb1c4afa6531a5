//! Telling whoever waits what is being done: a bar for people, a line of JSON for programs.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Where progress is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// On standard error, with bars where that is a terminal.
    People,
    /// On standard output, one JSON object a line.
    Programs,
    /// Nowhere.
    Silent,
}

/// One step under way; dropping it unfinished says nothing more (its error will).
#[derive(Debug)]
pub struct Step {
    what: String,
    bar: Option<ProgressBar>,
    to: Progress,
    began: Instant,
}

impl Progress {
    /// A step begins. `bytes` is its size where it is known.
    pub fn step(self, what: &str, bytes: Option<u64>) -> Step {
        let bar = match self {
            Self::People => Some(bar(what, bytes)),
            Self::Programs => {
                program(&serde_json::json!({"event": "begin", "step": what, "bytes": bytes}));
                None
            }
            Self::Silent => None,
        };
        Step {
            what: what.to_owned(),
            bar,
            to: self,
            began: Instant::now(),
        }
    }

    /// A line that stays.
    pub fn note(self, text: &str) {
        match self {
            Self::People => person(text),
            Self::Programs => program(&serde_json::json!({"event": "note", "text": text})),
            Self::Silent => {}
        }
    }
}

impl Step {
    /// So many bytes of it are done.
    pub fn at(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        }
    }

    /// It is done, with this result.
    pub fn done(self, result: &str) -> Duration {
        let took = self.began.elapsed();
        match self.to {
            Progress::People => {
                if let Some(bar) = &self.bar {
                    bar.finish_and_clear();
                }
                person(&format!(
                    "{:<34} {:>6.1} s  {result}",
                    self.what,
                    took.as_secs_f64()
                ));
            }
            Progress::Programs => program(&serde_json::json!({
                "event": "done", "step": self.what, "result": result,
                "took_ns": u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
            })),
            Progress::Silent => {}
        }
        took
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(what: &str, bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match bytes {
        Some(bytes) => (
            ProgressBar::new(bytes),
            "{msg:<34} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}",
        ),
        None => (ProgressBar::new_spinner(), "{msg:<34} {spinner} {elapsed}"),
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

fn person(text: &str) {
    eprintln!("{text}");
}

fn program(event: &serde_json::Value) {
    println!("{event}");
}

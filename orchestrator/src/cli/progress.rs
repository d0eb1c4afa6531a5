//! Progress on stderr while something goes on; nothing when nobody looks.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A spinner with a text and the time that has passed.
pub(super) fn waiting(quiet: bool, text: &str) -> ProgressBar {
    let bar = shown(
        quiet,
        ProgressBar::new_spinner(),
        "{spinner} {msg}  {elapsed}",
    );
    bar.set_message(text.to_owned());
    bar
}

/// A bar of so many, with a text and the time that has passed.
pub(super) fn counting(quiet: bool, of: usize) -> ProgressBar {
    let bar = ProgressBar::new(of as u64);
    shown(quiet, bar, "{bar:24} {pos}/{len}  {msg}  {elapsed}")
}

fn shown(quiet: bool, bar: ProgressBar, template: &str) -> ProgressBar {
    // Not on a terminal: indicatif hides it by itself.
    bar.set_draw_target(if quiet {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr()
    });
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

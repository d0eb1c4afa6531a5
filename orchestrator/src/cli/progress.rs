//! Progress on stderr while something goes on; nothing when nobody looks.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A spinner with a text and the time that has passed.
pub(super) fn waiting(quiet: bool, text: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    // Not on a terminal: indicatif hides it by itself.
    bar.set_draw_target(if quiet {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr()
    });
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}  {elapsed}") {
        bar.set_style(style);
    }
    bar.set_message(text.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

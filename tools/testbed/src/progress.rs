//! Progress of long steps: a bar on a terminal, plain lines elsewhere.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// One long step that a person waits for. Dropped without [`Step::done`], it is shown as failed.
pub struct Step {
    bar: ProgressBar,
    what: String,
    started: Instant,
    finished: bool,
}

impl Step {
    /// Announces a step whose length is unknown.
    pub fn start(what: impl Into<String>) -> Self {
        let style = ProgressStyle::with_template("{spinner} {prefix} [{elapsed}] {wide_msg:.dim}");
        Self::with_bar(what.into(), ProgressBar::new_spinner(), style)
    }

    /// Announces a step that takes about `expected` notes (or units given to [`Step::advance_to`]).
    pub fn with_length(what: impl Into<String>, expected: u64) -> Self {
        let style = ProgressStyle::with_template("{spinner} {prefix} [{elapsed}] {bar:30} {wide_msg:.dim}");
        Self::with_bar(what.into(), ProgressBar::new(expected), style)
    }

    fn with_bar(
        what: String,
        bar: ProgressBar,
        style: Result<ProgressStyle, indicatif::style::TemplateError>,
    ) -> Self {
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.set_prefix(what.clone());
        bar.enable_steady_tick(Duration::from_millis(120));
        if bar.is_hidden() {
            eprintln!("{what} ...");
        }
        Self { bar, what, started: Instant::now(), finished: false }
    }

    /// Shows one line of what is going on, and moves the bar by one.
    pub fn note(&self, line: &str) {
        let line = line.trim();
        if line.is_empty() {
            return;
        }
        self.bar.set_message(line.to_owned());
        // An estimate that was too low must not look finished.
        if self.bar.length().is_none_or(|length| self.bar.position() + 1 < length) {
            self.bar.inc(1);
        }
    }

    /// Moves the bar to `position`.
    pub fn advance_to(&self, position: u64) {
        self.bar.set_position(position);
    }

    /// The step succeeded.
    pub fn done(mut self) {
        self.finish("done in");
    }

    fn finish(&mut self, how: &str) {
        self.finished = true;
        self.bar.finish_and_clear();
        eprintln!("{}: {how} {:.1} s", self.what, self.started.elapsed().as_secs_f64());
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.finished {
            self.finish("failed after");
        }
    }
}

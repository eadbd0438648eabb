//! Rows of a report: the table on the terminal and the JSON file.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;

/// One measurement beside its floor.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was done.
    pub op: String,
    /// What carried the messages.
    pub transport: String,
    /// How threads waited: `busy` or `blocking`.
    pub polling: String,
    /// Gestalt's time, in microseconds.
    pub ours_us: f64,
    /// The floor's, in microseconds.
    pub floor_us: f64,
    /// The first by the second.
    pub ratio: f64,
    /// The most that the ratio should be, where there is a goal.
    pub goal: Option<f64>,
    /// The 99th percentile of Gestalt's time, where single operations were timed.
    pub ours_p99_us: Option<f64>,
}

impl Row {
    /// Whether the row has a goal and misses it.
    pub fn misses_goal(&self) -> bool {
        self.goal.is_some_and(|goal| self.ratio > goal)
    }
}

/// The rows as a table.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:34} {:10} {:9} {:>9} {:>9} {:>7} {:>6}\n",
        "operation", "transport", "polling", "ours us", "floor us", "ratio", "goal"
    );
    for row in rows {
        let goal = row.goal.map_or(String::new(), |goal| format!("{goal:.2}"));
        let verdict = if row.misses_goal() { "  missed" } else { "" };
        text += &format!(
            "{:34} {:10} {:9} {:9.3} {:9.3} {:7.2} {goal:>6}{verdict}\n",
            row.op, row.transport, row.polling, row.ours_us, row.floor_us, row.ratio
        );
    }
    text
}

/// The file `name` in the workspace's `target/report`.
///
/// # Errors
/// The folder cannot be made.
pub fn path(name: &str) -> Result<PathBuf> {
    let workspace = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let folder = workspace.parent().context("the workspace has no folder")?.join("target/report");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder.join(name))
}

/// Writes `value` as JSON to `target/report/<name>.json`.
///
/// # Errors
/// The file cannot be written.
pub fn write(name: &str, value: &impl Serialize) -> Result<PathBuf> {
    let path = path(&format!("{name}.json"))?;
    let text = serde_json::to_string_pretty(value)? + "\n";
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Median and 99th percentile of times in nanoseconds, as microseconds. Zeroes for no times.
pub fn quantiles(times: &mut [u64]) -> (f64, f64) {
    times.sort_unstable();
    let at = |share: usize| times.get(times.len() * share / 100).map_or(0.0, |&ns| ns as f64 / 1000.0);
    (at(50), at(99))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_sorted_times() {
        let mut times: Vec<u64> = (0..100).rev().map(|i| i * 1000).collect();
        assert_eq!(quantiles(&mut times), (50.0, 99.0));
        assert_eq!(quantiles(&mut []), (0.0, 0.0));
    }

    #[test]
    fn a_missed_goal_shows_in_the_table() {
        let mut row = Row {
            op: "read miss".into(),
            transport: "tcp".into(),
            polling: "busy".into(),
            ours_us: 14.0,
            floor_us: 10.0,
            ratio: 1.4,
            goal: Some(1.3),
            ours_p99_us: None,
        };
        assert!(table(&[row.clone()]).contains("missed"));
        row.ratio = 1.2;
        assert!(!table(&[row]).contains("missed"));
    }
}

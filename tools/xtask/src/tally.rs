//! The tally of `cargo xtask test`: counts, failures, and where the time went.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;
use testbed::rig::Rig;

use crate::scenarios;
use crate::skips::{self, Expected, Skip};

/// Parts that the closing table names one by one; what is quicker is added up in its last line.
const SHOWN: usize = 20;

/// `target/report/test.json`.
#[derive(Default, Serialize)]
pub struct Tally {
    /// Tests that passed.
    pub passed: usize,
    /// Tests that failed.
    pub failed: usize,
    /// Tests that lacked something on this host, none of which counts as passed.
    pub skipped: Vec<Skip>,
    /// Tests that `cargo test` left out because they are marked to be run by hand (`--ignored`).
    pub ignored: usize,
    /// Whether guests ran on emulated hosts; `None` when no guest was booted.
    pub emulated: Option<bool>,
    /// How long all of it took.
    pub seconds: f64,
    /// How long each part took, in the order in which they ran.
    pub parts: Vec<Part>,
    /// What each guest boot came to.
    pub guests: Vec<GuestResult>,
    /// What was booted again because the emulator ran stale code.
    pub reruns: Vec<String>,
    /// A sentence for each failure that is neither a guest's nor one of `cargo test`'s.
    pub findings: Vec<String>,
}

/// A part of the run and how long it took.
#[derive(Serialize)]
pub struct Part {
    name: String,
    seconds: f64,
}

/// What one guest boot came to.
#[derive(Serialize)]
pub struct GuestResult {
    name: String,
    seconds: f64,
    failure: Option<String>,
}

impl Tally {
    /// Notes how long a part took.
    pub fn took(&mut self, name: impl Into<String>, time: Duration) {
        self.parts.push(Part { name: name.into(), seconds: time.as_secs_f64() });
    }

    /// Runs a part and notes how long it took.
    pub fn time<T>(&mut self, name: &str, run: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = run();
        self.took(name, begin.elapsed());
        result
    }

    /// Runs one check as a test.
    pub fn check(&mut self, name: &str, run: impl FnOnce() -> Result<()>) {
        match self.time(name, run) {
            Ok(()) => {
                self.passed += 1;
                println!("ok: {name}");
            }
            Err(error) => {
                self.failed += 1;
                eprintln!("FAILED: {name}: {error:#}");
                self.findings.push(format!("{name}: {error:#}"));
            }
        }
    }

    /// Runs one guest boot as a test.
    pub fn guest<T>(&mut self, name: &str, rig: &mut Rig, run: impl Fn(&Rig) -> Result<T>) {
        let begin = Instant::now();
        let result = scenarios::on_live_hosts(name, rig, &mut self.reruns, run);
        let failure = result.err().map(|error| format!("{error:#}"));
        match failure {
            None => self.passed += 1,
            Some(_) => self.failed += 1,
        }
        self.took(format!("guest: {name}"), begin.elapsed());
        self.guests.push(GuestResult { name: name.into(), seconds: begin.elapsed().as_secs_f64(), failure });
    }

    /// Notes a part that lacks something on this host.
    pub fn skip(&mut self, name: &str, why: &str) {
        self.skipped.push(Skip { test: format!("xtask: {name}"), why: why.into() });
    }

    /// Makes a failure of each skip that is not expected.
    pub fn judge_skips(&mut self, expected: &Expected) {
        let findings = expected.findings(&self.skipped);
        self.failed += findings.len();
        self.findings.extend(findings);
    }

    /// Prints where the time went, the failures, and the counts in a line that ends the run.
    pub fn print(&self) {
        print!("{}", self.times());
        for guest in &self.guests {
            if let Some(failure) = &guest.failure {
                println!("failed: {}: {}", guest.name, failure.lines().next().unwrap_or_default());
            }
        }
        for failure in &self.findings {
            println!("failed: {failure}");
        }
        if self.ignored > 0 {
            println!("{} tests take minutes each and run with `cargo test -- --ignored` only", self.ignored);
        }
        for rerun in &self.reruns {
            println!("BOOTED AGAIN: {rerun}");
        }
        for Skip { test, why } in &self.skipped {
            println!("skipped: {test}: {why}");
        }
        println!("{}", self.counts());
    }

    /// The line that ends the run.
    fn counts(&self) -> String {
        format!("{} passed, {} failed, {} skipped", self.passed, self.failed, skips::count(&self.skipped))
    }

    /// A line for each of the slowest parts, slowest first.
    fn times(&self) -> String {
        let mut parts: Vec<&Part> = self.parts.iter().collect();
        parts.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        let named: f64 = self.parts.iter().map(|part| part.seconds).sum();
        let (slow, quick) = parts.split_at(parts.len().min(SHOWN));
        let line = |seconds: f64, name: &str| format!("{seconds:8.1} s  {name}\n");
        let mut text = line(self.seconds, "in all");
        text.extend(slow.iter().map(|part| line(part.seconds, &part.name)));
        if !quick.is_empty() {
            let rest: f64 = quick.iter().map(|part| part.seconds).sum();
            text.push_str(&line(rest, &format!("{} quicker parts", quick.len())));
        }
        text.push_str(&line((self.seconds - named).max(0.0), "between them"));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_part_comes_first_and_all_time_is_accounted_for() {
        let mut tally = Tally { seconds: 100.0, ..Tally::default() };
        for n in 1..=(SHOWN as u64 + 2) {
            tally.took(format!("part {n}"), Duration::from_secs(n % 5));
        }
        tally.took("slow", Duration::from_secs(40));
        let text = tally.times();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 1 + SHOWN + 2);
        assert!(lines[0].ends_with("100.0 s  in all"), "{text}");
        assert!(lines[1].ends_with("40.0 s  slow"), "{text}");
        assert!(lines[SHOWN + 1].ends_with("3 quicker parts"), "{text}");
        let seconds = |line: &str| line.trim().split(' ').next().unwrap().parse::<f64>().unwrap();
        assert_eq!(lines[1..].iter().map(|line| seconds(line)).sum::<f64>(), 100.0);
    }

    #[test]
    fn what_is_skipped_counts_for_itself_and_fails_unless_it_is_expected() {
        let mut tally = Tally::default();
        tally.check("good", || Ok(()));
        tally.skip("a guest over RDMA", "this host has no adapter");
        assert_eq!(tally.counts(), "1 passed, 0 failed, 1 skipped");
        tally.judge_skips(&Expected::parse("xtask: a guest over RDMA").unwrap());
        assert_eq!(tally.counts(), "1 passed, 0 failed, 1 skipped");
        tally.judge_skips(&Expected::parse("").unwrap());
        assert_eq!(tally.counts(), "1 passed, 1 failed, 1 skipped");
        assert!(tally.findings[0].contains("a guest over RDMA skipped (this host has no adapter)"));
    }

    #[test]
    fn a_check_that_fails_is_counted_and_said() {
        let mut tally = Tally::default();
        tally.check("good", || Ok(()));
        tally.check("bad", || anyhow::bail!("no"));
        assert_eq!((tally.passed, tally.failed), (1, 1));
        assert_eq!(tally.findings, ["bad: no"]);
        assert_eq!(tally.parts.len(), 2);
    }
}

//! Tests that skip: they lack something on this host, say so, and show nothing.
//!
//! A test says it by a line `skipped: REASON` on its output. `cargo test -- --show-output` prints what
//! passing tests have said behind their results, each under a line with its name:
//!
//! ```text
//! ---- qcow2::tests::other_programs_agree stdout ----
//! skipped: qemu-img is not installed
//! ```
//!
//! `expected-skips.txt` beside this crate lists those of the development machine; another one is a failure
//! there, because something has stopped being tested.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

/// A test that skipped, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skip {
    /// The test, with the program that it is in: `fabric (tests/rdma.rs): two_ports`.
    pub test: String,
    /// What it lacks, in its words.
    pub why: String,
}

/// Reads the output of test programs for skips, line by line.
#[derive(Default)]
pub struct Reader {
    test: Option<String>,
}

impl Reader {
    /// Takes a line; what was skipped, if it says so.
    pub fn line(&mut self, program: &str, line: &str) -> Option<Skip> {
        if let Some(test) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.test = Some(test.to_owned());
        } else if line == "successes:" || line == "failures:" || line.starts_with("test result: ") {
            self.test = None;
        }
        let (_, why) = line.split_once("skipped: ")?;
        let test = self.test.as_deref()?;
        Some(Skip { test: format!("{program}: {test}"), why: why.to_owned() })
    }
}

/// How many tests these are: one may say several times what it lacks.
pub fn count(skips: &[Skip]) -> usize {
    skips.iter().map(|skip| &skip.test).collect::<BTreeSet<_>>().len()
}

/// The tests that are expected to skip on the development machine. A line that ends in `*` is for all that
/// begin so.
pub struct Expected(BTreeSet<String>);

impl Expected {
    /// Reads `expected-skips.txt`.
    ///
    /// # Errors
    /// The file cannot be read, or a line in it makes no sense.
    pub fn read() -> Result<Expected> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("expected-skips.txt");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Expected::parse(&text).with_context(|| format!("reading {}", path.display()))
    }

    pub(crate) fn parse(text: &str) -> Result<Expected> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let mut tests = BTreeSet::new();
        for line in lines {
            ensure!(line.contains(": "), "{line:?} is not of the form `PROGRAM: TEST`");
            ensure!(tests.insert(line.to_owned()), "{line:?} is listed twice");
        }
        Ok(Expected(tests))
    }

    fn lists(line: &str, test: &str) -> bool {
        line.strip_suffix('*').map_or(line == test, |begin| test.starts_with(begin))
    }

    /// A sentence for each skip that is not expected.
    pub fn findings(&self, skips: &[Skip]) -> Vec<String> {
        let mut seen = BTreeSet::new();
        let listed = |test: &str| self.0.iter().any(|line| Expected::lists(line, test));
        let unexpected = skips.iter().filter(|skip| !listed(&skip.test) && seen.insert(&skip.test));
        unexpected
            .map(|Skip { test, why }| {
                format!(
                    "{test} skipped ({why}), which tools/xtask/expected-skips.txt does not list: give it what it lacks, \
                     or on another machine say --any-skips"
                )
            })
            .collect()
    }

    /// The lines for which nothing skipped.
    pub fn needless(&self, skips: &[Skip]) -> Vec<&str> {
        let skipped = |line: &&str| skips.iter().any(|skip| Expected::lists(line, &skip.test));
        self.0.iter().map(String::as_str).filter(|line| !skipped(line)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
running 3 tests
test a::runs ... ok
test a::lacks ... ok

successes:

---- a::lacks stdout ----
skipped: no qemu-img
and more
skipped: no mke2fs

---- a::runs stdout ----
nothing is said to be skipped here

successes:
    a::lacks
    a::runs

test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.20s
skipped: said by nobody
";

    fn skips() -> Vec<Skip> {
        let mut reader = Reader::default();
        OUTPUT.lines().filter_map(|line| reader.line("p (src/lib.rs)", line)).collect()
    }

    #[test]
    fn a_skip_is_known_by_its_test_and_its_reason() {
        let skip = |why: &str| Skip { test: "p (src/lib.rs): a::lacks".into(), why: why.into() };
        assert_eq!(skips(), [skip("no qemu-img"), skip("no mke2fs")]);
        assert_eq!(count(&skips()), 1);
    }

    #[test]
    fn a_skip_that_is_not_listed_is_a_failure_once() {
        let listed = Expected::parse("# none of these\n\np (src/lib.rs): a::lacks\n").unwrap();
        assert!(listed.findings(&skips()).is_empty());
        assert!(Expected::parse("p (src/lib.rs): a::*").unwrap().findings(&skips()).is_empty());
        let other = Expected::parse("p (src/lib.rs): a::runs").unwrap();
        let findings = other.findings(&skips());
        assert_eq!(findings.len(), 1);
        assert!(findings[0].starts_with("p (src/lib.rs): a::lacks skipped (no qemu-img), which "));
        assert_eq!(other.needless(&skips()), ["p (src/lib.rs): a::runs"]);
    }

    #[test]
    fn a_list_that_makes_no_sense_is_refused_and_the_one_of_the_tree_does() {
        assert!(Expected::parse("a::lacks").is_err());
        assert!(Expected::parse("p: a\np: a").is_err());
        Expected::read().unwrap();
    }
}

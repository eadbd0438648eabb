//! `cargo test` over the workspace, its summaries added up and its time told by test program.

use std::io::{self, BufRead, BufReader};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use testbed::artifacts::workspace;
use testbed::exec;

use crate::skips::{self, Reader};
use crate::tally::Tally;

/// Runs every test of the workspace and adds what its test programs say to `tally`.
///
/// # Errors
/// Something does not compile, or a test program ended without a summary.
pub fn run(tally: &mut Tally) -> Result<()> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.args(["test", "--workspace", "--no-fail-fast", "--", "--show-output"]).current_dir(workspace());
    // Cargo names a program on standard error, and what the program says follows on standard output: one pipe
    // for both keeps them in order.
    let (output, writer) = io::pipe().context("making a pipe")?;
    command.stdout(writer.try_clone()?).stderr(writer);
    let begin = Instant::now();
    let mut child = exec::tether(&mut command).spawn().context("running cargo")?;
    // Its ends of the pipe, or it would never be at its end.
    drop(command);
    let (mut failed, mut reader, mut skipped) = (0, Reader::default(), Vec::new());
    let (mut program, mut first) = (String::from("a program"), None);
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        if let Some(name) = program_named(&line) {
            first.get_or_insert_with(Instant::now);
            program = name;
        }
        skipped.extend(reader.line(&program, &line));
        let Some(summary) = summary(&line) else { continue };
        tally.took(format!("tests of {program}"), summary.time);
        // Who skips ends as if it had passed.
        tally.passed += summary.passed.saturating_sub(skips::count(&skipped));
        tally.skipped.append(&mut skipped);
        tally.failed += summary.failed;
        tally.ignored += summary.ignored;
        failed += summary.failed;
    }
    tally.took("compiling the tests", first.map_or(begin.elapsed(), |first| first - begin));
    let status = child.wait()?;
    if !status.success() && failed == 0 {
        bail!(
            "`cargo test --workspace` failed: something does not compile, or a test program died; see above"
        );
    }
    Ok(())
}

/// What a test program says at its end.
#[derive(Debug, PartialEq)]
struct Summary {
    passed: usize,
    failed: usize,
    ignored: usize,
    time: Duration,
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.20s`.
fn summary(line: &str) -> Option<Summary> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |word: &str| counts.split("; ").find_map(|part| part.strip_suffix(word)?.trim().parse().ok());
    let time = counts.split("; ").find_map(|part| part.strip_prefix("finished in ")?.strip_suffix('s'));
    Some(Summary {
        passed: count("passed")?,
        failed: count("failed")?,
        ignored: count("ignored")?,
        time: time?.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())?,
    })
}

/// The test program of a line such as `     Running tests/engine.rs (target/debug/deps/engine-5f0c)` or
/// `   Doc-tests fabric`.
fn program_named(line: &str) -> Option<String> {
    let line = line.trim_start();
    if let Some(name) = line.strip_prefix("Doc-tests ") {
        return Some(format!("{name}'s documentation"));
    }
    let (source, binary) = line.strip_prefix("Running ")?.split_once(" (")?;
    let binary = binary.strip_suffix(')')?.rsplit('/').next()?;
    let (name, _hash) = binary.rsplit_once('-')?;
    Some(format!("{name} ({})", source.trim_start_matches("unittests ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_of_test_programs_are_read() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.25s";
        let read = Summary { passed: 12, failed: 3, ignored: 1, time: Duration::from_millis(1250) };
        assert_eq!(summary(line), Some(read));
        assert_eq!(summary("test a::b ... ok"), None);
    }

    #[test]
    fn the_names_of_test_programs_are_read() {
        let unit = "     Running unittests src/lib.rs (target/debug/deps/fabric-0123456789abcdef)";
        assert_eq!(program_named(unit).as_deref(), Some("fabric (src/lib.rs)"));
        let own = "     Running tests/engine.rs (target/debug/deps/engine-0123456789abcdef)";
        assert_eq!(program_named(own).as_deref(), Some("engine (tests/engine.rs)"));
        assert_eq!(program_named("   Doc-tests fabric").as_deref(), Some("fabric's documentation"));
        assert_eq!(program_named("   Compiling fabric v0.1.0"), None);
    }
}

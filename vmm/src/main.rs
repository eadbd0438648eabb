//! The `gestalt` command.
fn main() {}

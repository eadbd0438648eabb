//! A panic of a node's main thread ends the node, and the coordinator has its message. A program of its own,
//! because tests run on other threads.

use std::io::Write;
use std::process::{Command, exit};
use std::time::Duration;

use crossbeam::channel::unbounded;
use machine::control::{Control, Outgoing, ToCoordinator};
use vmm::node::panics;

/// Set in the child.
const CHILD: &str = "GESTALT_TEST_MAIN_PANICS";

fn main() {
    if std::env::var_os(CHILD).is_some() {
        child();
    }
    let output = Command::new(std::env::current_exe().unwrap()).env(CHILD, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let expected = "COORDINATOR: a mistake in this program: its thread \"main\" panicked at ";
    assert!(said.starts_with(expected) && said.contains("injected"), "{said}");
    // As the test harness says it.
    println!(
        "\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s"
    );
}

fn child() -> ! {
    let (control, end) = Control::pair();
    let (events, _happened) = unbounded();
    panics::end_node(&control, &events, Duration::from_secs(30));
    std::thread::spawn(move || {
        for outgoing in end.from_node {
            match outgoing {
                Outgoing::Message(ToCoordinator::Failed { why, .. }) => {
                    let mut out = std::io::stdout().lock();
                    writeln!(out, "COORDINATOR: {why}").and_then(|()| out.flush()).unwrap();
                }
                Outgoing::Flush(done) => drop(done.send(())),
                _ => {}
            }
        }
        exit(9);
    });
    panic!("injected");
}

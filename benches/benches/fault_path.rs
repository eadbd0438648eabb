//! The cost of a page fault that another node must answer, beside the floor of this host: see
//! `benches::fault_path`.
//!
//! `cargo bench -p benches --bench fault_path -- [--rounds N] [--tcp] [--tcp-plain] [--tcp-rails]
//! [--in-process] [--busy] [--blocking]`

use std::time::Instant;

use anyhow::Result;
use benches::choice::{Choice, Net};
use benches::fault_path::cell::Kind;
use benches::fault_path::command::Side;
use benches::fault_path::plan::Plan;
use benches::fault_path::{home, peers, phases};
use benches::report::Row;
use benches::{place, plot, report};
use coherence::uffd::Uffd;
use serde::Serialize;

#[derive(Serialize)]
struct Report {
    cpu: String,
    cpus: usize,
    rounds: usize,
    seconds: f64,
    rows: Vec<Row>,
    phases: Vec<phases::Phase>,
    left_out: Vec<String>,
    /// The host's setting for huge pages in shared memory.
    shmem_enabled: String,
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.peek().is_some_and(|first| first == peers::NODE) {
        return peers::obey();
    }
    let Some(choice) = Choice::read(arguments)? else { return Ok(()) };
    let rounds = choice.rounds;
    if let Err(why) = Uffd::open() {
        println!("skipped: {why}");
        return Ok(());
    }
    let begin = Instant::now();
    let plan = Plan { choice, cpus: place::cpus() };
    let (mut rows, left_out) =
        plan.run(&mut |what| eprintln!("{:6.1} s  {what}", begin.elapsed().as_secs_f64()))?;
    let mut steps = Vec::new();
    if plan.choice.nets.contains(&Net::Tcp) {
        let polling = plan.choice.pollings[0];
        let kind = Kind {
            side: Side::Ours,
            net: Net::Tcp,
            polling,
            nodes: 2,
            hold_us: 100,
            ship: false,
            copies: None,
        };
        steps = phases::measure(kind, &plan.cpus)?;
        println!("where the time goes, tcp, {}:\n{}", polling.name(), phases::table(&steps));
    }
    let (local, shmem_enabled) = home::measure(rounds + 2)?;
    rows.extend(local);
    println!("{}, {} CPUs", place::cpu_model(), plan.cpus.len());
    println!("{}", report::table(&rows));
    println!("huge pages for shared memory: {shmem_enabled}");
    left_out.iter().for_each(|what| println!("not measured: {what}"));
    let picture = plot::svg("page faults that another node answers: time by the floor's", &rows);
    std::fs::write(report::path("fault_path.svg")?, picture)?;
    let seconds = begin.elapsed().as_secs_f64();
    let (cpu, cpus) = (place::cpu_model(), plan.cpus.len());
    let report = Report { cpu, cpus, rounds, seconds, rows, phases: steps, left_out, shmem_enabled };
    let path = report::write("fault_path", &report)?;
    println!("{} ({seconds:.0} s)", path.display());
    Ok(())
}

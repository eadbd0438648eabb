//! The cost of passing on a word that CPUs of several nodes write: see `benches::handover`.
//!
//! `cargo bench -p benches --bench handover -- [--rounds N] [--tcp] [--tcp-plain] [--tcp-rails]
//! [--in-process] [--busy] [--blocking]`
//!
//! Over sealed TCP, unless told otherwise.

use std::time::Instant;

use anyhow::Result;
use benches::choice::{Choice, Net};
use benches::fault_path::peers;
use benches::handover::plan::{self, Detail, Plan};
use benches::report::Row;
use benches::{place, plot, report};
use serde::Serialize;

#[derive(Serialize)]
struct Report {
    cpu: String,
    cpus: usize,
    rounds: usize,
    seconds: f64,
    rows: Vec<Row>,
    details: Vec<Detail>,
    left_out: Vec<String>,
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.peek().is_some_and(|first| first == peers::NODE) {
        return peers::obey();
    }
    let Some(mut choice) = Choice::read(arguments)? else { return Ok(()) };
    if choice.nets == Net::ALL {
        choice.nets = vec![Net::Tcp];
    }
    if let Err(why) = tests::cpl3::host() {
        println!("skipped: {why}");
        return Ok(());
    }
    let begin = Instant::now();
    let (cpu, rounds) = (place::cpu_model(), choice.rounds);
    let plan = Plan { choice, cpus: place::cpus(), variants: plan::VARIANTS.to_vec() };
    let measured = plan.run(&mut |what| eprintln!("{:6.1} s  {what}", begin.elapsed().as_secs_f64()))?;
    println!("{cpu}, {} CPUs; the floor is a bare round trip of 64 bytes", plan.cpus.len());
    println!("{}\nfor each operation:\n{}", report::table(&measured.rows), plan::table(&measured.details));
    measured.left_out.iter().for_each(|what| println!("not measured: {what}"));
    let picture = plot::svg("operations on shared words: time by a round trip of 64 bytes", &measured.rows);
    std::fs::write(report::path("handover.svg")?, picture)?;
    let seconds = begin.elapsed().as_secs_f64();
    let plan::Measured { rows, details, left_out } = measured;
    let report = Report { cpu, cpus: plan.cpus.len(), rounds, seconds, rows, details, left_out };
    println!("{} ({seconds:.0} s)", report::write("handover", &report)?.display());
    Ok(())
}

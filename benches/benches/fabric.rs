//! Round trips, throughput and messages a second of the fabric, beside bare sockets: see `benches::fabric`.
//!
//! `cargo bench -p benches --bench fabric -- [--rounds N] [--tcp] [--tcp-plain] [--tcp-rails] [--in-process]
//! [--busy] [--blocking]`

use std::time::Instant;

use anyhow::Result;
use benches::choice::Choice;
use benches::fabric::measure;
use benches::fabric::plan::Plan;
use benches::report::Row;
use benches::{place, report};
use serde::Serialize;

#[derive(Serialize)]
struct Report {
    cpus: usize,
    rounds: usize,
    seconds: f64,
    /// To seal and to open 4 KiB, in microseconds.
    cipher_us: f64,
    rows: Vec<Row>,
}

fn main() -> Result<()> {
    let Some(choice) = Choice::read(std::env::args().skip(1))? else { return Ok(()) };
    let rounds = choice.rounds;
    let begin = Instant::now();
    let plan = Plan { choice, cpus: place::cpus() };
    let cipher_us = measure::cipher(4096, 20 * rounds)?;
    let rows = plan.run(&mut |what| eprintln!("{:6.1} s  {what}", begin.elapsed().as_secs_f64()))?;
    println!("{}", report::table(&rows));
    println!("to seal and to open 4 KiB takes the cipher {cipher_us:.3} us");
    let (seconds, cpus) = (begin.elapsed().as_secs_f64(), plan.cpus.len());
    let path = report::write("fabric", &Report { cpus, rounds, seconds, cipher_us, rows })?;
    println!("{} ({seconds:.0} s)", path.display());
    Ok(())
}

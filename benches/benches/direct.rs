//! A device's loads and stores of another node's memory, beside bare messages: see `benches::direct`.
//!
//! `cargo bench -p benches --bench direct -- [--rounds N]`

use anyhow::Result;
use benches::choice::Choice;
use benches::direct::Measured;
use benches::report::Row;
use benches::{direct, place, report};
use serde::Serialize;

#[derive(Serialize)]
struct Report {
    cpu: String,
    rounds: usize,
    measured: Vec<Measured>,
}

fn main() -> Result<()> {
    let Some(choice) = Choice::read(std::env::args().skip(1))? else { return Ok(()) };
    let measured = direct::run(choice.rounds, &place::cpus())?;
    let rows: Vec<Row> = measured.iter().map(|measured| measured.row.clone()).collect();
    println!("{}", report::table(&rows));
    for Measured { row, copies_of_a_page } in &measured {
        println!("{}: {copies_of_a_page:.2} copies of a page", row.op);
    }
    let report = Report { cpu: place::cpu_model(), rounds: choice.rounds, measured };
    println!("{}", report::write("direct", &report)?.display());
    Ok(())
}

//! Round trips, throughput and messages a second of the fabric, beside bare sockets: see `benches::fabric`.
//!
//! `cargo bench -p benches --bench fabric -- [--rounds N] [--tcp] [--tcp-plain] [--tcp-rails] [--in-process] [--busy]
//! [--blocking]`

use std::time::Instant;

use anyhow::{Result, bail};
use benches::fabric::end::Net;
use benches::fabric::plan::Plan;
use benches::fault_path::command::Polling;
use benches::report::Row;
use benches::{place, report};
use serde::Serialize;

#[derive(Serialize)]
struct Report {
    cpus: usize,
    rounds: usize,
    seconds: f64,
    rows: Vec<Row>,
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (mut nets, mut pollings, mut rounds, mut measure) = (Vec::new(), Vec::new(), 3, false);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--rounds" => rounds = arguments.next().unwrap_or_default().parse()?,
            "--tcp" => nets.push(Net::Tcp),
            "--tcp-plain" => nets.push(Net::TcpPlain),
            "--tcp-rails" => nets.push(Net::TcpRails),
            "--in-process" => nets.push(Net::InProcess),
            "--busy" => pollings.push(Polling::Busy),
            "--blocking" => pollings.push(Polling::Blocking),
            // What `cargo bench` adds, and `cargo test --all-targets` does not.
            "--bench" => measure = true,
            other => bail!("{other}: expected --rounds N, a transport such as --tcp, --busy or --blocking"),
        }
    }
    if !measure {
        println!("nothing is measured without --bench, which `cargo bench` adds");
        return Ok(());
    }
    if nets.is_empty() {
        nets = Net::ALL.to_vec();
    }
    if pollings.is_empty() {
        pollings = vec![Polling::Busy, Polling::Blocking];
    }
    let begin = Instant::now();
    let plan = Plan { nets, pollings, rounds, cpus: place::cpus() };
    let rows = plan.run(&mut |what| eprintln!("{:6.1} s  {what}", begin.elapsed().as_secs_f64()))?;
    println!("{}", report::table(&rows));
    let (seconds, cpus) = (begin.elapsed().as_secs_f64(), plan.cpus.len());
    let path = report::write("fabric", &Report { cpus, rounds, seconds, rows })?;
    println!("{} ({seconds:.0} s)", path.display());
    Ok(())
}

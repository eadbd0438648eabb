//! What a page fault costs that another node must answer, beside the floor of this host: see
//! `benches::fault_path`.
//!
//! `cargo bench -p benches --bench fault_path -- [--rounds N] [--tcp] [--tcp-plain] [--tcp-rails] [--in-process] [--busy] [--blocking]`

use std::time::Instant;

use anyhow::{Result, bail};
use benches::fault_path::cell::{Kind, Net};
use benches::fault_path::command::{Polling, Side};
use benches::fault_path::plan::Plan;
use benches::fault_path::{home, peers, phases};
use benches::report::Row;
use benches::{place, plot, report};
use coherence::uffd::Uffd;
use serde::Serialize;

#[derive(Serialize)]
struct Report {
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
    let (mut nets, mut pollings, mut rounds) = (Vec::new(), Vec::new(), 3);
    let mut measure = false;
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
            other => {
                bail!(
                    "{other}: expected --rounds N, --tcp, --tcp-plain, --tcp-rails, --in-process, --busy or --blocking"
                )
            }
        }
    }
    if !measure {
        println!("nothing is measured without --bench, which `cargo bench` adds");
        return Ok(());
    }
    if let Err(why) = Uffd::open() {
        println!("skipped: {why}");
        return Ok(());
    }
    if nets.is_empty() {
        nets = vec![Net::Tcp, Net::TcpPlain, Net::TcpRails, Net::InProcess];
    }
    if pollings.is_empty() {
        pollings = vec![Polling::Busy, Polling::Blocking];
    }
    let begin = Instant::now();
    let plan = Plan { nets, pollings, rounds, cpus: place::cpus() };
    let (mut rows, left_out) =
        plan.run(&mut |what| eprintln!("{:6.1} s  {what}", begin.elapsed().as_secs_f64()))?;
    let mut steps = Vec::new();
    if plan.nets.contains(&Net::Tcp) {
        let polling = plan.pollings[0];
        let kind = Kind { side: Side::Ours, net: Net::Tcp, polling, nodes: 2, hold_us: 100, copies: None };
        steps = phases::measure(kind, &plan.cpus)?;
        println!("where the time goes, tcp, {}:\n{}", polling.name(), phases::table(&steps));
    }
    let (local, shmem_enabled) = home::measure(rounds + 2)?;
    rows.extend(local);
    println!("{}", report::table(&rows));
    println!("huge pages for shared memory: {shmem_enabled}");
    left_out.iter().for_each(|what| println!("not measured: {what}"));
    let picture = plot::svg("page faults that another node answers: time by the floor's", &rows);
    std::fs::write(report::path("fault_path.svg")?, picture)?;
    let seconds = begin.elapsed().as_secs_f64();
    let cpus = plan.cpus.len();
    let report = Report { cpus, rounds, seconds, rows, phases: steps, left_out, shmem_enabled };
    let path = report::write("fault_path", &report)?;
    println!("{} ({seconds:.0} s)", path.display());
    Ok(())
}

//! The fabric over RDMA beside perftest on the same port, in the same run.
//!
//! `cargo bench -p benches --bench rdma -- [--rounds N] [--count N] [--busy] [--blocking] [--out FILE]`
//!
//! Needs an active RDMA port and the package perftest. Each row is the best of `--rounds` runs of `--count`
//! messages, taken in turns with its floor. Latencies are half a round trip.

use anyhow::{Context, Result, bail};
use benches::perftest::Run;
use benches::rdma::{Side, one_way, round_trips};
use benches::report::{self, Row, quantiles};
use fabric::rdma::{RdmaSettings, check_library, ports};

/// A page with its head.
const PAGE: usize = 4112;

struct Bench {
    device: String,
    gid: Option<u8>,
    rounds: usize,
    count: usize,
    rows: Vec<Row>,
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (mut pollings, mut rounds, mut count) = (Vec::new(), 3, 1000);
    let (mut measure, mut out) = (false, None);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--rounds" => rounds = arguments.next().unwrap_or_default().parse()?,
            "--count" => count = arguments.next().unwrap_or_default().parse()?,
            "--busy" => pollings.push(false),
            "--blocking" => pollings.push(true),
            "--out" => out = Some(arguments.next().context("--out FILE")?),
            // What `cargo bench` adds, and `cargo test --all-targets` does not.
            "--bench" => measure = true,
            other => bail!("{other}: expected --rounds N, --count N, --busy, --blocking or --out FILE"),
        }
    }
    if !measure {
        println!("nothing is measured without --bench, which `cargo bench` adds");
        return Ok(());
    }
    if let Err(why) = check_library() {
        println!("skipped: {why}");
        return Ok(());
    }
    let ports = ports();
    let Some(port) = ports.iter().find(|port| port.is_active()) else {
        println!("skipped: this host has no active RDMA port");
        return Ok(());
    };
    if pollings.is_empty() {
        pollings = vec![false, true];
    }
    let gid = port.best_gid().filter(|_| port.ethernet).map(|gid| gid.index);
    let mut bench = Bench { device: port.device.clone(), gid, rounds, count, rows: Vec::new() };
    for blocking in pollings {
        bench.measure(blocking)?;
    }
    println!("{}", report::table(&bench.rows));
    match out {
        Some(file) => std::fs::write(file, serde_json::to_string_pretty(&bench.rows)? + "\n")?,
        None => println!("{}", report::write("rdma", &bench.rows)?.display()),
    }
    Ok(())
}

impl Bench {
    fn run<'a>(&'a self, program: &'a str, size: usize, blocking: bool) -> Run<'a> {
        Run { program, device: &self.device, gid: self.gid, size, count: self.count, blocking }
    }

    fn measure(&mut self, blocking: bool) -> Result<()> {
        let settings = RdmaSettings {
            device: Some(self.device.clone()),
            gid_index: self.gid,
            ..RdmaSettings::default()
        };
        for size in [64, 1024, PAGE] {
            let (mut ours, mut floor) = ((f64::MAX, 0.0), f64::MAX);
            for _ in 0..self.rounds {
                let mut times = round_trips(&mut Side::pair(&settings, blocking)?, size, size, self.count)?;
                let (median, p99) = quantiles(&mut times);
                ours = if median / 2.0 < ours.0 { (median / 2.0, p99 / 2.0) } else { ours };
                floor = floor.min(self.run("ib_send_lat", size, blocking).latency()?.typical);
            }
            self.row(
                format!("half a round trip of {size} B / ib_send_lat"),
                blocking,
                ours.0,
                floor,
                Some(1.2),
            );
            self.p99(ours.1);
        }
        let (mut ours, mut floor) = ((f64::MAX, 0.0), f64::MAX);
        for _ in 0..self.rounds {
            let mut times = round_trips(&mut Side::pair(&settings, blocking)?, 16, PAGE, self.count)?;
            let (median, p99) = quantiles(&mut times);
            ours = if median < ours.0 { (median, p99) } else { ours };
            floor = floor.min(self.run("ib_read_lat", 4096, blocking).latency()?.typical);
        }
        // The floor is one-sided: nobody at the other end has to look.
        self.row("a page for 16 B / ib_read_lat".into(), blocking, ours.0, floor, None);
        self.p99(ours.1);
        // Programs that write have no way to sleep.
        let programs = [("ib_send_bw", PAGE), ("ib_write_bw", 4096)];
        for (program, size) in &programs[..if blocking { 1 } else { 2 }] {
            let size = *size;
            let (mut ours, mut floor) = (f64::MAX, f64::MAX);
            for _ in 0..self.rounds {
                ours = ours.min(one_way(&mut Side::pair(&settings, blocking)?, PAGE, 4 * self.count)?);
                floor = floor.min(self.run(program, size, blocking).per_message()?);
            }
            self.row(format!("a page one way / {program}"), blocking, ours, floor, Some(1.0 / 0.9));
        }
        Ok(())
    }

    fn row(&mut self, op: String, blocking: bool, ours_us: f64, floor_us: f64, goal: Option<f64>) {
        let polling = if blocking { "blocking" } else { "busy" };
        eprintln!("{op}, {polling}: {ours_us:.1} us, floor {floor_us:.1} us");
        self.rows.push(Row {
            op,
            transport: "rdma".into(),
            polling: polling.into(),
            ours_us,
            floor_us,
            ratio: ours_us / floor_us,
            goal,
            ours_p99_us: None,
        });
    }

    fn p99(&mut self, p99: f64) {
        if let Some(row) = self.rows.last_mut() {
            row.ours_p99_us = Some(p99);
        }
    }
}

//! The cost to a device of reading and overwriting another node's pages, beside the bare exchange of the same
//! bytes between two threads, and how often a page is copied for it.
//!
//! ```text
//!   the device's thread    its node's shard              the home's shard
//!   Engine::store ───────> Store + bytes, 64 times ────> Overwrite, Stored ──> back
//!   floor:                 64 messages as long ────────> 64 as long as Stored
//! ```

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use coherence::engine::{Load, Store};
use coherence::page::{PAGE_SIZE, Page};
use serde::Serialize;
use tests::engines::Engines;

use crate::choice::Net;
use crate::fabric::{end, measure};
use crate::fault_path::command::Polling;
use crate::report::{Row, quantiles};

/// Pages of a request: what a disk has between itself and the guest at once.
const PAGES: usize = 64;
/// Requests of one measurement.
const REQUESTS: usize = 500;
/// Bytes of a message without a page.
const HEAD: usize = 16;

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// The time of a request.
    pub row: Row,
    /// Copies of a page between device and transport, and between transport and frame, beside its landing.
    pub copies_of_a_page: f64,
}

/// Measures stores and loads, the best of so many rounds, ours and the floor's in turn.
///
/// # Errors
/// This host's userfaultfd cannot serve, or something fails.
pub fn run(rounds: usize, cpus: &[usize]) -> Result<Vec<Measured>> {
    let machine = Engines::start(&[PAGES as u64; 2], 1, Duration::ZERO)?;
    let whole = HEAD + PAGE_SIZE;
    // Stores first, so that there is something to load.
    [("store", [whole, HEAD]), ("load", [HEAD, whole])]
        .into_iter()
        .map(|(op, sizes)| {
            let before = copied(&machine)?;
            let (mut ours_us, mut floor_us) = (f64::INFINITY, f64::INFINITY);
            for _ in 0..rounds {
                ours_us = ours_us.min(requests(&machine, op == "store")?);
                let ends = end::floor(Net::InProcess, Polling::Blocking)?;
                floor_us = floor_us.min(measure::exchange(ends, cpus, PAGES, sizes, REQUESTS)?);
            }
            let copies = (copied(&machine)? - before) as f64;
            let row = Row {
                op: format!("{op}, {PAGES} pages"),
                transport: Net::InProcess.name().into(),
                polling: "blocking".into(),
                ours_us,
                floor_us,
                ratio: ours_us / floor_us,
                goal: None,
                ours_p99_us: None,
            };
            Ok(Measured { row, copies_of_a_page: copies / (rounds * REQUESTS * PAGES) as f64 })
        })
        .collect()
}

/// The median time of a request of a device of node 0 for memory of node 1, in microseconds.
fn requests(machine: &Engines, store: bool) -> Result<f64> {
    let mut buffer = vec![[7; PAGE_SIZE]; PAGES];
    let page = |at: usize| Page((PAGES + at) as u64);
    let mut times = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        let began = Instant::now();
        let done = if store {
            let stores = buffer.iter().enumerate().map(|(at, from)| Store { page: page(at), from });
            machine.engine(0).store(&stores.collect::<Vec<_>>())
        } else {
            let loads = buffer.iter_mut().enumerate().map(|(at, to)| Load { page: page(at), offset: 0, to });
            machine.engine(0).load(loads.collect())
        };
        times.push(began.elapsed().as_nanos() as u64);
        ensure!(done.iter().all(|done| *done), "not every page was at the other node");
    }
    Ok(quantiles(&mut times).0)
}

fn copied(machine: &Engines) -> Result<u64> {
    Ok(machine.at_rest()?.iter().map(|node| node.copied).sum())
}

//! The accesses of simulated CPUs: mostly to popular pages or the node's own, now and then to page after
//! page, and at times of all CPUs to one page.

use super::Config;
use super::random::{Random, Zipf};
use crate::page::{Homes, Page};

/// An access that a CPU is about to do.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Access {
    pub page: Page,
    pub write: bool,
    /// Whether it is what an instruction does to a few bytes, which may be shipped.
    pub operates: bool,
    /// How long after the CPU's last access it comes, in nanoseconds.
    pub think: u64,
}

/// Accesses one after the other, page by page.
#[derive(Clone, Debug, Default)]
struct Scan {
    next: u64,
    left: u64,
    write: bool,
}

/// The accesses of all CPUs.
pub struct Workload {
    zipf: Zipf,
    /// The popular page of each rank, for all; pages are shuffled so that homes share the load.
    shuffled: Vec<u64>,
    /// By node: ranks of its own pages.
    near: Vec<Zipf>,
    homes: Homes,
    scans: Vec<Scan>,
    cpus: usize,
    /// Accesses left in which everybody wants one page, and the page.
    burst: (u64, Page),
    writes: u16,
    locality: u16,
    operations: u16,
}

impl Workload {
    /// The accesses of a machine; `random` decides which pages are popular.
    pub fn new(config: &Config, homes: &Homes, random: &mut Random) -> Workload {
        let pages = homes.pages();
        let mut shuffled: Vec<u64> = (0..pages).collect();
        for i in (1..pages).rev() {
            shuffled.swap(i as usize, random.below(i + 1) as usize);
        }
        let near = |n| Zipf::new(homes.range(fabric::NodeId(n as u16)).count() as u64);
        Workload {
            zipf: Zipf::new(pages),
            shuffled,
            near: (0..config.nodes).map(near).collect(),
            homes: homes.clone(),
            scans: vec![Scan::default(); config.nodes * config.cpus],
            cpus: config.cpus,
            burst: (0, Page(0)),
            writes: config.writes,
            locality: config.locality,
            operations: config.operations,
        }
    }

    /// A page that somebody may want.
    pub fn popular(&self, random: &mut Random) -> Page {
        Page(self.shuffled[self.zipf.draw(random) as usize])
    }

    /// What a CPU does next.
    pub fn next(&mut self, node: usize, cpu: usize, random: &mut Random) -> Access {
        let scan = &mut self.scans[node * self.cpus + cpu];
        if scan.left > 0 {
            let page = Page(scan.next);
            (scan.next, scan.left) = ((scan.next + 1) % self.homes.pages(), scan.left - 1);
            return Access { page, write: scan.write, operates: false, think: random.around(500) };
        }
        if self.burst.0 > 0 {
            self.burst.0 -= 1;
            let (write, operates) = (random.per_mille(self.writes), random.per_mille(self.operations));
            return Access { page: self.burst.1, write, operates, think: 0 };
        }
        let write = random.per_mille(self.writes);
        let think = random.around(2_000);
        match random.below(20_000) {
            0 => self.burst = (self.scans.len() as u64 * 8, self.popular(random)),
            1..40 => {
                let left = 16 + random.below(240);
                let scan = &mut self.scans[node * self.cpus + cpu];
                *scan = Scan { next: random.below(self.homes.pages()), left, write };
            }
            _ => {}
        }
        let own = self.homes.range(fabric::NodeId(node as u16));
        let page = if !own.is_empty() && random.per_mille(self.locality) {
            Page(own.start + self.near[node].draw(random))
        } else {
            self.popular(random)
        };
        Access { page, write, operates: random.per_mille(self.operations), think }
    }
}

//! `cargo xtask soak`: many boots in a row, other shapes of machine, killed nodes.

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;
use testbed::artifacts;
use testbed::machine::Machine;
use testbed::rig::Rig;
use testbed::stale::{StaleCode, Whose};

use crate::options::Options;
use crate::rails::{self, Trial};
use crate::report;
use crate::scenarios::{self, LOSS_LIMIT, Plan, Scenario, announce};

/// Flags of the task.
#[derive(Args)]
pub struct Soak {
    #[command(flatten)]
    options: Options,
    /// How many boots in a row, power-off each
    #[arg(long, default_value_t = 20)]
    boots: u32,
    /// Boot one node with 2 CPUs, and 2 CPUs beside a node of memory, in turn, in place of the machine
    /// described: quick boots, to count kernels that the emulator kills
    #[arg(long)]
    in_turn: bool,
    /// Run smp-check in each of these boots
    #[arg(long)]
    check: bool,
    /// How many times to boot and kill a node at a random moment
    #[arg(long, default_value_t = 0)]
    kills: u32,
    /// Also boot the other shapes of machine, the other kernels, and over two hosts
    #[arg(long)]
    shapes: bool,
    /// Of all these, only what has this in its name
    #[arg(long)]
    only: Option<String>,
    /// How many times to cut and restore a rail, of two, under a guest on two emulated hosts
    #[arg(long, default_value_t = 0)]
    rails: usize,
    /// Show the consoles of the guests
    #[arg(long)]
    console: bool,
    /// Seed of the random moments; printed, so that a run can be repeated
    #[arg(long)]
    seed: Option<u64>,
}

/// `target/report/soak.json`.
#[derive(Default, Serialize)]
struct Report {
    emulated: bool,
    nodes: usize,
    hosts: usize,
    seed: u64,
    boots: Vec<BootResult>,
    kills: Vec<BootResult>,
    shapes: Vec<BootResult>,
    /// The rails that were cut, if any were to be.
    rails: Option<Trial>,
    /// Median seconds to user space with all CPUs of the boots.
    boot_median_seconds: Option<f64>,
    /// The same of a machine of one node with as much of everything, on the same hosts, when shapes were
    /// booted.
    one_node_boot_seconds: Option<f64>,
    /// The first divided by the second.
    ratio_to_one_node: Option<f64>,
    /// The longest that the rest of a machine took to end after the loss of a node.
    longest_loss_seconds: Option<f64>,
    /// Boots in which the emulator killed a host's kernel by stale code; they count as failed.
    host_stale_code: usize,
    /// Boots in which it killed the guest's kernel so; they count as failed.
    guest_stale_code: usize,
    failed: usize,
}

#[derive(Serialize)]
struct BootResult {
    name: String,
    #[serde(skip)]
    stale: Option<Whose>,
    boot_seconds: Option<f64>,
    loss_seconds: Option<f64>,
    failure: Option<String>,
}

impl Soak {
    /// Does the task.
    ///
    /// # Errors
    /// A boot fails.
    pub fn run(&self) -> Result<()> {
        self.options.refuse_bochs()?;
        let machine = self.options.machine()?;
        report::forget("soak")?;
        let seed = self.seed.unwrap_or_else(nanos);
        let mut random = Random(seed);
        let plan = || if self.check { Plan::Whole } else { Plan::Quick };
        let mut boots: Vec<Scenario> = (1..=self.boots)
            .map(|n| {
                let machine = match self.in_turn {
                    false => machine.clone(),
                    true if n % 2 == 1 => Machine::equal(1, 2, 512),
                    true => scenarios::with_memory_node(),
                };
                Scenario::new(format!("boot {n} of {}", self.boots), machine, plan())
            })
            .collect();
        let mut kills: Vec<Scenario> = (1..=self.kills)
            .map(|n| {
                let node = random.below(machine.nodes.len() as u64) as usize;
                let after_ms = random.below(4000);
                let name = format!("kill {n} of {}: n{node} after {after_ms} ms", self.kills);
                Scenario::new(name, machine.clone(), Plan::Kill { node, after_ms })
            })
            .collect();
        let mut shapes = Vec::new();
        if self.shapes {
            let alone = Machine { hosts: 1, ..one_node(&machine) };
            // Three times, for a median.
            shapes.extend((0..3).map(|_| Scenario::new(ONE_NODE, alone.clone(), plan())));
            shapes.extend(scenarios::shapes());
            shapes.push(scenarios::devices_of_all());
            shapes.push(scenarios::budgets());
            shapes.push(scenarios::hot_plug());
            shapes.extend(scenarios::kernels());
        }
        let mut two_hosts =
            if self.shapes { vec![scenarios::two_hosts(), scenarios::two_hosts_over_rdma()] } else { vec![] };
        if let Some(only) = &self.only {
            for list in [&mut boots, &mut kills, &mut shapes, &mut two_hosts] {
                list.retain(|scenario| scenario.name.contains(only.as_str()));
            }
        }
        let none = [&boots, &kills, &shapes, &two_hosts].into_iter().all(Vec::is_empty) && self.rails == 0;
        ensure!(
            !none,
            "nothing is to be done: ask for --boots, --kills, --shapes or --rails, and for a name that there is"
        );
        let binaries = artifacts::build()?;
        let mut report = Report { seed, ..Report::default() };
        let all: Vec<&Machine> =
            boots.iter().chain(&kills).chain(&shapes).map(|scenario| &scenario.machine).collect();
        if !all.is_empty() {
            let mut rig = Rig::start(&self.options.rig(&all), &binaries)?;
            report.emulated = rig.emulated().is_some();
            eprintln!("soak: hosts are {}, seed {seed}", kind_of_hosts(report.emulated));
            report.boots = run_all(boots, &mut rig, self.console)?;
            report.kills = run_all(kills, &mut rig, self.console)?;
            report.shapes = run_all(shapes, &mut rig, self.console)?;
        }
        if !two_hosts.is_empty() {
            let machines: Vec<&Machine> = two_hosts.iter().map(|scenario| &scenario.machine).collect();
            let mut rig = Rig::start(&self.options.rig(&machines), &binaries)?;
            report.emulated |= rig.emulated().is_some();
            report.shapes.extend(run_all(two_hosts, &mut rig, self.console)?);
        }
        if self.rails > 0 {
            let machine = rails::machine(machine.rdma);
            let rig = Rig::start(&self.options.rig(&[&machine]), &binaries)?;
            report.emulated |= rig.emulated().is_some();
            report.rails = Some(rails::run(&rig, &machine, self.rails));
        }
        report.conclude(&machine);
        report.print();
        println!("written to {}", report::write("soak", &report)?.display());
        ensure!(report.failed == 0, "{} of the boots failed", report.failed);
        Ok(())
    }
}

const ONE_NODE: &str = "one node with as much of everything";

/// The same CPUs and memory in one node.
fn one_node(machine: &Machine) -> Machine {
    Machine { kernel: machine.kernel, ..Machine::equal(1, machine.cpus(), machine.memory_mib()) }
}

fn kind_of_hosts(emulated: bool) -> &'static str {
    if emulated { "EMULATED" } else { "real" }
}

/// Runs one after another; where a host is gone or its emulator failed, new ones are booted for the next.
/// Nothing is run twice: what fails counts.
fn run_all(scenarios: Vec<Scenario>, rig: &mut Rig, show: bool) -> Result<Vec<BootResult>> {
    let mut entries = Vec::new();
    for scenario in scenarios {
        let scenario = Scenario { show, ..scenario };
        let result = announce(&scenario.name, || scenario.run(rig));
        let times = result.as_ref().copied().unwrap_or_default();
        let stale = result.as_ref().err().and_then(|error| error.downcast_ref::<StaleCode>());
        entries.push(BootResult {
            name: scenario.name.clone(),
            stale: stale.map(|stale| stale.whose),
            boot_seconds: times.boot_seconds,
            loss_seconds: times.loss_seconds,
            failure: result.as_ref().err().map(|error| format!("{error:#}")),
        });
        if stale.is_some() || result.is_err() && !rig.alive() {
            eprintln!("soak: new hosts are booted");
            rig.renew()?;
        }
    }
    Ok(entries)
}

impl Report {
    /// Fills in what follows from the entries.
    fn conclude(&mut self, machine: &Machine) {
        (self.nodes, self.hosts) = (machine.nodes.len(), machine.hosts);
        self.boot_median_seconds = median(self.boots.iter().filter_map(|entry| entry.boot_seconds));
        let alone = self.shapes.iter().filter(|entry| entry.name == ONE_NODE);
        self.one_node_boot_seconds = median(alone.filter_map(|entry| entry.boot_seconds));
        self.ratio_to_one_node =
            self.boot_median_seconds.zip(self.one_node_boot_seconds).map(|(many, one)| many / one);
        self.longest_loss_seconds = self.kills.iter().filter_map(|entry| entry.loss_seconds).reduce(f64::max);
        let killed: Vec<Whose> = self.entries().filter_map(|entry| entry.stale).collect();
        self.guest_stale_code = killed.iter().filter(|whose| **whose == Whose::Guest).count();
        self.host_stale_code = killed.len() - self.guest_stale_code;
        self.failed = self.failures().count();
    }

    fn entries(&self) -> impl Iterator<Item = &BootResult> {
        self.boots.iter().chain(&self.kills).chain(&self.shapes)
    }

    /// What went wrong, by name.
    fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        let boots = self.entries().filter_map(|entry| Some((entry.name.as_str(), entry.failure.as_deref()?)));
        let rails = self.rails.iter().filter_map(|trial| Some(("cut rails", trial.failure.as_deref()?)));
        boots.chain(rails)
    }

    fn print(&self) {
        let good = |entries: &[BootResult]| entries.iter().filter(|entry| entry.failure.is_none()).count();
        println!("hosts are {}", kind_of_hosts(self.emulated));
        if !self.boots.is_empty() {
            println!("{} of {} boots went well", good(&self.boots), self.boots.len());
        }
        if let Some(seconds) = self.boot_median_seconds {
            println!("  median {seconds:.1} s to user space with all CPUs");
        }
        if let Some(ratio) = self.ratio_to_one_node {
            println!("  {ratio:.2} times as long as one node with as much of everything");
        }
        if !self.kills.is_empty() {
            let longest = self.longest_loss_seconds.unwrap_or_default();
            println!("{} of {} killed nodes were noticed and named", good(&self.kills), self.kills.len());
            println!("  the rest ended {longest:.2} s later at most (limit {} s)", LOSS_LIMIT.as_secs());
        }
        if !self.shapes.is_empty() {
            println!("{} of {} other machines booted", good(&self.shapes), self.shapes.len());
        }
        if let Some(trial) = &self.rails {
            trial.print();
        }
        println!(
            "killed by stale code of the emulator: {} hosts' kernels, {} guests' kernels; {} failures of other kinds",
            self.host_stale_code,
            self.guest_stale_code,
            self.failed - self.host_stale_code - self.guest_stale_code
        );
        for (name, failure) in self.failures() {
            println!("failed: {name}: {}", failure.lines().next().unwrap_or_default());
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// A seed that nobody chose.
fn nanos() -> u64 {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since_epoch.unwrap_or_default().as_nanos() as u64
}

/// SplitMix64: moments to kill at need no better randomness, only to be repeatable.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([].into_iter()), None);
    }

    #[test]
    fn a_seed_repeats_its_moments() {
        let draw = |seed| {
            let mut random = Random(seed);
            [random.below(4000), random.below(4000), random.below(2)]
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }
}

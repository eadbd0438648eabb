//! Options that the tasks which boot machines have in common.

use anyhow::{Result, bail};
use clap::Args;
use testbed::kernels::Kernel;
use testbed::machine::{Machine, Node};
use testbed::options::Emulate;
use testbed::rig::{Emulator, RigConfig};

/// What carries frames between nodes.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fabric {
    /// TCP.
    #[default]
    Tcp,
    /// InfiniBand or RoCE.
    Rdma,
}

/// The machine to boot, and the hosts to boot it on.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// How many nodes
    #[arg(long, default_value_t = 2, conflicts_with = "node")]
    pub nodes: usize,
    /// CPUs of each node; 2 if not given, and 1 in Bochs
    #[arg(long, conflicts_with = "node")]
    pub cpus: Option<u32>,
    /// Memory of each node in MiB
    #[arg(long, default_value_t = 512, conflicts_with = "node", value_parser = mebibytes)]
    pub memory: u32,
    /// One node as CPUS:MIB, such as 2:512; give it once per node (0:512 has memory only)
    #[arg(long)]
    pub node: Vec<Node>,
    /// Over how many hosts to spread the nodes; more than one are emulated hosts on an emulated network
    #[arg(long, default_value_t = 1)]
    pub hosts: usize,
    /// The guest's kernel: trixie-cloud, trixie or bookworm-cloud
    #[arg(long, default_value = "trixie-cloud")]
    pub kernel: Kernel,
    /// What the nodes talk over; emulated hosts get soft-RoCE
    #[arg(long, value_enum, default_value_t)]
    pub fabric: Fabric,
    /// Whether instructions go to pages that stay at another node, as `gestalt run --ship` takes it
    #[arg(long, value_parser = ["off", "auto", "always"])]
    pub ship: Option<String>,
    /// CPUs of each emulated host; 2 if not given, and 1 in Bochs, which emulates CPUs one after the other
    #[arg(long)]
    pub host_cpus: Option<u32>,
    /// Emulate the hosts even if this machine has VMX or SVM: with QEMU, which has AMD's SVM, or one Intel
    /// host, with VMX, in Bochs
    #[arg(long, num_args = 0..=1, default_missing_value = "amd", value_name = "PROCESSOR")]
    pub emulate: Option<Emulate>,
    /// On an Intel host in Bochs, let EPT keep accessed and dirty bits (kvm_intel eptad=1)
    #[arg(long, requires = "emulate")]
    pub eptad: bool,
}

impl Options {
    /// The default machine; hosts emulated where they need be, or if asked for.
    pub fn for_tests(emulate: bool) -> Self {
        Self {
            nodes: 2,
            cpus: None,
            memory: 512,
            node: vec![],
            hosts: 1,
            kernel: Kernel::TrixieCloud,
            fabric: Fabric::Tcp,
            ship: None,
            host_cpus: None,
            emulate: emulate.then_some(Emulate::Amd),
            eptad: false,
        }
    }

    /// The machine that they describe.
    ///
    /// # Errors
    /// No such machine is possible.
    pub fn machine(&self) -> Result<Machine> {
        let mut machine = Machine::equal(self.nodes, self.cpus.unwrap_or(self.usual_cpus()), self.memory);
        if !self.node.is_empty() {
            machine.nodes.clone_from(&self.node);
        }
        if machine.nodes.is_empty() {
            bail!("--nodes 0 is no machine: give 1 or more");
        }
        if self.hosts == 0 || self.hosts > machine.nodes.len() {
            bail!(
                "{} nodes cannot be spread over {} hosts: --hosts takes 1 to {}",
                machine.nodes.len(),
                self.hosts,
                machine.nodes.len()
            );
        }
        if matches!(self.emulator(), Some(Emulator::Bochs(_)))
            && (self.hosts > 1 || self.fabric == Fabric::Rdma)
        {
            bail!("there is one host in Bochs, without RDMA: leave --hosts and --fabric out");
        }
        machine.hosts = self.hosts;
        machine.kernel = self.kernel;
        machine.rdma = self.fabric == Fabric::Rdma;
        machine.flags.extend(self.ship.iter().flat_map(|mode| ["--ship".to_owned(), mode.clone()]));
        Ok(machine)
    }

    /// What emulates the hosts, if that is asked for.
    pub fn emulator(&self) -> Option<Emulator> {
        self.emulate.map(|emulate| emulate.emulator(self.eptad))
    }

    /// CPUs of a host, and of a node, unless the user says otherwise: Bochs emulates all of them one after
    /// the other.
    fn usual_cpus(&self) -> u32 {
        match self.emulator() {
            Some(Emulator::Bochs(_)) => 1,
            _ => 2,
        }
    }

    /// For tasks that a host in Bochs cannot do: it has no disks and no network, and takes its time.
    ///
    /// # Errors
    /// One is asked for.
    pub fn refuse_bochs(&self) -> Result<()> {
        match self.emulator() {
            Some(Emulator::Bochs(_)) => {
                bail!("only `quickstart` without --disk runs in Bochs: give --emulate amd")
            }
            _ => Ok(()),
        }
    }

    /// Hosts on which all of `machines` can be booted, one after the other.
    pub fn rig(&self, machines: &[&Machine]) -> RigConfig {
        let mut config = RigConfig { emulate: self.emulator(), kernels: vec![], ..RigConfig::default() };
        config.hardware.cpus = self.host_cpus.unwrap_or(self.usual_cpus());
        config.hardware.memory_mib =
            machines.iter().map(|machine| machine.host_memory_mib()).max().unwrap_or(0);
        config.hardware.networks = 1 + machines.iter().map(|machine| machine.rails).max().unwrap_or(0);
        config.hardware.rdma = machines.iter().any(|machine| machine.rdma);
        config.hosts = machines.iter().map(|machine| machine.hosts).max().unwrap_or(1);
        for machine in machines {
            if !config.kernels.contains(&machine.kernel) {
                config.kernels.push(machine.kernel);
            }
        }
        config
    }
}

/// Reads `512`, `512M` or `2G` as MiB.
///
/// # Errors
/// The text is none of these.
pub fn mebibytes(text: &str) -> Result<u32, String> {
    let wrong = || format!("{text:?} is not a size: give MiB, or a number with M or G");
    let (number, factor) = match text.strip_suffix('G') {
        Some(number) => (number, 1024),
        None => (text.strip_suffix('M').unwrap_or(text), 1),
    };
    number.parse::<u32>().ok().and_then(|number| number.checked_mul(factor)).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!([mebibytes("512"), mebibytes("512M"), mebibytes("2G")], [Ok(512), Ok(512), Ok(2048)]);
        assert!(mebibytes("1T").is_err() && mebibytes("").is_err() && mebibytes("9999999G").is_err());
    }
}

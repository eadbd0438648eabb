//! The machines that tests boot: their nodes, on which hosts, and the machine file that says so.

use std::str::FromStr;

use crate::kernels::Kernel;
use crate::rack::Rack;

/// Memory of an emulated host beyond that of its nodes, in MiB: its own system, the programs, page tables.
const HOST_MIB: u32 = 1200;

/// Where every host of a machine of several hosts has the machine's key.
pub const KEY: &str = "/run/gestalt-test.key";

/// One node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// CPUs; 0 for a memory-only node.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
}

impl FromStr for Node {
    type Err = String;

    /// Reads `CPUS:MIB`, such as `2:512`.
    fn from_str(text: &str) -> Result<Self, String> {
        let parts =
            text.split_once(':').and_then(|(cpus, mib)| Some((cpus.parse().ok()?, mib.parse().ok()?)));
        let (cpus, memory_mib) = parts.ok_or(format!("{text:?} is not CPUS:MIB, such as 2:512"))?;
        Ok(Self { cpus, memory_mib })
    }
}

/// A machine to boot.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its nodes; node i is called `n<i>`.
    pub nodes: Vec<Node>,
    /// Over how many hosts the nodes are spread, in order; at most as many as there are nodes.
    pub hosts: usize,
    /// The nodes that have a disk each, in order: disk i is an empty file on its host.
    pub disks: Vec<usize>,
    /// Disk 0 holds kernel and initramfs, and the machine file names none.
    pub boots_from_disk: bool,
    /// A disk of node 0, beside the others, with a whole system that is booted: its path on the first host.
    pub system: Option<String>,
    /// Further flags of `gestalt run`.
    pub flags: Vec<String>,
    /// The nodes that have a network card each, in order: card i is TAP interface `gestalt<i>` of its host,
    /// which has the address 10.9.i.1; the guest takes 10.9.i.2.
    pub cards: Vec<usize>,
    /// Pairs of queues of each card.
    pub card_queues: u32,
    /// Whether it has a balloon.
    pub balloon: bool,
    /// The guest's kernel.
    pub kernel: Kernel,
    /// What the guest does, in order: see `files/guest-init.sh`.
    pub actions: String,
    /// Whether the nodes talk over RDMA; over TCP if not.
    pub rdma: bool,
    /// What each node may spend on the guest, in MiB. The kernel sees to it as well: every node is then a
    /// process of its own, in a control group with so much memory and [`PROGRAM_MIB`] more.
    pub budget_mib: Option<u32>,
    /// Of how many rails each node has one address: networks beside the hosts' first, which is the
    /// coordinator's. With 0 the first network is all there is.
    pub rails: usize,
}

/// What a node's program itself may need, beside its budget for the guest.
pub const PROGRAM_MIB: u32 = 48;

impl Machine {
    /// `count` equal nodes on one host.
    pub fn equal(count: usize, cpus: u32, memory_mib: u32) -> Self {
        Self {
            nodes: vec![Node { cpus, memory_mib }; count],
            hosts: 1,
            disks: Vec::new(),
            boots_from_disk: false,
            system: None,
            flags: Vec::new(),
            cards: Vec::new(),
            card_queues: 1,
            balloon: false,
            kernel: Kernel::TrixieCloud,
            actions: "report,smp-check,poweroff".into(),
            rdma: false,
            budget_mib: None,
            rails: 0,
        }
    }

    /// All CPUs.
    pub fn cpus(&self) -> u32 {
        self.nodes.iter().map(|node| node.cpus).sum()
    }

    /// How many nodes have CPUs.
    pub fn nodes_with_cpus(&self) -> usize {
        self.nodes.iter().filter(|node| node.cpus > 0).count()
    }

    /// All memory in MiB.
    pub fn memory_mib(&self) -> u32 {
        self.nodes.iter().map(|node| node.memory_mib).sum()
    }

    /// The host of node `index`.
    pub fn host_of(&self, index: usize) -> usize {
        index * self.hosts / self.nodes.len()
    }

    /// Memory in MiB that an emulated host needs for the nodes it gets.
    pub fn host_memory_mib(&self) -> u32 {
        let on = |host| {
            let here = (0..self.nodes.len()).filter(|&index| self.host_of(index) == host);
            here.map(|index| self.nodes[index].memory_mib).sum::<u32>()
        };
        (0..self.hosts).map(on).max().unwrap_or(0) + HOST_MIB
    }

    /// The machine file, with kernel and initramfs below `guest`, a directory of the host.
    ///
    /// On `emulated` hosts the kernel starts one CPU and user space the others. While it boots the kernel
    /// patches itself, and other CPUs that run meanwhile may be served stale code: see [`crate::stale`]. And
    /// such hosts emulate AMD's nested paging, where a page-table walk needs its pages writable, so that
    /// nodes share page tables at the speed of the fabric. Until the kernel has stopped the ticks of idle
    /// CPUs, every tick on every node does so. For the same reason a whole system keeps to the first node,
    /// except for what is started elsewhere on purpose.
    pub fn file(&self, guest: &str, emulated: bool) -> String {
        let several = self.nodes_with_cpus() > 1;
        // A whole system has nothing that would start other CPUs.
        let late = match self.system {
            None => emulated && self.cpus() > 1,
            Some(_) => emulated && several,
        };
        let late = if late { ("maxcpus=1 ", "online,") } else { ("", "") };
        let actions = match self.system {
            None => format!("gestalt.run={}{}", late.1, self.actions),
            Some(_) if !late.0.is_empty() => self.apart(),
            Some(_) => String::new(),
        };
        let mut text =
            format!("name = \"test\"\ncmdline = \"console=ttyS0 nowatchdog {}{actions}\"\n", late.0);
        if !self.boots_from_disk && self.system.is_none() {
            let kernel = self.kernel.name();
            text += &format!("kernel = \"{guest}/{kernel}\"\ninitrd = \"{guest}/initramfs\"\n");
        }
        if emulated {
            // Bringing the pages that a tick touches takes longer than a tick there: the guest would do
            // nothing but handle ticks.
            text += "timer_rest = 8\n";
        }
        if self.rdma {
            text += "fabric = \"rdma\"\n";
        }
        if self.has_joining_nodes() {
            text += &format!("listen = \"{}\"\nkey = \"{KEY}\"\n", self.join_address());
        }
        for (index, node) in self.nodes.iter().enumerate() {
            let place = if self.joins(index) { "remote" } else { "local" };
            text += &format!(
                "\n[[node]]\nname = \"n{index}\"\ncpus = {}\nmemory = \"{}M\"\nwhere = \"{place}\"\n",
                node.cpus, node.memory_mib
            );
            if let Some(mib) = self.budget_mib {
                text += &format!("budget = \"{mib}M\"\n");
            }
            if self.hosts == 1 && self.joins(index) {
                text += "fabric = \"127.0.0.1\"\n";
            }
            let rails: Vec<String> =
                (1..=self.rails).map(|rail| Rack::address_on(rail, self.host_of(index))).collect();
            if !rails.is_empty() {
                text += &format!("fabric = {rails:?}\n");
            }
        }
        text + &self.device_entries()
    }

    /// Whether node `index` is not started by `gestalt run` but joins.
    pub fn joins(&self, index: usize) -> bool {
        self.host_of(index) != 0 || self.budget_mib.is_some()
    }

    /// Whether any node joins.
    pub fn has_joining_nodes(&self) -> bool {
        (0..self.nodes.len()).any(|index| self.joins(index))
    }

    /// Words for a kernel whose user space stays on the first node's CPUs unless something asks for others.
    fn apart(&self) -> String {
        let (near, all) = (self.nodes[0].cpus, self.cpus());
        let far = format!("{near}-{}", all - 1);
        format!(
            "isolcpus={far} nohz_full={far} systemd.cpu_affinity=0-{} rcupdate.rcu_cpu_stall_timeout=300",
            near - 1
        )
    }

    /// Where nodes join.
    pub fn join_address(&self) -> String {
        match self.hosts {
            1 => "127.0.0.1:7700".into(),
            _ => format!("{}:7700", Rack::address(0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_spread_over_hosts_in_order() {
        let machine = Machine { hosts: 2, ..Machine::equal(4, 1, 256) };
        assert_eq!((0..4).map(|index| machine.host_of(index)).collect::<Vec<_>>(), [0, 0, 1, 1]);
        let file = machine.file("/g", false);
        assert_eq!(file.matches("remote").count(), 2);
        assert!(file.contains("listen = \"10.77.0.1:7700\""), "{file}");
    }

    #[test]
    fn nodes_with_budgets_join() {
        let machine = Machine { budget_mib: Some(300), ..Machine::equal(2, 1, 256) };
        let file = machine.file("/g", false);
        assert_eq!(file.matches("remote").count(), 2);
        assert_eq!(file.matches("budget = \"300M\"").count(), 2);
        assert!(file.contains("listen = \"127.0.0.1:7700\""), "{file}");
    }

    #[test]
    fn every_node_has_an_address_on_each_rail_and_the_coordinator_keeps_the_first_network() {
        let machine = Machine { hosts: 2, rails: 2, ..Machine::equal(2, 1, 256) };
        let file = machine.file("/g", false);
        assert!(file.contains("listen = \"10.77.0.1:7700\""), "{file}");
        assert!(file.contains("fabric = [\"10.78.0.2\", \"10.79.0.2\"]\n"), "{file}");
    }

    #[test]
    fn a_whole_system_keeps_to_the_first_node_where_hosts_are_emulated() {
        let machine = Machine { system: Some("/dev/vdb".into()), ..Machine::equal(3, 2, 256) };
        let file = machine.file("/g", true);
        assert!(file.contains("isolcpus=2-5 nohz_full=2-5 systemd.cpu_affinity=0-1 "), "{file}");
        assert!(!machine.file("/g", false).contains("isolcpus"));
        assert!(
            !Machine { system: machine.system, ..Machine::equal(1, 2, 256) }
                .file("/g", true)
                .contains("isolcpus")
        );
    }

    #[test]
    fn other_cpus_of_a_guest_on_emulated_hosts_start_when_the_kernel_has_booted() {
        for machine in [Machine::equal(1, 2, 256), Machine::equal(2, 1, 256)] {
            assert!(machine.file("/g", true).contains("maxcpus=1 gestalt.run=online,report,"));
            assert!(!machine.file("/g", false).contains("maxcpus"));
        }
        assert!(!Machine::equal(1, 1, 256).file("/g", true).contains("maxcpus"));
    }

    #[test]
    fn a_host_has_room_for_the_nodes_it_gets() {
        let mut machine = Machine { hosts: 2, ..Machine::equal(3, 1, 256) };
        assert_eq!(machine.host_memory_mib(), 512 + HOST_MIB);
        machine.nodes[2].memory_mib = 1024;
        assert_eq!(machine.host_memory_mib(), 1024 + HOST_MIB);
    }

    #[test]
    fn nodes_are_read_from_text() {
        assert_eq!("2:512".parse(), Ok(Node { cpus: 2, memory_mib: 512 }));
        for bad in ["", "2", "2:", "a:512", "2:512M"] {
            assert!(bad.parse::<Node>().is_err(), "{bad}");
        }
    }
}

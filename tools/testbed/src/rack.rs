//! The emulated rack: one or more emulated hosts, each with a real KVM, on one network or on several.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::host::Host;
use crate::image::HostImage;
use crate::progress::Step;
use crate::qemu::{Hardware, Qemu};
use crate::stage::{IN_HOST, Stage};
use crate::stale::{self, StaleCode, Whose};
use crate::switch::Switch;

/// A host boots in 5 s on an idle machine; on a busy one that took 120 s, and sometimes more than 180.
/// One that dies is noticed at once.
const BOOT_LIMIT: Duration = Duration::from_secs(600);
/// Time that a host gets to power off before it is killed.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(10);
/// Where process 1 of an emulated host copies the programs to.
const PROGRAMS: &str = "/usr/local/bin";
/// Process 1 of an emulated host; it comes from the stage, so that changing it rebuilds no image.
const HOST_INIT: &str = include_str!("../files/host-init.sh");

/// Running emulated hosts. Dropped, they are switched off.
pub struct Rack {
    hosts: Vec<Host>,
    machines: Vec<Qemu>,
    /// By network.
    switches: Vec<Switch>,
    dir: PathBuf,
    image: HostImage,
    hardware: Hardware,
}

impl Rack {
    /// Boots `count` hosts that see `stage`, and waits until all take jobs. The stage's `bin/` must hold the
    /// `testbed` binary, which is their agent. If the emulator kills one by stale code, all are booted once
    /// more.
    ///
    /// # Errors
    /// QEMU is missing or a host does not come up: then the error carries the end of its console.
    pub fn start(image: &HostImage, hardware: &Hardware, count: usize, stage: &Stage) -> Result<Self> {
        Self::boot(image, hardware, count, stage).or_else(|error| {
            let stale = Self::stale_code(stage, count).ok_or(error)?;
            eprintln!("testbed: while the hosts started {stale}: they are started AGAIN");
            Self::boot(image, hardware, count, stage)
        })
    }

    fn boot(image: &HostImage, hardware: &Hardware, count: usize, stage: &Stage) -> Result<Self> {
        let step = Step::start(format!("booting {count} emulated host{}", if count == 1 { "" } else { "s" }));
        let init = stage.path().join("host-init");
        std::fs::write(&init, HOST_INIT)?;
        std::fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let (mut switches, mut cards) = (Vec::new(), (0..count).map(|_| Vec::new()).collect::<Vec<_>>());
        for _ in 0..hardware.networks.max(1) {
            let (switch, ports) = Switch::new(count)?;
            switches.push(switch);
            cards.iter_mut().zip(ports).for_each(|(cards, port)| cards.push(port));
        }
        let mut rack = Self {
            hosts: vec![],
            machines: vec![],
            switches,
            dir: stage.path().to_owned(),
            image: image.clone(),
            hardware: hardware.clone(),
        };
        let mut agents: Vec<UnixStream> = Vec::new();
        for (index, cards) in cards.into_iter().enumerate() {
            let console = rack.console(index);
            let (qemu, agent) = Qemu::start(image, hardware, index, stage.path(), console, cards)?;
            rack.machines.push(qemu);
            agents.push(agent);
        }
        for (index, agent) in agents.into_iter().enumerate() {
            let shared = Some(rack.dir.clone());
            rack.hosts.push(Host::attach(
                format!("h{index}"),
                IN_HOST.into(),
                PROGRAMS.into(),
                shared,
                agent,
            )?);
        }
        for (host, machine) in rack.hosts.iter().zip(&rack.machines) {
            host.wait_ready(BOOT_LIMIT)
                .with_context(|| format!("emulated host; its console ends:\n{}", machine.console_tail()))?;
        }
        step.done();
        Ok(rack)
    }

    /// Switches all hosts off, as far as they still run, and boots as many new ones.
    ///
    /// # Errors
    /// Those of [`Rack::start`]; then there are no hosts.
    pub fn renew(&mut self, stage: &Stage) -> Result<()> {
        let count = self.hosts.len();
        self.switch_off();
        *self = Self::start(&self.image, &self.hardware, count, stage)?;
        Ok(())
    }

    /// The first of `count` hosts of which the kernel died by stale code, by the consoles on `stage`.
    pub fn stale_code(stage: &Stage, count: usize) -> Option<StaleCode> {
        (0..count).find_map(|index| {
            let bytes = std::fs::read(console(stage.path(), index)).ok()?;
            let at = stale::find(&String::from_utf8_lossy(&bytes))?;
            Some(StaleCode { whose: Whose::Host(index), at })
        })
    }

    fn switch_off(&mut self) {
        // All are asked before any is waited for.
        self.hosts.clear();
        for machine in self.machines.drain(..) {
            machine.finish(POWER_OFF_LIMIT);
        }
    }

    /// The hosts, by number.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Address of host `index` on the rack's first network.
    pub fn address(index: usize) -> String {
        Self::address_on(0, index)
    }

    /// Address of host `index` on one of the rack's networks, at most 178 of them.
    pub fn address_on(network: usize, index: usize) -> String {
        format!("10.{}.0.{}", 77 + network, index + 1)
    }

    /// The file on this machine that has what host `index`'s kernel prints.
    pub fn console(&self, index: usize) -> PathBuf {
        console(&self.dir, index)
    }

    /// What host `index`'s kernel, and its QEMU, said last.
    pub fn console_tail(&self, index: usize) -> String {
        self.machines[index].console_tail()
    }

    /// Process id of the QEMU that is host `index`.
    pub fn pid(&self, index: usize) -> u32 {
        self.machines[index].pid()
    }

    /// Pulls the cable of host `index` to a network, or plugs it in again.
    pub fn set_connected(&self, network: usize, index: usize, connected: bool) {
        if let Some(switch) = self.switches.get(network) {
            switch.set_connected(index, connected);
        }
    }
}

impl Drop for Rack {
    fn drop(&mut self) {
        self.switch_off();
    }
}

fn console(dir: &Path, index: usize) -> PathBuf {
    dir.join(format!("console-h{index}.log"))
}

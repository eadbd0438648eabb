//! The rig of a run: the stage with programs and guests, and hosts that see it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::bochs::{BochsHost, Processor};
use crate::cache::Cache;
use crate::host::Host;
use crate::kernels::{self, Kernel};
use crate::qemu::Hardware;
use crate::rack::Rack;
use crate::stage::Stage;
use crate::stale::{self, StaleCode, Whose};
use crate::{drivers, guest, image, probe, setup};

/// How long a host may take to run a command that does nothing.
const ALIVE: Duration = Duration::from_secs(60);

/// What emulates a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulator {
    /// QEMU, with AMD's SVM: hosts on networks, with disks.
    Qemu,
    /// Bochs, with this processor: one host, whose time follows its instructions.
    Bochs(Processor),
}

/// What kind of hosts, and what they find on the stage.
#[derive(Clone, Debug)]
pub struct RigConfig {
    /// How many hosts, at least 1. More than one are always emulated.
    pub hosts: usize,
    /// Emulate even where this machine could run guests itself, with this; QEMU where hosts must be emulated
    /// anyway.
    pub emulate: Option<Emulator>,
    /// An emulated host's hardware.
    pub hardware: Hardware,
    /// Guest kernels to have in `guest/<name>`.
    pub kernels: Vec<Kernel>,
    /// Programs to have in `bin/`, beside `gestalt` and `testbed`.
    pub programs: Vec<PathBuf>,
}

impl Default for RigConfig {
    fn default() -> Self {
        Self {
            hosts: 1,
            emulate: None,
            hardware: Hardware {
                cpus: 2,
                memory_mib: 3000,
                mtu: 4500,
                networks: 1,
                rdma: false,
                disks: vec![],
            },
            kernels: vec![Kernel::TrixieCloud],
            programs: vec![],
        }
    }
}

/// The hosts of a run and their stage.
pub struct Rig {
    // The order matters: hosts end before the stage is removed.
    hosts: Hosts,
    stage: Stage,
    emulated: Option<String>,
}

enum Hosts {
    Here([Host; 1]),
    Emulated(Rack),
    Bochs(Box<BochsHost>),
}

impl Rig {
    /// Sets everything up: packages, images, stage, hosts. `binaries` has the built `gestalt` and `testbed`.
    ///
    /// # Errors
    /// Something cannot be installed, fetched, built or started.
    pub fn start(config: &RigConfig, binaries: &Path) -> Result<Self> {
        let mut emulated = probe::needs_rack();
        if emulated.is_none() && (config.emulate.is_some() || config.hosts > 1) {
            emulated = Some("asked for".into());
        }
        if let Some(Emulator::Bochs(_)) = config.emulate {
            ensure!(config.hosts == 1, "Bochs emulates one host: leave --hosts out");
            emulated = Some("asked for, in Bochs".into());
        }
        setup::ensure(&[setup::TO_COMPILE, setup::TO_FETCH])?;
        match (&emulated, config.emulate) {
            (None, _) => {}
            (_, Some(Emulator::Bochs(_))) => setup::ensure(&[setup::TO_EMULATE_INTEL])?,
            _ => setup::ensure(&[setup::TO_EMULATE])?,
        }
        let cache = Cache::open()?;
        let stage = Stage::new()?;
        for program in ["gestalt", "testbed"].map(|name| binaries.join(name)).iter().chain(&config.programs) {
            let name = program.file_name().unwrap_or_default().to_string_lossy();
            stage.put(program, &format!("bin/{name}"))?;
        }
        let mut initramfs = vec![fs::read(guest::initramfs(&cache)?)?];
        for &kernel in &config.kernels {
            let files = kernels::fetch(&cache, kernel)?;
            stage.put(&files.vmlinuz, &format!("guest/{}", kernel.name()))?;
            initramfs.push(fs::read(files.drivers)?);
        }
        fs::write(stage.path().join("guest/initramfs"), drivers::joined(&initramfs))?;
        let hosts = match (&emulated, config.emulate) {
            (None, _) => Hosts::Here([Host::local(stage.path())?]),
            (_, Some(Emulator::Bochs(processor))) => {
                Hosts::Bochs(Box::new(BochsHost::start(&cache, processor, &config.hardware, &stage)?))
            }
            _ => {
                Hosts::Emulated(Rack::start(&image::build(&cache)?, &config.hardware, config.hosts, &stage)?)
            }
        };
        Ok(Self { hosts, stage, emulated })
    }

    /// Whether all hosts still take jobs.
    pub fn alive(&self) -> bool {
        self.hosts().iter().all(|host| host.output("true", ALIVE).is_ok())
    }

    /// Boots new hosts of QEMU's in place of the old. Where this machine is the host, there is nothing to be
    /// done.
    ///
    /// # Errors
    /// They do not come up; then there are none. Or the host is Bochs's, of which there is only one in a run.
    pub fn renew(&mut self) -> Result<()> {
        match &mut self.hosts {
            Hosts::Here(_) => Ok(()),
            Hosts::Bochs(_) => bail!("a host that Bochs emulates is not replaced: start again"),
            Hosts::Emulated(rack) => rack.renew(&self.stage),
        }
    }

    /// Whose kernel the emulator killed, if it did: a host's, or that of the guest with this console.
    pub fn stale_code(&self, guest: &str) -> Option<StaleCode> {
        let rack = self.rack()?;
        Rack::stale_code(&self.stage, rack.hosts().len())
            .or_else(|| stale::find(guest).map(|at| StaleCode { whose: Whose::Guest, at }))
    }

    /// The hosts, by number.
    pub fn hosts(&self) -> &[Host] {
        match &self.hosts {
            Hosts::Here(host) => host,
            Hosts::Emulated(rack) => rack.hosts(),
            Hosts::Bochs(bochs) => bochs.hosts(),
        }
    }

    /// The emulated rack, if that is what this is.
    pub fn rack(&self) -> Option<&Rack> {
        match &self.hosts {
            Hosts::Emulated(rack) => Some(rack),
            Hosts::Here(_) | Hosts::Bochs(_) => None,
        }
    }

    /// Why the hosts are emulated, or `None` when they are real.
    pub fn emulated(&self) -> Option<&str> {
        self.emulated.as_deref()
    }

    /// What the hosts are doing, for who has to find out why something failed: threads, kernel stacks and
    /// kernel log, and the ends of emulated hosts' consoles, which also tell of a host that is gone.
    pub fn diagnosis(&self) -> String {
        let mut said: Vec<String> = self.hosts().iter().map(Host::diagnosis).collect();
        if let Some(rack) = self.rack() {
            let count = rack.hosts().len();
            said.extend((0..count).map(|i| format!("--- console of h{i} ends\n{}", rack.console_tail(i))));
        }
        if let Hosts::Bochs(bochs) = &self.hosts {
            said.push(format!("--- console of h0 ends\n{}", bochs.console_tail()));
        }
        said.join("\n")
    }

    /// The stage, as this machine sees it.
    pub fn stage(&self) -> &Path {
        self.stage.path()
    }
}

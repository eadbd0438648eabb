//! `testbed`: runs commands on emulated hosts by hand, and is the agent inside them.
//!
//! ```text
//! cargo run -p testbed -- run -- gestalt doctor
//! ```

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Parser, Subcommand};
use testbed::cache::Cache;
use testbed::host::Event;
use testbed::keeper::Keeper;
use testbed::kernels::Kernel;
use testbed::options::Emulate;
use testbed::proto::Spawn;
use testbed::rig::{Rig, RigConfig};
use testbed::terminal::RawTerminal;
use testbed::{agent, artifacts, guest, image, kernels, qemu, setup, terminal};

#[derive(Parser)]
#[command(about = "Hosts to run gestalt on, emulated where this machine cannot be one")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build gestalt, boot hosts, run a shell command on the first one, switch the hosts off
    Run(Run),
    /// Build or fetch all images into the cache
    Images,
    /// Serve jobs inside a host (started by the host itself)
    #[command(hide = true)]
    Agent {
        /// The serial line to the testbed; a virtio port if there is none
        #[arg(long)]
        serial: Option<PathBuf>,
    },
}

#[derive(Args)]
struct Run {
    /// How many hosts
    #[arg(long, default_value_t = 1)]
    hosts: usize,
    /// CPUs of each emulated host
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory of each emulated host in MiB
    #[arg(long, default_value_t = 3000)]
    memory: u32,
    /// Guest kernels to have on the stage (repeatable): trixie-cloud, trixie, bookworm-cloud
    #[arg(long, default_values = ["trixie-cloud"])]
    kernel: Vec<Kernel>,
    /// A further program to copy to every host's PATH (repeatable)
    #[arg(long = "with")]
    with: Vec<PathBuf>,
    /// Take gestalt and testbed from this directory instead of building them
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// Copy what the command left in /gestalt/share to this directory
    #[arg(long)]
    out: Option<PathBuf>,
    /// Seconds until the command is killed
    #[arg(long, default_value_t = 3600)]
    timeout: u64,
    /// Run the command on a terminal of its own (the default when this is run on one)
    #[arg(long)]
    terminal: bool,
    /// Emulate even if this machine has VMX or SVM: with QEMU, which has AMD's SVM, or an Intel host with
    /// Bochs
    #[arg(long, num_args = 0..=1, default_missing_value = "amd", value_name = "PROCESSOR")]
    emulate: Option<Emulate>,
    /// On an Intel host in Bochs, let EPT keep accessed and dirty bits (kvm_intel eptad=1)
    #[arg(long, requires = "emulate")]
    eptad: bool,
    /// Give each emulated host an RDMA device (soft-RoCE)
    #[arg(long)]
    rdma: bool,
    /// A raw image that each emulated host has as /dev/vdb and so on (repeatable); it is not changed
    #[arg(long)]
    disk: Vec<PathBuf>,
    /// Print the consoles of the emulated hosts at the end
    #[arg(long)]
    consoles: bool,
    /// The shell command; in it $G is the stage (guest/trixie-cloud, guest/initramfs, share/)
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Task::Run(run) => run_command(&run),
        Task::Images => images().map(|()| ExitCode::SUCCESS),
        Task::Agent { serial } => serve(serial.as_deref()).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("testbed: {error:#}");
        ExitCode::FAILURE
    })
}

fn images() -> Result<()> {
    setup::ensure(&[setup::TO_COMPILE, setup::TO_FETCH, setup::TO_EMULATE])?;
    let cache = Cache::open()?;
    println!("{}", image::build(&cache)?.root.display());
    println!("{}", guest::initramfs(&cache)?.display());
    for kernel in Kernel::ALL {
        println!("{}", kernels::fetch(&cache, kernel)?.vmlinuz.display());
    }
    Ok(())
}

/// Finds the agent's port and serves it until the testbed is done with this host.
fn serve(serial: Option<&Path>) -> Result<()> {
    if let Some(path) = serial {
        let line = terminal::open_serial(path)?;
        return Ok(agent::serve(line.try_clone()?, line)?);
    }
    let ports = std::fs::read_dir("/sys/class/virtio-ports").context("this is not an emulated host")?;
    for port in ports.flatten() {
        let name = std::fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim() == qemu::AGENT_PORT {
            // Without KVM there is nothing to keep, and `gestalt doctor` says what is wrong.
            let _keeper = Keeper::open();
            let path = PathBuf::from("/dev").join(port.file_name());
            let file = File::options().read(true).write(true).open(&path)?;
            return Ok(agent::serve(file.try_clone()?, file)?);
        }
    }
    bail!("there is no virtio port called {}", qemu::AGENT_PORT);
}

fn run_command(args: &Run) -> Result<ExitCode> {
    let binaries = args.bin_dir.clone().map_or_else(artifacts::build, Ok)?;
    let mut config = RigConfig {
        hosts: args.hosts,
        emulate: args.emulate.map(|emulate| emulate.emulator(args.eptad)),
        kernels: args.kernel.clone(),
        programs: args.with.clone(),
        ..RigConfig::default()
    };
    config.hardware.cpus = args.cpus;
    config.hardware.memory_mib = args.memory;
    config.hardware.rdma = args.rdma;
    config.hardware.disks.clone_from(&args.disk);
    let rig = Rig::start(&config, &binaries)?;
    match rig.emulated() {
        Some(why) => eprintln!("testbed: emulated host ({why})"),
        None => eprintln!("testbed: this machine is the host"),
    }
    let result = run_job(args, &rig).map_err(|error| anyhow!("{error:#}\n{}", rig.diagnosis()));
    if args.consoles {
        for index in 0..rig.rack().map_or(0, |rack| rack.hosts().len()) {
            let path = rig.rack().expect("counted above").console(index);
            eprintln!("--- console of h{index}\n{}", std::fs::read_to_string(path)?);
        }
    }
    if let Some(out) = &args.out {
        let from = rig.stage().join("share/.");
        std::fs::create_dir_all(out)?;
        testbed::exec::run(std::process::Command::new("cp").arg("-a").arg(from).arg(out), None)?;
    }
    result
}

/// Runs `$0` in bash, or in sh on a host that has no bash.
const SHELL: &str = "if command -v bash >/dev/null; then exec bash -c \"$0\"; else exec sh -c \"$0\"; fi";

fn run_job(args: &Run, rig: &Rig) -> Result<ExitCode> {
    let host = &rig.hosts()[0];
    let on_terminal = args.terminal || io::stdin().is_terminal() && io::stdout().is_terminal();
    let terminal = on_terminal.then(|| terminal::size().unwrap_or((24, 80)));
    let stage = host.dir().display().to_string();
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let job = host.spawn(Spawn {
        argv: ["/bin/sh", "-c", SHELL, &args.command.join(" ")].map(String::from).into(),
        env: vec![("PATH".into(), format!("{}:{path}", host.bin().display())), ("G".into(), stage)],
        terminal,
    })?;
    let _raw = terminal.map(|_| RawTerminal::enter()).transpose()?;
    terminal::forward_input(job.input());
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    loop {
        match job.next_until(deadline)? {
            Some(Event::Stdout(bytes)) => {
                io::stdout().write_all(&bytes)?;
                io::stdout().flush()?;
            }
            Some(Event::Stderr(bytes)) => io::stderr().write_all(&bytes)?,
            Some(Event::Exit(code)) => return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1))),
            None => bail!("the command was not finished within {} s and is killed", args.timeout),
        }
    }
}

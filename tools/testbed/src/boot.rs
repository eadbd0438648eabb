//! One boot of a machine, from `gestalt run` to its end, as seen from the guest's console.
//!
//! ```text
//! Boot::start ── GESTALT-MARK userspace ── GESTALT-REPORT ... ── GESTALT-ASK <-> answers ── exit of `gestalt run`
//!                └ boot_seconds                                                          └ Outcome
//! ```

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::host::{Event, Host, HostFile, Input, Job};
use crate::machine::{KEY, Machine, PROGRAM_MIB};
use crate::proto::Spawn;
use crate::report::{Console, Facts, Said};
use crate::rig::Rig;

/// The longest that a healthy guest prints nothing, with plenty for a slow emulated host.
const SILENCE: Duration = Duration::from_secs(100);
/// What a kernel says when it cannot go on.
const DEADLY: [&str; 2] = ["Kernel panic - not syncing", "Oops: "];
/// What may still be printed after a panic's first line.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Last lines of the console that an error carries.
const CONSOLE_LINES: usize = 40;

/// How to run one boot.
#[derive(Clone, Debug)]
pub struct Watch {
    /// The whole boot must be over by then.
    pub limit: Duration,
    /// What to type at each `GESTALT-ASK`, in order.
    pub answers: VecDeque<String>,
    /// Stop watching at this mark (`userspace`), leaving the machine running.
    pub until_mark: Option<String>,
    /// A guest that prints nothing for this long hangs.
    pub silence: Duration,
}

impl Watch {
    /// Until the machine's own end.
    pub fn to_the_end(limit: Duration) -> Self {
        Self { limit, answers: VecDeque::new(), until_mark: None, silence: SILENCE }
    }

    /// Until the guest's first line from user space.
    pub fn until_userspace(limit: Duration) -> Self {
        Self { until_mark: Some("userspace".into()), ..Self::to_the_end(limit) }
    }
}

/// What a boot came to.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Exit code of `gestalt run`; `None` while it still runs.
    pub code: Option<i32>,
    /// What the guest reported; the last value of each key.
    pub facts: Facts,
    /// The marks that were passed, with the time since `gestalt run` was started.
    pub marks: Vec<(String, Duration)>,
    /// All that was said on standard output: the guest's console.
    pub console: String,
    /// All that was said on standard error: `gestalt` itself, and remote nodes.
    pub messages: String,
    /// The counters of `gestalt run --report`, when it wrote them.
    pub counters: Option<Value>,
}

impl Outcome {
    /// Seconds from the start of `gestalt run` until the guest is in user space with all its CPUs: to the
    /// first line from there, or to the mark that says that user space has started the CPUs which the kernel
    /// left out.
    pub fn boot_seconds(&self) -> Option<f64> {
        let at =
            |wanted: &str| self.marks.iter().find(|(mark, _)| mark == wanted).map(|(_, at)| at.as_secs_f64());
        at("online").or(at("userspace"))
    }

    /// How often a mark was passed.
    pub fn count(&self, mark: &str) -> usize {
        self.marks.iter().filter(|(passed, _)| passed == mark).count()
    }

    /// The end of what was said, for an error.
    pub fn tail(&self) -> String {
        let lines: Vec<&str> = self.console.lines().collect();
        let last = lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n");
        format!("--- gestalt said\n{}\n--- the guest's console ends\n{last}", self.messages.trim_end())
    }
}

/// A machine that boots or runs. Dropped, it is killed.
pub struct Boot {
    job: Job,
    /// Nodes that were not started by `gestalt run`, by index.
    others: Vec<(usize, Job)>,
    /// Where host 0 finds the process id of `gestalt run`.
    pid: String,
    console: Console,
    /// What the guest said and nobody has looked at yet.
    said: VecDeque<Said>,
    started: Instant,
    heard: Instant,
    report: HostFile,
    outcome: Outcome,
}

impl Boot {
    /// Starts `gestalt run` on host 0 and `gestalt node` for every node elsewhere.
    ///
    /// # Errors
    /// A host is gone, or the stage is full.
    pub fn start(rig: &Rig, machine: &Machine, terminal: Option<(u16, u16)>) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let host = &rig.hosts()[0];
        let on_host = |name: &str| host.dir().join(name).display().to_string();
        let file = host.file(&format!("share/machine-{number}.toml"));
        let report = host.file(&format!("share/report-{number}.json"));
        file.write(machine.file(&on_host("guest"), rig.emulated().is_some()).as_bytes())?;
        if machine.has_joining_nodes() {
            share_key(rig, machine)?;
        }
        machine.make_boot_disk(rig.stage())?;
        for (number, host) in rig.hosts().iter().enumerate().take(machine.hosts) {
            let script = machine.prepare(number);
            if !script.is_empty() {
                let script = format!("cd {}\n{script}", on_host("share"));
                host.output(&script, Duration::from_secs(30)).context("making disks and TAP interfaces")?;
            }
        }
        let started = Instant::now();
        let pid = format!("share/pid-{number}");
        let gestalt = host.bin().join("gestalt").display().to_string();
        // The shell becomes `gestalt run`: its process id is the session's, and the parent of the local
        // nodes.
        let shell = ["/bin/sh", "-c", "echo $$ >\"$0\"; exec \"$@\"", &on_host(&pid)];
        let (file, path) = (file.path().to_string_lossy(), report.path().to_string_lossy());
        let command = [&gestalt, "run", &file, "--report", &path];
        let argv = [&shell[..], &command[..]].concat().into_iter().map(String::from);
        let argv = argv.chain(machine.flags.iter().cloned()).collect();
        let spawn = Spawn { argv, terminal, ..Spawn::default() };
        let job = host.spawn(spawn)?;
        let mut others = Vec::new();
        for index in (0..machine.nodes.len()).filter(|&index| machine.joins(index)) {
            others.push((index, join(&rig.hosts()[machine.host_of(index)], machine, index)?));
        }
        Ok(Self {
            job,
            others,
            pid: on_host(&pid),
            console: Console::default(),
            said: VecDeque::new(),
            started,
            heard: started,
            report,
            outcome: Outcome::default(),
        })
    }

    /// Types on the guest's console.
    pub fn input(&self) -> Input {
        self.job.input()
    }

    /// When it was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// What came of it until now.
    pub fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// Kills the process of node `index` with SIGKILL.
    ///
    /// # Errors
    /// There is no such process.
    pub fn kill_node(&self, host: &Host, index: usize) -> Result<()> {
        if let Some((_, job)) = self.others.iter().find(|(node, _)| *node == index) {
            job.signal(libc::SIGKILL);
            return Ok(());
        }
        let script = format!("kill -KILL $(pgrep -P $(cat {}) -f -- '--name n{index}( |$)')", self.pid);
        host.output(&script, Duration::from_secs(30)).map(drop).context("killing a node's process")
    }

    /// What the nodes on host 0 hold of the guest's memory: their own and copies of others', in KiB.
    ///
    /// # Errors
    /// The host is gone.
    pub fn memory_kib(&self, host: &Host) -> Result<u64> {
        let script = format!(
            "for process in $(pgrep -s $(cat {})); do for file in /proc/$process/fd/*; do \
             case $(readlink $file) in /memfd:*) stat -L -c %b $file ;; esac; done; done | \
             awk '{{ blocks += $1 }} END {{ print int(blocks / 2) }}'",
            self.pid
        );
        let said = host.output(&script, Duration::from_secs(60))?;
        said.trim().parse().with_context(|| format!("no size of memory: {said:?}"))
    }

    /// Processes of this machine that still run on host 0, as `ps` shows them; empty when all is gone.
    ///
    /// # Errors
    /// The host is gone.
    pub fn left_behind(&self, host: &Host) -> Result<String> {
        let script = format!("ps -o pid=,stat=,args= -s $(cat {}) || true", self.pid);
        host.output(&script, Duration::from_secs(30))
    }

    /// Follows the machine until it ends, or passes the mark that `watch` waits for. `see` gets the console's
    /// bytes.
    ///
    /// # Errors
    /// It takes too long, the guest panics or falls silent: the error carries the end of the console.
    pub fn watch(&mut self, mut watch: Watch, mut see: impl FnMut(&[u8])) -> Result<Outcome> {
        let limit = Instant::now() + watch.limit;
        let mut panicked: Option<Instant> = None;
        loop {
            while let Some(said) = self.said.pop_front() {
                match said {
                    Said::Mark(mark) => {
                        self.outcome.marks.push((mark.clone(), self.started.elapsed()));
                        if watch.until_mark.as_ref() == Some(&mark) {
                            return Ok(self.outcome.clone());
                        }
                    }
                    Said::Fact(key, value) => drop(self.outcome.facts.0.insert(key, value)),
                    Said::Ask => {
                        let answer = watch.answers.pop_front().unwrap_or_else(|| "poweroff".into());
                        self.input().send(format!("{answer}\n").as_bytes())?;
                    }
                    // An oops ends what ran and may leave the rest hanging.
                    Said::Text(text) if DEADLY.iter().any(|words| text.contains(words)) => {
                        panicked.get_or_insert(Instant::now() + LAST_WORDS);
                    }
                    Said::Text(_) => {}
                }
            }
            let patience = self.heard + watch.silence;
            let deadline =
                [Some(limit), Some(patience), panicked].into_iter().flatten().min().expect("not empty");
            let Some(event) = self.next(deadline)? else {
                let why = if panicked.is_some() {
                    "the guest's kernel panicked".to_owned()
                } else if deadline == patience {
                    format!("the guest said nothing for {:?}", watch.silence)
                } else {
                    format!("the machine was not through within {:?}", watch.limit)
                };
                bail!("{why}\n{}", self.outcome.tail());
            };
            let Event::Stdout(bytes) = event else {
                if let Event::Exit(_) = event {
                    return self.finish();
                }
                continue;
            };
            see(&bytes);
            self.said.extend(self.console.take(&bytes));
        }
    }

    /// Follows the machine until `done` says so of what was said so far; whether it did before `limit` had
    /// passed.
    ///
    /// # Errors
    /// The machine ends meanwhile, or a host is gone.
    pub fn wait_until(&mut self, limit: Duration, done: impl Fn(&Outcome) -> bool) -> Result<bool> {
        let deadline = Instant::now() + limit;
        while !done(&self.outcome) {
            match self.next(deadline)? {
                Some(Event::Exit(_)) => bail!("the machine ended by itself\n{}", self.finish()?.tail()),
                Some(_) => {}
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Waits for the machine's end, whatever it says; `None` when it still runs after `limit`.
    ///
    /// # Errors
    /// A host is gone.
    pub fn wait_end(&mut self, limit: Duration) -> Result<Option<Outcome>> {
        let deadline = Instant::now() + limit;
        while let Some(event) = self.next(deadline)? {
            if let Event::Exit(_) = event {
                return self.finish().map(Some);
            }
        }
        Ok(None)
    }

    /// The next event of `gestalt run`, noted in the outcome.
    fn next(&mut self, deadline: Instant) -> Result<Option<Event>> {
        let event = self.job.next_until(deadline)?;
        match &event {
            Some(Event::Stdout(bytes)) => {
                self.heard = Instant::now();
                self.outcome.console += &String::from_utf8_lossy(bytes);
            }
            Some(Event::Stderr(bytes)) => self.outcome.messages += &String::from_utf8_lossy(bytes),
            Some(Event::Exit(code)) => self.outcome.code = Some(*code),
            None => {}
        }
        Ok(event)
    }

    /// Collects what is left once `gestalt run` has ended.
    fn finish(&mut self) -> Result<Outcome> {
        let deadline = Instant::now() + Duration::from_secs(15);
        for (index, node) in &self.others {
            loop {
                match node.next_until(deadline)? {
                    Some(Event::Exit(0)) => break,
                    Some(Event::Exit(code)) => {
                        self.outcome.messages += &format!("node n{index}, which joined: exit code {code}\n");
                        break;
                    }
                    Some(Event::Stdout(bytes) | Event::Stderr(bytes)) => {
                        self.outcome.messages += &String::from_utf8_lossy(&bytes);
                    }
                    None => {
                        bail!("a remote node still runs after the machine's end\n{}", self.outcome.tail())
                    }
                }
            }
        }
        let report = self.report.read()?;
        if !report.is_empty() {
            self.outcome.counters =
                Some(serde_json::from_slice(&report).context("reading gestalt's report")?);
        }
        Ok(self.outcome.clone())
    }
}

/// Makes a machine key on the first host and copies it to the others, as an operator would.
fn share_key(rig: &Rig, machine: &Machine) -> Result<()> {
    let limit = Duration::from_secs(30);
    let (first, others) = rig.hosts().split_first().context("a rig without hosts")?;
    let gestalt = first.bin().join("gestalt");
    let make = format!("rm -f {KEY}; {} key new {KEY} && cat {KEY}", gestalt.display());
    let key = first.output(&make, limit).context("making a key")?;
    for host in &others[..machine.hosts - 1] {
        host.output(&format!("umask 077; echo '{}' >{KEY}", key.trim()), limit).context("copying the key")?;
    }
    Ok(())
}

/// Starts the process of node `index`, in a control group if its memory is limited.
fn join(host: &Host, machine: &Machine, index: usize) -> Result<Job> {
    let gestalt = host.bin().join("gestalt").display().to_string();
    let name = format!("n{index}");
    let node = [&gestalt, "node", "--join", &machine.join_address(), "--name", &name, "--key", KEY];
    let limit =
        machine.budget_mib.map(|mib| u64::from(mib + PROGRAM_MIB) << 20).map(|bytes| bytes.to_string());
    let group = format!("/sys/fs/cgroup/gestalt-{name}");
    let shell = limit.as_ref().map(|bytes| ["/bin/sh", "-c", LIMITED, &group, bytes]);
    let argv = shell.iter().flatten().chain(&node).map(|word| word.to_string()).collect();
    host.spawn(Spawn { argv, ..Spawn::default() })
}

/// Puts the shell into a new control group `$0`, where it gets `$1` bytes of memory, and becomes the other
/// arguments.
const LIMITED: &str = "set -e
mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
[ ! -d \"$0\" ] || rmdir \"$0\"
mkdir \"$0\"
echo \"$1\" >\"$0/memory.max\"
echo $$ >\"$0/cgroup.procs\"
shift
exec \"$@\"";
